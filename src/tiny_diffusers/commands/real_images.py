"""Real images that the flags of a picture name: a file, or images of a dataset with their classes and conditions."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .shared import read_picture


if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from ..data import ImageData


MAX_SIDE = 64  # pixels that a picture is reduced to where nothing says its resolution


def add_images_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image", type=Path, metavar="FILE", help="a picture or .npy file, instead of images of a dataset"
    )
    parser.add_argument("--dataset_name", help="a Hub id, a folder, or digits (default: what the run was trained on)")
    add_selection_arguments(parser)


def add_selection_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", help="its split (default: test, validation or train, the first that there is)")
    parser.add_argument("--index", type=whole_number, default=0, help="number of its first image (default: 0)")


def whole_number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 0")
    return int(text)


def load_picture(
    path: Path,
    size: int | tuple[int, int] | None,
    channels: int | None = None,
    value_range: tuple[float, float] | None = None,
) -> "torch.Tensor":
    """Loads the center of a picture, of the height and width `size` or a square: (1, C, H, W) in [-1, 1]."""
    import numpy as np
    import torch

    from ..data.images import normalize
    from ..models.layers_tiny import height_and_width

    size = size or min(*read_picture("--image", path).size, MAX_SIDE)
    picture = read_picture("--image", path, channels, value_range, height_and_width(size))
    if isinstance(picture, np.ndarray):
        value_range = value_range or (0.0, 1.0)
    elif channels == 3:
        picture = picture.convert("RGB")
    pixels = torch.from_numpy(np.atleast_3d(picture).copy())[None].permute(0, 3, 1, 2)
    return normalize(pixels, value_range)


def load_dataset(
    given: dict,
    run: Path | None,
    index: int,
    count: int,
    shape: tuple[int, int, int] | None = None,
    value_range: tuple[float, float] | None = None,
) -> "ImageData":
    """
    Loads images of a dataset, by given flags or as a run has it, `count` from `index` on. The shape and the value range are
    the dataset's by default.
    """
    import torch

    from ..evaluation import references
    from ..runs import RunFolder

    given = {name: value for name, value in given.items() if value is not None}
    flags = references.flags_of_run(RunFolder(run), given) if run is not None else {}
    data, _ = references.load_reference(references.choose(given, flags), shape, value_range=value_range)
    if index + count > len(data):
        raise UserError(
            f"There are {len(data):,} images, numbered from 0: {count} from number {index} on are too many."
        )
    return data.take(torch.arange(index, index + count))


def load_images(args: argparse.Namespace, pipe: "DiffusionPipeline", count: int) -> "torch.Tensor":
    """
    Loads the real images that the flags name, or those of the checkpoint's run, as the pipeline needs them: (count, C, H, W)
    in [-1, 1].
    """
    if args.image is None:
        return to_tensor(load_data(args, pipe, count))
    if args.dataset_name is not None:
        raise UserError("--image and --dataset_name: give only one.")
    channels, *size = pipe._image_shape
    return load_picture(args.image, size, channels, pipe._value_range)


def load_data(args: argparse.Namespace, pipe: "DiffusionPipeline", count: int) -> "ImageData":
    """Loads images of the dataset that the flags name, or of the checkpoint's run, in the pipeline's size and values."""
    run = Path(args.checkpoint) if Path(args.checkpoint).is_dir() else None
    given = {"dataset_name": args.dataset_name, "split": args.split}
    return load_dataset(given, run, args.index, count, pipe._image_shape, pipe._value_range)


def to_tensor(data: "ImageData") -> "torch.Tensor":
    from ..data.images import normalize

    return normalize(data.images, data.value_range)


def own_options(pipe: "DiffusionPipeline", data: "ImageData") -> dict:
    """Returns the classes and the conditions of real images, as far as the pipeline takes them."""
    from ..evaluation.regressor import with_conditions

    options, statistics = {}, getattr(pipe, "_condition_statistics", None)
    if getattr(pipe, "_class_ids", []):
        if data.labels is None:
            raise UserError(
                f"The model takes classes, and '{data.name}' has no labels: give --image and --class_labels."
            )
        labels = data.labels.tolist()
        options["class_labels"] = [data.id2label[label] for label in labels] if pipe.config.id2label else labels
    if statistics is not None:
        missing = [name for name in statistics.names if name not in (data.condition_names or [])]
        if missing:
            raise UserError(
                f"The model takes conditions, and '{data.name}' has no {', '.join(missing)}: give --image and --condition."
            )
        options["conditions"] = with_conditions(data, statistics.names).conditions
    return options
