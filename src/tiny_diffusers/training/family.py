"""A family of models: what it adds to the training loop, and what several families share."""

import contextlib
import dataclasses
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from ..data import ImageData
from ..data.images import spell_values
from ..errors import UserError, refusals
from ..models.layers_tiny import as_sample_size, height_and_width
from ..pipelines.pipeline_tiny import TinyPipeline, image_generators
from ..pipelines.pipeline_tiny_conditions import ConditionStatistics
from ..pipelines.pipeline_tiny_operators import Conditioning
from ..resolution import spell_resolution
from .arguments import TrainingArguments, network_options
from .draws import Draws


Pipeline = TypeVar("Pipeline")

MAX_GRID_CLASSES, MAX_EXAMPLES = 10, 8  # rows of a sample grid
_MAX_MEASURED = 2048  # images, of a dataset whose values are measured


@dataclass
class Batch:
    """
    What a loss is computed from.

    Attributes:
        images (`torch.Tensor` of shape `(B, C, H, W)`): float32 in [-1, 1], augmented.
        labels (`torch.Tensor` of shape `(B,)`, *optional*): int64; the null class where the label was dropped.
        draws ([`Draws`]): The random numbers of these images in this step.
        conditioning_images (`torch.Tensor` of shape `(B, K, H, W)`, *optional*): float32 in [-1, 1], flipped and cropped
            as the images; zeros where they were dropped.
        conditions (`torch.Tensor` of shape `(B, D)`, *optional*): float32, standardized; NaN where they were dropped.
        augment_labels (`torch.Tensor` of shape `(B, NUM_LABELS)`, *optional*): What [`augment_labeled`] did to the images.
        progress (`float`): Share of the run's steps that were taken before, in [0, 1); 1 in validation.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    draws: Draws
    conditioning_images: torch.Tensor | None = None
    conditions: torch.Tensor | None = None
    augment_labels: torch.Tensor | None = None
    progress: float = 1.0


class Family:
    """
    What a family of models adds to the training loop.

    Attributes:
        modules (`dict[str, nn.Module]`): The networks that are trained, each with an optimizer of its own, by the names
            of the pipeline's components.
        null_label (`int`, *optional*): The label that stands for no label.
        conditioning ([`Conditioning`], *optional*): The image that the network is given as a condition.
        condition_statistics ([`ConditionStatistics`], *optional*): Names and standardization of the conditions that the
            network is given.
        shows_examples (`bool`): Whether sample grids show held-out images.
        examples ([`Batch`], *optional*): Those images, from [`Batches`].
        label_dropout (`float`): Share of the labels that [`Batches`] replaces by `null_label`, and of the conditioning
            images and conditions that it replaces by zeros and NaN with them.
        augment_prob (`float`): Probability of each kind of augmentation that the network is told of.
        phases (`dict[str, int]`): Flags that count the steps of a phase: the loop warns if the run ends within it.
        preview_share (`float`): Share of the time of [`sample`] that [`preview`] takes.
        measured_options (`Collection[str]`): Options of the networks that [`measure`] sets.
    """

    modules: dict[str, nn.Module]
    null_label: int | None = None
    conditioning: Conditioning | None = None
    condition_statistics: ConditionStatistics | None = None
    examples: Batch | None = None
    label_dropout: float = 0.0
    augment_prob: float = 0.0
    phases: dict[str, int] = {}
    preview_share: float = 1.0
    measured_options: Collection[str] = ()

    @property
    def shows_examples(self) -> bool:
        """Returns whether sample grids show held-out images: by default those that give a conditioning image."""
        return self.conditioning is not None

    @property
    def condition_config(self) -> dict[str, list] | None:
        """Returns the conditions as the config of a pipeline holds them."""
        return None if self.condition_statistics is None else self.condition_statistics.to_config()

    def losses(self, modules: dict[str, nn.Module], batch: Batch) -> Iterator[tuple]:
        """
        Yields (name of a module, its scalar loss), or (name, loss, scalars to log by name), in the order in which the
        modules are stepped. The loop back-propagates and steps before it asks for the next.
        """
        raise NotImplementedError

    def validation_loss(self, modules: dict[str, nn.Module], batch: Batch) -> torch.Tensor:
        """Computes the loss of each image, `(B,)`."""
        raise NotImplementedError

    def measure(self, networks: dict[str, nn.Module], batches: Iterator[Batch]) -> None:
        """Measures on some training images what is saved in the configs of the (EMA) networks; nothing by default."""

    def pipeline(self, modules: dict[str, nn.Module]) -> Any:
        """Builds the pipeline around (EMA) networks, which is what is saved."""
        raise NotImplementedError

    def sample(self, pipeline: Any, num_images: int, seed: int) -> tuple[list, dict]:
        """Draws the images of the last sample grid: (PIL images, keyword arguments of [`plots.image_grid`])."""
        raise NotImplementedError

    def preview(self, pipeline: Any, num_images: int, seed: int) -> tuple[list, dict]:
        """Draws the images of a sample grid during training: those of [`sample`], coarser where that is faster."""
        return self.sample(pipeline, num_images, seed)


def condition_grid(
    id2label: dict[int, str] | None, statistics: ConditionStatistics | None, num_images: int
) -> tuple[dict[str, Any], int, dict[str, Any]]:
    """
    Lays out a grid with a row for each of some values of the first condition, and in it one class after another; or,
    without conditions, with a row for each class.

    Args:
        id2label (`dict[int, str]`, *optional*): The names of the classes; of many, the first ten have rows.
        statistics ([`ConditionStatistics`], *optional*): The conditions.
        num_images (`int`): Number of images to share out among the rows; each gets at least one.

    Returns:
        `tuple[dict, int, dict]`: `class_labels` and `conditions` of the images, as far as there are some; the images a row;
        arguments of [`plots.image_grid`], empty without classes and conditions.
    """
    if statistics is not None:
        values, texts = statistics.examples()
        each = max(1, num_images // len(values))
        options: dict[str, Any] = {"conditions": [row for row in values for _ in range(each)]}
        if id2label is not None:
            options["class_labels"] = [i % len(id2label) for i in range(each)] * len(values)
    elif id2label is not None:
        classes = list(id2label)[:MAX_GRID_CLASSES]
        texts = [id2label[label] for label in classes]
        each = max(1, num_images // len(classes))
        options = {"class_labels": [label for label in classes for _ in range(each)]}
    else:
        return {}, num_images, {}
    return options, each, {"columns": each, "row_labels": texts}


def draw_from_latents(
    pipeline: Any,
    id2label: dict[int, str] | None,
    statistics: ConditionStatistics | None,
    num_images: int,
    seed: int,
) -> tuple[list, dict]:
    """Draws the grid of [`condition_grid`] by a VAE or a DCGAN, each row from the same latents; returns images and grid."""
    options, each, grid = condition_grid(id2label, statistics, num_images)
    generator = [one for _ in grid.get("row_labels", [None]) for one in image_generators(seed, each)]
    return pipeline(batch_size=len(generator), generator=generator, **options).images, grid


def measured_rows(count: int) -> torch.Tensor:
    """Returns the rows, from all of a dataset of so many images, of those that stand for it in a measurement."""
    most = min(count, _MAX_MEASURED)
    return torch.arange(most) * count // most


def sample_size(data: ImageData) -> int | tuple[int, int]:
    """Returns the size of a network's inputs as its config has it: the side of squares, or the height and the width."""
    return as_sample_size(data.input_shape[1:])


def halving_widths(height: int, width: int) -> list[int]:
    """
    Returns the widths of the levels, finest first: 64, 128, ... for as many halvings as bring the shorter side to 4 pixels
    or one of both to an odd number, five at most. At 64x64 pixels these are DCGAN's.
    """
    widths = [64]
    height, width = height // 2, width // 2
    while min(height, width) > 4 and height % 2 == width % 2 == 0 and len(widths) < 5:
        widths.append(2 * widths[-1])
        height, width = height // 2, width // 2
    return widths


@contextlib.contextmanager
def network_refusals(settings: TrainingArguments, **flags: str) -> Iterator[None]:
    """
    Turns what a network refuses of its options into a [`UserError`] that names their flags: `--resolution` for its
    `sample_size`, and for others their names, unless `flags` give another.
    """
    names = {name: name for name in network_options(settings) if "_" in name}  # the others are words of the language
    names |= {"sample_size": "resolution", **flags}
    try:
        with refusals():
            yield
    except UserError as error:
        options = rf"(?<![-\w])({'|'.join(names)})(?!\w)"
        raise UserError(re.sub(options, lambda match: f"--{names[match[1]]}", str(error))) from error


def load_pretrained(
    arguments: TrainingArguments, pipeline_class: type[Pipeline], network_class: type[nn.Module] = nn.Module
) -> Pipeline | None:
    """
    Loads the pipeline that `--pretrained_model_name_or_path` names, in float32; None if it is not given.

    Args:
        arguments ([`TrainingArguments`]): The settings.
        pipeline_class (`type`), network_class (`type`): Classes that the pipeline and its network must have.

    Raises:
        UserError: If there is no such checkpoint, or it is of another family.
    """
    name = arguments.pretrained_model_name_or_path
    if name is None:
        return None
    try:
        with refusals("--pretrained_model_name_or_path: "):
            pipeline = TinyPipeline.from_pretrained(name, cache_dir=arguments.cache_dir)
    except OSError as error:
        raise UserError(f"--pretrained_model_name_or_path: {error}") from error
    if not isinstance(pipeline, pipeline_class):
        raise UserError(
            f"--pretrained_model_name_or_path: {name} is a {type(pipeline).__name__}, not a {pipeline_class.__name__}."
        )
    if not isinstance(pipeline._network, network_class):
        raise UserError(
            f"--pretrained_model_name_or_path: {name} has a network of the class {type(pipeline._network).__name__}, not "
            f"{network_class.__name__}."
        )
    return pipeline


def check_images(
    arguments: TrainingArguments,
    data: ImageData,
    channels: int,
    size: int | tuple[int, int],
    value_range: tuple[float, float] | None,
    flag: str = "pretrained_model_name_or_path",
) -> None:
    """
    Checks that the network of `--pretrained_model_name_or_path` is made for images like those of the data.

    Args:
        arguments ([`TrainingArguments`]): The settings.
        data ([`ImageData`]): The images.
        channels (`int`), size (`int` or `tuple[int, int]`), value_range (`tuple[float, float]`, *optional*): Those of the
            checkpoint's images, the size as the network's config has it.
        flag (`str`): The argument that names the checkpoint, if it is another.

    Raises:
        UserError: If it is not; it says what to do.
    """
    given_channels, *given_size = data.input_shape
    source = f"--{flag}: {getattr(arguments, flag)} makes images of"
    if channels != given_channels:
        raise UserError(
            f"{source} {channels} channel{'s' * (channels > 1)}, but those of {data.name} have {given_channels}: give "
            f"--channels {channels}, start from a checkpoint of {given_channels} channel{'s' * (given_channels > 1)}, or "
            "leave the flag out to train a new network."
        )
    if value_range != data.value_range:
        expected, given = map(spell_values, (value_range, data.value_range))
        if value_range is not None:
            remedy = "give --value_range {!r} {!r}".format(*value_range)
        elif arguments.value_range is not None:
            remedy = "leave --value_range out"
        else:
            remedy = "save them as 8-bit images, or train a new network"
        raise UserError(f"{source} {expected}, but those of {data.name} have {given}: {remedy}.")
    height, width = height_and_width(size)
    if [height, width] != given_size:
        raise UserError(
            f"{source} {height}x{width} pixels, but those of {data.name} have {given_size[0]}x{given_size[1]}: give "
            f"--resolution {spell_resolution(height, width)}."
        )


def check_conditions(
    pipeline: TinyPipeline, data: ImageData, num_class_embeds: int | None, num_conditions: int | None
) -> None:
    """
    Checks that the network of `--pretrained_model_name_or_path` takes the classes and conditions of the run.

    Args:
        pipeline ([`TinyPipeline`]): The checkpoint.
        data ([`ImageData`]): The images.
        num_class_embeds (`int`, *optional*), num_conditions (`int`, *optional*): Number of the classes and of the conditions
            that the run gives to its network; None for none.

    Raises:
        UserError: If it does not; it says what to do.
    """
    config = pipeline._network.config
    if config.num_class_embeds != num_class_embeds:
        raise UserError(
            f"--pretrained_model_name_or_path: it has {config.num_class_embeds or 'no'} classes, but {data.name} and the "
            f"arguments ask for {num_class_embeds or 'none'}: give --class_conditional as it was given there, and the same "
            "--classes."
        )
    names = {int(class_id): name for class_id, name in (pipeline.config.get("id2label") or {}).items()}
    if names and names != data.id2label:
        raise UserError(
            f"--pretrained_model_name_or_path: its classes are {list(names.values())[:5]}, but those of {data.name} are "
            f"{list(data.id2label.values())[:5]}: give the same --classes."
        )
    if config.num_conditions != num_conditions:
        remedy = (
            "give --condition_columns as it was given there"
            if config.num_conditions
            else "leave --condition_columns out"
        )
        raise UserError(
            f"--pretrained_model_name_or_path: it has {config.num_conditions or 'no'} conditions, but the arguments ask for "
            f"{num_conditions or 'none'}: {remedy}, or train a new network."
        )


def asked_options(arguments: TrainingArguments) -> dict[str, Any]:
    """Returns the network's options that were asked for: on the command line, or by a value that is no default."""
    defaults = {f.name: f.default for f in dataclasses.fields(arguments)}
    smoke = arguments.SMOKE if arguments.smoke else {}
    return {
        name: value
        for name, value in network_options(arguments).items()
        if name in arguments.given or value not in (defaults[name], smoke.get(name, defaults[name]))
    }


def check_network_flags(arguments: TrainingArguments, config: dict[str, Any]) -> None:
    """
    Checks that a loaded network is what the flags ask for.

    Args:
        arguments ([`TrainingArguments`]): The settings as asked for.
        config (`dict[str, Any]`): option -> what the loaded network has; an option that it lacks is unknown to it.

    Raises:
        UserError: If they differ; it names each flag.
    """
    differing = []
    for name, value in asked_options(arguments).items():
        if name not in config:
            differing.append(f"--{name} {_spelled(value)} (it knows no such option)")
        elif value != _as_given(config[name]):
            differing.append(f"--{name} {_spelled(value)} (it has {_spelled(config[name])})")
    if differing:
        source = arguments.pretrained_model_name_or_path or getattr(arguments, "model_config_name_or_path", None)
        raise UserError(f"{source} fixes the network, so leave such flags out: {', '.join(differing)}.")


def loaded_options(arguments: TrainingArguments, config: dict[str, Any]) -> dict[str, Any]:
    """Returns the options that a loaded network has, once [`check_network_flags`] has found no flag against them."""
    check_network_flags(arguments, config)
    return {name: _as_given(config[name]) for name in network_options(arguments)}


def _as_given(value: Any) -> Any:
    """Returns a value of a network's config as the flags have it: widths as a list."""
    return list(value) if isinstance(value, tuple) else value


def _spelled(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
