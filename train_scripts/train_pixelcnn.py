"""
Train a PixelCNN on small images: the gated one, PixelCNN++, or a small baseline.

    accelerate launch train_scripts/train_pixelcnn.py                                       # the embedded 8x8 digits
    accelerate launch train_scripts/train_pixelcnn.py --config train_scripts/recipes/pixelcnn_mnist.yaml
"""

import dataclasses
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from tiny_diffusers.data import ImageData, held_out, normalize
from tiny_diffusers.errors import UserError
from tiny_diffusers.models.pixelcnn_tiny import TinyPixelCNNModel
from tiny_diffusers.pipelines.pipeline_tiny_pixelcnn import TinyPixelCNNPipeline
from tiny_diffusers.training.arguments import TrainingArguments, flag, parse_arguments
from tiny_diffusers.training.baselines import check_given, load_pretrained
from tiny_diffusers.training.draws import DataOrder
from tiny_diffusers.training.trainer import Batch, Family, Trainer, launch, load_data, start


_INITIALIZATION_IMAGES = 64  # that the weight norms of PixelCNN++ are initialised from
_MAX_GRID_CLASSES = 10
_SINGLE_IMAGE_EPOCH = 1000
_NETWORK_ARGUMENTS = (
    "variant",
    "hidden_channels",
    "num_layers",
    "num_mixtures",
    "num_frequencies",
    "dilations",
    "dropout",
)


@dataclass
class PixelCNNArguments(TrainingArguments):
    """The network, and what it is conditioned on."""

    SMOKE: ClassVar[dict[str, Any]] = {
        **TrainingArguments.SMOKE,
        "hidden_channels": 12,
        "resolution": 8,  # a sample costs a step for each of its sub-pixels
        "save_images_epochs": 4,
    }

    variant: str = flag("gated", "gated, plusplus or baseline.")
    hidden_channels: int | None = flag(None, "Features of a layer; by variant if not given.")
    num_layers: int | None = flag(None, "Layers, or blocks of each resolution (plusplus); by variant if not given.")
    num_mixtures: int | None = flag(None, "Logistics in the mixture (plusplus); 10 if not given.")
    num_frequencies: int = flag(0, "Waves of 2, 4, ... levels that the input is taken apart into, 8 for all (gated).")
    dilations: list[int] | None = flag(
        None, "Of the layers, one after the other and again from the first (gated); 1 if not given."
    )
    dropout: float | None = flag(None, "Dropout (plusplus); 0.5 if not given.")
    num_levels: int = flag(256, "Levels that sub-pixels are quantised to, 2 to 256.")
    class_conditional: bool = flag(False, "Condition on the images' classes.")
    class_dropout_prob: float = flag(0.1, "Share of the labels that are dropped, to learn images of no class, too.")
    single_image: int | None = flag(None, "Overfit the image of this index alone.")
    temperature: float = flag(1.0, "Of the sample grids.")

    def __post_init__(self):
        if self.smoke and self.num_layers is None:
            self.num_layers = {"gated": 3, "plusplus": 1}.get(self.variant)
        if not 2 <= self.num_levels <= 256:
            raise UserError(f"--num_levels {self.num_levels}: images of 8 bits have 256 levels; give 2 to 256.")
        if not 0 <= self.class_dropout_prob < 1:
            raise UserError(f"--class_dropout_prob {self.class_dropout_prob}: it must be in [0, 1); 0.1 is usual.")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"--temperature {self.temperature}: it must be a finite number above 0.")
        if self.temperature != 1 and self.variant == "baseline":
            raise UserError(f"--temperature {self.temperature}: the baseline draws nothing; leave it out.")
        if self.num_mixtures is not None and self.variant != "plusplus":
            raise UserError(f"--num_mixtures {self.num_mixtures}: only plusplus has a mixture; leave it out.")


class PixelCNN(Family):
    """
    Autoregression over sub-pixels: minimises -log2 p(x) / (C H W), bits a dimension; for the baseline, which has no
    likelihood, the mean absolute error of the intensities in [0, 1].

    Args:
        pixelcnn ([`TinyPixelCNNModel`]): The network.
        id2label (`dict[int, str]`, *optional*): The names of the classes, where it is conditioned on them.
        class_dropout_prob (`float`): Share of the labels that are replaced by the null class.
        temperature (`float`): Of the sample grids.
    """

    name = "pixelcnn"

    def __init__(
        self,
        pixelcnn: TinyPixelCNNModel,
        id2label: dict[int, str] | None = None,
        class_dropout_prob: float = 0.0,
        temperature: float = 1.0,
    ):
        self.modules = {"pixelcnn": pixelcnn}
        self.id2label = id2label
        if id2label is not None:
            self.null_label, self.label_dropout = len(id2label), class_dropout_prob
        self.temperature = temperature

    def losses(self, modules: dict[str, nn.Module], batch: Batch) -> Iterator[tuple[str, torch.Tensor]]:
        yield "pixelcnn", self._image_losses(modules["pixelcnn"], batch).mean()

    def validation_loss(self, modules: dict[str, nn.Module], batch: Batch) -> torch.Tensor:
        return self._image_losses(modules["pixelcnn"], batch)

    def _image_losses(self, pixelcnn: nn.Module, batch: Batch) -> torch.Tensor:
        images = self.modules["pixelcnn"].quantize((batch.images + 1) / 2)
        return pixelcnn(images, batch.labels, return_loss=True).loss

    def pipeline(self, modules: dict[str, nn.Module]) -> TinyPixelCNNPipeline:
        dropped = None if self.id2label is None else self.label_dropout
        return TinyPixelCNNPipeline(modules["pixelcnn"], self.id2label, dropped)

    def sample(self, pipeline: TinyPixelCNNPipeline, num_images: int, seed: int) -> tuple[list, dict]:
        """A row for each class, where there are classes. The baseline has one sample, as it draws nothing."""
        if pipeline.pixelcnn.config.variant == "baseline":
            return pipeline().images, {}
        labels, layout = None, {}
        if self.id2label is not None:
            classes = list(self.id2label)[:_MAX_GRID_CLASSES]
            each = max(1, num_images // len(classes))
            labels, num_images = [label for label in classes for _ in range(each)], each * len(classes)
            layout = {"columns": each, "row_labels": [self.id2label[label] for label in classes]}
        generators = [torch.Generator().manual_seed(seed + i) for i in range(num_images)]
        images = pipeline(num_images, labels, temperature=self.temperature, generator=generators).images
        return images, layout


def build_pixelcnn(arguments: PixelCNNArguments, data: ImageData) -> TinyPixelCNNModel:
    """
    The network: a checkpoint's, or a new one by the arguments, its weight norms initialised from the first images.

    Raises:
        UserError: If it does not fit the data, or cannot be built.
    """
    channels, resolution = data.images.shape[1], data.images.shape[-1]
    settled = {
        "sample_size": resolution,
        "in_channels": channels,
        "num_levels": arguments.num_levels,
        "num_class_embeds": len(data.id2label) if arguments.class_conditional else None,
    }
    if arguments.pretrained_model_name_or_path:
        pixelcnn = load_pretrained(arguments, TinyPixelCNNPipeline).pixelcnn
        for name, value in settled.items():
            if pixelcnn.config[name] != value:
                raise UserError(
                    f"--pretrained_model_name_or_path: its {name} is {pixelcnn.config[name]}, but {data.name} and the "
                    f"arguments ask for {value}."
                )
        network = {name: pixelcnn.config[name] for name in _NETWORK_ARGUMENTS}
        check_given(arguments, network)
        for name, value in network.items():
            # what the run's settings and its card say
            setattr(arguments, name, list(value) if isinstance(value, tuple) else value)
        if pixelcnn.config.variant != "plusplus":
            arguments.num_mixtures = None
        return pixelcnn
    torch.manual_seed(arguments.seed)  # the initial weights are the seed's alone
    try:
        pixelcnn = TinyPixelCNNModel(
            **settled,
            variant=arguments.variant,
            hidden_channels=arguments.hidden_channels,
            num_layers=arguments.num_layers,
            num_mixtures=arguments.num_mixtures or 10,
            num_frequencies=arguments.num_frequencies,
            dilations=(1,) if arguments.dilations is None else arguments.dilations,
            dropout=arguments.dropout,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    if arguments.validation_split > 0:
        data, _ = held_out(data, arguments.validation_split, arguments.seed)
    first = DataOrder(arguments.seed, len(data))(range(min(len(data), _INITIALIZATION_IMAGES)))
    pixelcnn.initialize(pixelcnn.quantize((normalize(data.images[first]) + 1) / 2))
    return pixelcnn


def take_single_image(data: ImageData, index: int) -> ImageData:
    """
    One image, a thousand times to train on, which make an epoch, and once more to measure on without what only training
    does.

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
        notes=[
            *data.notes,
            f"image {index} alone: a step is of that image once, and {_SINGLE_IMAGE_EPOCH:,} are an epoch",
        ],
    )


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(PixelCNNArguments, argv)
    accelerator = start(arguments)
    data = load_data(arguments, accelerator, require_labels=arguments.class_conditional)
    if arguments.single_image is not None:
        data = take_single_image(data, arguments.single_image)
        arguments.validation_split, arguments.train_batch_size = 1 / len(data), 1

    pixelcnn = build_pixelcnn(arguments, data)
    id2label = data.id2label if arguments.class_conditional else None
    family = PixelCNN(pixelcnn, id2label, arguments.class_dropout_prob, arguments.temperature)

    Trainer(arguments, accelerator, data, family).run()


if __name__ == "__main__":
    sys.exit(launch(main))
