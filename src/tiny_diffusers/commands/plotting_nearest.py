"""`tiny-diffusers plot nearest`: samples, and the training images that are nearest to them."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError, say
from .sampling import add_plan_arguments, draw_plan, plan_samples
from .shared import add_picture_output, are_pictures, load_pipeline, make_parser, prepare_picture


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..data import ImageData
    from ..plots import Strip


NUM_IMAGES = 8  # in a row, and by default


def nearest_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "plot nearest",
        "Draws samples, and below each the training image that is nearest to it in the pixels, with their Euclidean "
        "distance for pixels in [0, 1].",
    )
    add_plan_arguments(parser, NUM_IMAGES)
    parser.add_argument("--dataset_name", help="a Hub id, a folder, or digits (default: what the run was trained on)")
    add_picture_output(parser, "nearest.png")
    return parser


def nearest(args: argparse.Namespace) -> None:
    from ..plots import captioned_strips

    prepare_picture(args.output, given=args.image)
    pipe = load_pipeline(args)
    run = Path(args.checkpoint) if Path(args.checkpoint).is_dir() else None
    training = load_training_images(pipe, run, args.dataset_name)
    captioned_strips(nearest_strips(pipe, args, training)).save(args.output)
    say(f"wrote {args.output}, the nearest of {len(training):,} images")


def load_training_images(pipe: "DiffusionPipeline", run: Path | None, dataset_name: str | None) -> "ImageData":
    """Loads the images of a name, or those of a run, that a pipeline was trained on, as it draws them: uint8."""
    from ..evaluation import references
    from ..runs import RunFolder

    if not are_pictures(pipe):
        raise UserError("Nearest images are found for pictures of 8 bits, and this model draws others.")
    given = {} if dataset_name is None else {"dataset_name": dataset_name}
    flags = references.flags_of_run(RunFolder(run), given) if run is not None else {}
    return references.load_training(references.choose(given, flags), pipe._image_shape)


def nearest_strips(
    pipe: "DiffusionPipeline", args: argparse.Namespace, training: "ImageData", **further
) -> "list[Strip]":
    """Draws rows of samples, each above the row of the training images nearest to them, with further options of the call."""
    import numpy as np

    from ..evaluation.metrics import nearest_neighbors
    from ..plots import Strip, to_pil

    images, _ = draw_plan(pipe, plan_samples(pipe, args), args, **further)
    samples = np.stack([np.atleast_3d(image) for image in images]).transpose(0, 3, 1, 2)  # (N, C, H, W)
    rows, references = (np.float32(each.reshape(len(each), -1)) / 255 for each in (samples, training.images.numpy()))
    distances, indices = nearest_neighbors(rows, references)
    captions, found = [f"{distance:.2f}" for distance in distances], to_pil(training.images[indices])
    strips = []
    for start in range(0, len(images), NUM_IMAGES):
        row = slice(start, start + NUM_IMAGES)
        strips += [Strip(images[row], label="sample"), Strip(found[row], captions[row], label="nearest")]
    return strips
