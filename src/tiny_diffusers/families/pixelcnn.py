"""PixelCNNs and the PixelRNN: their arguments, their loss, the builder of their networks."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ..data import ImageData, held_out, normalize
from ..data.images import spell_values
from ..errors import UserError
from ..flags import flag
from ..models.pixelcnn_tiny import DEFAULTS, TinyPixelCNNModel
from ..pipelines.pipeline_tiny import image_generators
from ..pipelines.pipeline_tiny_conditions import ConditionStatistics
from ..pipelines.pipeline_tiny_pixelcnn import TinyPixelCNNPipeline
from ..training.arguments import NetworkArguments, network_options
from ..training.draws import DataOrder
from ..training.family import (
    Batch,
    Family,
    check_conditions,
    check_images,
    condition_grid,
    loaded_options,
    network_refusals,
    sample_size,
)
from .conditions import ConditionArguments


_INITIALIZATION_IMAGES = 64  # that the weight norms of PixelCNN++ are initialized from
_SINGLE_IMAGE_EPOCH = 1000  # steps


@dataclass(frozen=True)
class PixelCNNNetworkArguments(NetworkArguments):
    """Options of [`TinyPixelCNNModel`]; None stands for the default of the variant."""

    variant: Literal[tuple(DEFAULTS)] = flag("gated", "Variant of the network.")
    hidden_channels: int | None = flag(None, "Features of a layer; by variant if not given.", within="[1, 4096]")
    num_layers: int | None = flag(
        None, "Layers, or blocks of each resolution (plusplus); by variant if not given.", within="[1, 64]"
    )
    num_mixtures: int | None = flag(None, "Logistics in the mixture (plusplus); 10 if not given.", within="[1, 1024]")
    num_frequencies: int = flag(
        0, "Waves of 2, 4, ... levels that the input is decomposed into, 8 for all (gated).", within="[0, 16]"
    )
    dilations: list[int] | None = flag(
        None, "Dilations of the layers, in turn (gated); 1 if not given.", within="[1, 256]"
    )
    dropout: float | None = flag(None, "Dropout (plusplus); 0.5 if not given.", within="[0, 1)")
    num_levels: int = flag(256, "Levels that sub-pixels are quantized to.", within="[2, 256]")


@dataclass(frozen=True)
class PixelCNNArguments(PixelCNNNetworkArguments, ConditionArguments):
    """The network, and what it is conditioned on."""

    TITLE: ClassVar[str] = "PixelCNN"
    SCRIPT: ClassVar[str] = "pixelcnn"
    FAMILY: ClassVar[str] = "pixelcnn"
    SMOKE: ClassVar[dict[str, Any]] = {
        **ConditionArguments.SMOKE,
        "hidden_channels": 12,
        "resolution": 8,  # a sample costs a step for each of its sub-pixels
        "save_images_epochs": 4,
    }

    class_conditional: bool = flag(False, "Condition on the images' classes.")
    class_dropout_prob: float = flag(
        0.1,
        "Share of the labels that are dropped, and of the conditions with them, to learn images of no class, too.",
        within="[0, 1)",
    )
    single_image: int | None = flag(None, "Overfit the image of this index alone.", within="[0, inf)")
    temperature: float = flag(1.0, "Temperature of the sample grids.", within="(0, inf)", changes_run=False)

    def __post_init__(self):
        super().__post_init__()
        if self.temperature != 1 and self.variant == "baseline":
            raise UserError(f"--temperature {self.temperature}: the baseline draws nothing; leave it out.")
        if self.num_mixtures is not None and self.variant != "plusplus":
            raise UserError(f"--num_mixtures {self.num_mixtures}: only plusplus has a mixture; leave it out.")


class PixelCNN(Family):
    """
    Autoregression over sub-pixels: minimizes -log2 p(x) / (C H W), in bits/dim; for the baseline, which has no
    likelihood, the mean absolute error of the intensities in [0, 1].

    Args:
        pixelcnn ([`TinyPixelCNNModel`]): The network.
        id2label (`dict[int, str]`, *optional*): The names of the classes, if it is conditioned on them.
        class_dropout_prob (`float`): Share of the labels that are replaced by the null class, and of the conditions that
            are dropped with them.
        temperature (`float`): Temperature of the sample grids.
        condition_statistics ([`ConditionStatistics`], *optional*): The conditions.
    """

    def __init__(
        self,
        pixelcnn: TinyPixelCNNModel,
        id2label: dict[int, str] | None = None,
        class_dropout_prob: float = 0.0,
        temperature: float = 1.0,
        condition_statistics: ConditionStatistics | None = None,
    ):
        self.modules = {"pixelcnn": pixelcnn}
        self.id2label, self.condition_statistics = id2label, condition_statistics
        self.null_label = None if id2label is None else len(id2label)
        self.is_conditional = id2label is not None or condition_statistics is not None
        self.label_dropout = class_dropout_prob if self.is_conditional else 0.0
        self.temperature = temperature

    def losses(self, modules: dict[str, nn.Module], batch: Batch) -> Iterator[tuple[str, torch.Tensor]]:
        yield "pixelcnn", self._image_losses(modules["pixelcnn"], batch).mean()

    def validation_loss(self, modules: dict[str, nn.Module], batch: Batch) -> torch.Tensor:
        return self._image_losses(modules["pixelcnn"], batch)

    def _image_losses(self, pixelcnn: nn.Module, batch: Batch) -> torch.Tensor:
        images = self.modules["pixelcnn"].quantize((batch.images + 1) / 2)
        return pixelcnn(images, batch.labels, return_loss=True, conditions=batch.conditions).loss

    def pipeline(self, modules: dict[str, nn.Module]) -> TinyPixelCNNPipeline:
        return TinyPixelCNNPipeline(
            modules["pixelcnn"],
            self.id2label,
            self.label_dropout if self.is_conditional else None,
            self.condition_config,
        )

    def sample(self, pipeline: TinyPixelCNNPipeline, num_images: int, seed: int) -> tuple[list, dict]:
        """Draws a row for each class or some conditions. The baseline has one sample, as it draws nothing."""
        if pipeline.pixelcnn.config.variant == "baseline":
            return pipeline().images, {}
        options, each, grid = condition_grid(self.id2label, self.condition_statistics, num_images)
        generator = image_generators(seed, each * len(grid.get("row_labels", [None])))
        images = pipeline(len(generator), temperature=self.temperature, generator=generator, **options).images
        return images, grid


def resolve_pixelcnn(
    arguments: PixelCNNArguments, data: ImageData, pretrained: TinyPixelCNNPipeline | None = None
) -> dict[str, Any]:
    """Resolves the options of a loaded network, what training on a single image changes, and the layers of --smoke."""
    resolved = {}
    if arguments.single_image is not None:
        resolved = {"validation_split": 1 / len(data), "train_batch_size": 1}
    if pretrained is not None:
        options = loaded_options(arguments, pretrained.pixelcnn.config)
        options["num_mixtures"] = options["num_mixtures"] if options["variant"] == "plusplus" else None
        return resolved | options
    if arguments.smoke and arguments.num_layers is None:
        resolved["num_layers"] = {"gated": 3, "plusplus": 1, "row_lstm": 3}.get(arguments.variant)
    return resolved


def build_pixelcnn(
    settings: PixelCNNArguments,
    data: ImageData,
    pretrained: TinyPixelCNNPipeline | None = None,
    num_conditions: int | None = None,
) -> TinyPixelCNNModel:
    """
    Builds the network: a loaded pipeline's, or a new one by its options, its weight norms initialized from the first
    images.

    Raises:
        UserError: If it does not fit the data, or cannot be built.
    """
    if data.value_range is not None:
        raise UserError(
            f"A PixelCNN draws one of 256 levels for each value, and {data.name} has {spell_values(data.value_range)}: save "
            "them as 8 bits, leave --value_range out, or train another family."
        )
    fixed = {
        "sample_size": sample_size(data),
        "in_channels": data.images.shape[1],
        "num_class_embeds": len(data.id2label) if settings.class_conditional else None,
        "num_conditions": num_conditions,
    }
    if pretrained is not None:
        config = pretrained.pixelcnn.config
        check_images(settings, data, config.in_channels, config.sample_size, None)
        check_conditions(pretrained, data, fixed["num_class_embeds"], num_conditions)
        return pretrained.pixelcnn
    options = {name: value for name, value in network_options(settings).items() if value is not None}
    torch.manual_seed(settings.seed)  # the initial weights depend on the seed alone
    with network_refusals(settings):
        pixelcnn = TinyPixelCNNModel(**fixed, **options)
    indices = torch.arange(len(data))
    if settings.validation_split > 0:
        indices, _ = held_out(len(data), settings.validation_split, settings.seed)
    first = DataOrder(settings.seed, len(indices))(range(min(len(indices), _INITIALIZATION_IMAGES)))
    pixelcnn.initialize(pixelcnn.quantize((normalize(data.images[indices[first]]) + 1) / 2))
    return pixelcnn


def take_single_image(data: ImageData, index: int) -> ImageData:
    """
    Returns one image a thousand times, an epoch to train on, and once more to validate on.

    Raises:
        UserError: If there is no such image.
    """
    if not 0 <= index < len(data):
        raise UserError(f"--single_image {index}: {data.name} has the images 0 to {len(data) - 1}.")
    rows = torch.full((_SINGLE_IMAGE_EPOCH + 1,), index)
    return dataclasses.replace(
        data,
        images=data.images[rows],
        labels=None if data.labels is None else data.labels[rows],
        conditions=None if data.conditions is None else data.conditions[rows],
        notes=[*data.notes, f"image {index} alone: one image a step, {_SINGLE_IMAGE_EPOCH:,} steps an epoch"],
    )
