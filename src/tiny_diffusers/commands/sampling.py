"""`tiny-diffusers sample` and `interpolate`."""

import argparse
import inspect
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..errors import UserError, refusals, say
from .conditions import add_condition_argument, condition_options, conditions_to_draw
from .shared import (
    MAX_ROW,
    add_checkpoint_argument,
    add_dynamic_thresholding,
    add_guidance_interval,
    add_output_argument,
    add_sampling_arguments,
    add_show_channels,
    add_temperature,
    add_truncation,
    are_pictures,
    call_options,
    check_numbered,
    comma_separated,
    find_pictures,
    load_pipeline,
    make_parser,
    positive_number,
    prepare_output,
    read_image_for,
    read_picture,
    save_numbered,
    seed_number,
    show_image,
    two_seeds,
)


if TYPE_CHECKING:
    import numpy as np
    from diffusers import DiffusionPipeline
    from PIL import Image


NUM_IMAGES, MAX_CLASSES, PER_PICTURE = 64, 10, 4  # that `sample` draws by default
FRAME_SIDE = 256  # pixels that the longer side of an animation's frames is enlarged toward


# ------------------------------------------------------------------------------------------------------------ sample


def sample_parser() -> argparse.ArgumentParser:
    parser = make_parser("sample")
    add_plan_arguments(parser)
    add_show_channels(parser)
    parser.add_argument(
        "--return_intermediates",
        type=positive_number,
        metavar="K",
        help="also show K states of the denoising: one row for each image, from noise to the image",
    )
    add_output_argument(
        parser,
        "samples.png",
        "one picture of all images, or numbered files in a folder: PNGs, or .npy (H, W, C) of images that no picture "
        "holds, unless --show_channels is given",
    )
    return parser


def add_plan_arguments(parser: argparse.ArgumentParser, num_images: int | None = None) -> None:
    """Adds the arguments of [`plan_samples`]."""
    add_checkpoint_argument(parser)
    add_sampling_arguments(parser)
    parser.add_argument(
        "--num_images",
        type=positive_number,
        default=num_images,
        help=f"default: {num_images or f'{NUM_IMAGES}, or a row for each class if no class is named'}",
    )
    parser.add_argument("--seed", type=seed_number, default=0, help="image i has the seed SEED + i (default: 0)")
    parser.add_argument("--batch_size", type=positive_number, default=64, help="images at a time (default: 64)")
    parser.add_argument(
        "--class_labels",
        type=comma_separated,
        help="names or ids, such as cat,frog: each gets an equal share of the images, in this order (default: all, or the "
        f"first {MAX_CLASSES})",
    )
    add_condition_argument(
        parser,
        "several values, such as age=20,40,60, get an equal share of the images each (default: a range of values of "
        "the first condition)",
    )
    parser.add_argument(
        "--image",
        type=Path,
        metavar="PATH",
        help="a conditioning image, or a folder of them: each gets an equal share of the images; without --num_images, "
        f"{PER_PICTURE} images each, or with classes the same number for each class, {PER_PICTURE} or more",
    )
    parser.add_argument(
        "--degrade", action="store_true", help="--image is a whole picture: make the conditioning image from it"
    )
    add_guidance_interval(parser)
    add_dynamic_thresholding(parser)
    add_temperature(parser)
    add_truncation(parser)


def sample(args: argparse.Namespace) -> None:
    """Draws each image with a generator of its own, so that none depends on the batch size."""
    output = prepare_output(args.output)
    if args.degrade and args.image is None:
        raise UserError("--degrade is for the picture of --image: give one, or leave it out.")
    if args.return_intermediates and output.is_dir():
        raise UserError("--return_intermediates makes one picture of all states: give --output NAME.png.")
    pipe = load_pipeline(args)
    plan = plan_samples(pipe, args)
    options = call_options(pipe.__call__, pipe, args, "return_intermediates")
    options |= {"output_type": "np"} if output.is_dir() and not are_pictures(pipe) else {}
    check_numbered(output, plan.num_images)

    say(f"drawing {plan.num_images} images, {output} ...", sys.stderr)
    began = time.perf_counter()
    images, states = draw_plan(pipe, plan, args, **options)
    seconds = time.perf_counter() - began

    if output.is_dir():
        save_numbered(images, output)
    else:
        plan.picture(images, states).save(output)
    say(f"{len(images)} images in {seconds:.1f} s, {len(images) / seconds:.1f} a second: {output}")


class SamplePlan(NamedTuple):
    """
    Samples to be drawn: the options of the pipeline's call, the class of each image, the text of its class and conditions,
    and the conditioning images, of which each has an equal share of the images, as given and as shown.
    """

    num_images: int
    options: dict
    labels: list[str] | None
    texts: list[str] | None
    pictures: "list[Image.Image] | list[np.ndarray] | None"
    shown: "list[Image.Image] | None"

    def picture(self, images: "list[Image.Image]", states: "Sequence[list[Image.Image]]" = ()) -> "Image.Image":
        """Draws all images in one picture: beside their states or conditioning images, or a row for each class."""
        from ..plots import image_grid, strip

        if states:
            return strip([*states, images], row_labels=self.texts)
        if self.shown is not None:
            return _picture_rows(self.shown, images)
        return image_grid(images, **_class_rows(self.texts))


def plan_samples(pipe: "DiffusionPipeline", args: argparse.Namespace) -> SamplePlan:
    """Resolves the flags of `sample` that are left open, and refuses those that the pipeline has no use for."""
    names = ("num_inference_steps", "eta", "clip_sample", "class_labels", "guidance_scale", "guidance_interval")
    names += ("dynamic_thresholding", "temperature", "truncation")
    options = call_options(pipe.__call__, pipe, args, *names)
    labels = options.pop("class_labels", None)
    if args.image is None and args.guidance_scale != 0:
        check_unconditioned(pipe, args.checkpoint, "give --image, or --guidance_scale 0 for samples without it")
    pictures = None if args.image is None else _conditioning_images(pipe, args)
    # with --num_images, no more kinds of what is drawn by default than images
    most = args.num_images and args.num_images // len(pictures or [None])
    rows, texts = conditions_to_draw(pipe, args, most and max(1, most // len(labels or [None])))
    if pictures is None and labels is None:
        labels = default_classes(pipe, args.guidance_scale)[: most and max(1, most // len(rows or [None]))]
    # each combination of conditions and classes: (its text, label, conditions)
    kinds = [
        (", ".join(part for part in (text, label) if part), label, row)
        for row, text in zip(rows or [None], texts or [None], strict=True)
        for label in labels or [None]
    ]
    num_images, kinds = _share_out(kinds, args, bool(rows), pictures)
    texts, labels, conditions = (list(column) for column in zip(*kinds, strict=True))
    if rows:
        options["conditions"] = conditions
    return SamplePlan(
        num_images,
        options,
        labels if labels[0] is not None else None,
        texts if any(texts) else None,
        pictures,
        None if pictures is None else [show_image(pipe, picture) for picture in pictures],
    )


def draw_plan(
    pipe: "DiffusionPipeline", plan: SamplePlan, args: argparse.Namespace, **options
) -> "tuple[list[Image.Image], list[list[Image.Image]]]":
    """Draws planned samples, as [`draw_images`], with further options of the pipeline's call."""
    given = None if plan.pictures is None else spread(plan.pictures, plan.num_images)
    options = plan.options | options
    return draw_images(pipe, plan.num_images, args.seed, args.batch_size, plan.labels, given, **options)


def _share_out(
    kinds: list[tuple], args: argparse.Namespace, has_conditions: bool, pictures: "list[Image.Image] | None"
) -> tuple[int, list[tuple]]:
    """Returns the number of images, and the kind of each: all kinds, and all pictures, have equal shares."""
    num_images, num_kinds = args.num_images, len(kinds)
    flags = " and ".join(f"--{name}" for name in ("class_labels", "condition") if getattr(args, name) is not None)
    if pictures is None:
        are_defaults = args.class_labels is None and kinds[0][1] is not None
        if num_images is None and (has_conditions or are_defaults):
            num_images = num_kinds * max(1, min(NUM_IMAGES // num_kinds, MAX_ROW))
        num_images = num_images or NUM_IMAGES
        check_enough_images(num_images, kinds, flags)
        return num_images, spread(kinds, num_images)
    num_images = num_images or len(pictures) * num_kinds * math.ceil(PER_PICTURE / num_kinds)
    if num_images % len(pictures):
        raise UserError(f"--num_images {num_images} is no multiple of the {len(pictures)} pictures of --image.")
    each = num_images // len(pictures)
    if each % num_kinds and flags:
        raise UserError(
            f"--num_images {num_images}: each of the {len(pictures)} pictures of --image has {each} images, which is no "
            f"multiple of the {num_kinds} of {flags}."
        )
    return num_images, spread(kinds, each) * len(pictures)


def _conditioning_images(
    pipe: "DiffusionPipeline", args: argparse.Namespace
) -> "list[Image.Image] | list[np.ndarray]":
    """Returns the conditioning images that --image and --degrade stand for."""
    if pipe.config.get("conditioning") is None:
        raise UserError(
            f"--image: '{args.checkpoint}' takes no image as a condition: leave it out, or change the picture by "
            "`tiny-diffusers edit`."
        )
    files = find_pictures(args.image).values()
    if args.degrade:
        with refusals():
            observed = [pipe.observe(read_image_for(pipe, "--image", file)) for file in files]
            return [image for each in observed for image in pipe._to_images(2 * each - 1, "np")]
    conditioning = pipe._conditioning
    channels = conditioning.shape[0]
    value_range = pipe._value_range if conditioning.is_made else None
    # Gray and color are not converted to each other: the pipeline says which of them it needs.
    return [read_picture("--image", file, None if channels in (1, 3) else channels, value_range) for file in files]


def _picture_rows(pictures: list["Image.Image"], images: list["Image.Image"]) -> "Image.Image":
    """Draws a row for each conditioning image: itself, enlarged to the height of the images, and what was drawn from it."""
    from PIL import Image

    from ..plots import image_grid, pad_to_one_size

    each, height = len(images) // len(pictures), images[0].height
    sizes = [(picture.width * height // picture.height, height) for picture in pictures]
    given = [picture.resize(size, Image.Resampling.NEAREST) for picture, size in zip(pictures, sizes, strict=True)]
    rows = [image for i, first in enumerate(given) for image in (first, *images[i * each : (i + 1) * each])]
    return image_grid(pad_to_one_size(rows), columns=each + 1, column_labels=["given", *[""] * each])


def draw_images(
    pipe: "DiffusionPipeline",
    num_images: int,
    seed: int,
    batch_size: int,
    labels: list[str] | None,
    pictures: "list[Image.Image] | None" = None,
    conditions: list[dict[str, float]] | None = None,
    **options,
) -> "tuple[list[Image.Image], list[list[Image.Image]]]":
    """
    Draws images, image i with the seed `seed + i` and the i-th of the labels, of the conditioning pictures and of the
    conditions, and, if the options ask for them, the states of their denoising. With the option `output_type="np"` the
    images are arrays.
    """
    from ..pipelines.pipeline_tiny import image_generators
    from ..progress import bar_options

    images, states = [], []
    of_images = {"class_labels": labels, "image": pictures, "conditions": conditions}
    of_images = {name: values for name, values in of_images.items() if values is not None}
    for start in range(0, num_images, batch_size):
        stop = min(start + batch_size, num_images)
        pipe.set_progress_bar_config(desc=f"images {start + 1} to {stop} of {num_images}", **bar_options())
        options |= {name: values[start:stop] for name, values in of_images.items()}
        generator = image_generators(seed, stop - start, first=start)
        with refusals():
            drawn = pipe(batch_size=stop - start, generator=generator, **options)
        images.extend(drawn.images)
        intermediates = getattr(drawn, "intermediates", None) or []
        states = states or [[] for _ in intermediates]
        for state, intermediate in zip(states, intermediates, strict=True):
            state += intermediate.sample
    return images, states


def check_unconditioned(pipe: "DiffusionPipeline", checkpoint: str, remedy: str) -> None:
    """Refuses a network that takes an image as a condition, where none is given."""
    if pipe.config.get("conditioning") is not None:
        raise UserError(f"'{checkpoint}' needs an image as a condition: {remedy}.")


def check_enough_images(num_images: int, kinds: list, flags: str = "--class_labels") -> None:
    """Refuses fewer images than classes, or combinations of conditions, of which some would be left out."""
    if len(kinds) > num_images:
        raise UserError(f"--num_images {num_images} is less than the {len(kinds)} of {flags}: give more.")


def spread(values: list, num_images: int) -> list:
    """Gives each value an equal share of the images, in their order."""
    return [values[i * len(values) // num_images] for i in range(num_images)]


def default_classes(pipe: "DiffusionPipeline", guidance_scale: float | None) -> list[str]:
    """Returns the classes that are drawn if none is named: the first ones; none without classes or class guidance."""
    has_classes = bool(getattr(pipe, "_class_ids", None)) and guidance_scale != 0
    return _first_classes(pipe) if has_classes else []


def _first_classes(pipe: "DiffusionPipeline") -> list[str]:
    """Returns the names of a pipeline's classes, or their ids; of many, the first ten, which is said."""
    names = {int(class_id): name for class_id, name in (pipe.config.get("id2label") or {}).items()}
    classes = [names.get(class_id, str(class_id)) for class_id in pipe._class_ids]
    if len(classes) > MAX_CLASSES:
        say(f"the first {MAX_CLASSES} of {len(classes)} classes; --class_labels names others", sys.stderr)
    return classes[:MAX_CLASSES]


def _class_rows(labels: list[str] | None) -> dict:
    """Returns the columns and row labels of a grid in which each row is of one kind; empty if there is none."""
    if labels is None:
        return {}
    per_class = labels.count(labels[0])
    columns = next((n for n in range(min(per_class, MAX_ROW), 1, -1) if per_class % n == 0), None)
    rows = [set(labels[i : i + columns]) for i in range(0, len(labels), columns)] if columns else []
    if not rows or any(len(row) > 1 for row in rows):
        return {}
    return {"columns": columns, "row_labels": [row.pop() for row in rows]}


# ------------------------------------------------------------------------------------------------------- interpolate


def interpolate_parser() -> argparse.ArgumentParser:
    parser = make_parser("interpolate")
    add_checkpoint_argument(parser)
    add_sampling_arguments(parser)
    add_show_channels(parser)
    parser.add_argument("--seeds", type=two_seeds, help="seeds of the two ends (default: 0,1)")
    parser.add_argument(
        "--seed",
        type=seed_number,
        default=0,
        help="seed of the noise that a scheduler such as ddpm adds, the same in each frame (default: 0)",
    )
    parser.add_argument(
        "--images",
        type=Path,
        nargs=2,
        metavar="FILE",
        help="two pictures or .npy files to interpolate between, instead of seeds",
    )
    parser.add_argument("--interpolation", help="slerp, or linear, whose middle frames are smoother (default: slerp)")
    parser.add_argument("--num_frames", type=int, default=16, help="images, both ends included (default: 16)")
    parser.add_argument(
        "--class_labels", type=comma_separated, help="a name or id for all frames, or one for each end: cat,frog"
    )
    add_condition_argument(parser, "of them; a value for all frames, or one for each end: age=20,60")
    add_guidance_interval(parser)
    add_output_argument(
        parser,
        "interpolation.gif",
        "an animation (.gif), one picture of all frames, or numbered files in a folder, as `sample` saves them",
    )
    return parser


def interpolate(args: argparse.Namespace) -> None:
    from ..plots import image_grid

    output = prepare_output(args.output)
    check_numbered(output, args.num_frames)
    pipe = load_pipeline(args)
    if args.images is not None:
        args.images = [read_image_for(pipe, "--images", file) for file in args.images]
    options = {"output_type": "np"} if output.is_dir() and not are_pictures(pipe) else {}
    frames = draw_frames(pipe, args, **options)
    if output.is_dir():
        save_numbered(frames, output)
    elif output.suffix.lower() == ".gif":
        save_animation(frames, output)
    else:
        image_grid(frames, columns=min(len(frames), MAX_ROW)).save(output)
    say(f"{len(frames)} frames: {output}")


def draw_frames(pipe: "DiffusionPipeline", args: argparse.Namespace, **further) -> "list[Image.Image]":
    """Draws the frames of an interpolation, with further options of the call."""
    import torch

    walk = interpolation_of(pipe, args.checkpoint)
    names = (
        "num_inference_steps",
        "eta",
        "clip_sample",
        "class_labels",
        "guidance_scale",
        "guidance_interval",
        "interpolation",
    )
    options = call_options(walk, pipe, args, *names, "seeds", "images")
    options |= condition_options(walk, pipe, args, 2) | further
    if args.seeds is None and args.images is None:
        options["seeds"] = (0, 1)
    if "generator" in inspect.signature(walk).parameters:  # of a scheduler that draws noise in its steps
        options["generator"] = [torch.Generator().manual_seed(args.seed) for _ in range(args.num_frames)]
    with refusals():
        return walk(num_frames=args.num_frames, **options).images


def save_animation(frames: "list[Image.Image]", output: Path) -> None:
    """Saves frames as a GIF, enlarged without smoothing."""
    from diffusers.utils import export_to_gif
    from PIL import Image

    width, height = frames[0].size
    scale = max(1, FRAME_SIDE // max(width, height))
    frames = [frame.resize((width * scale, height * scale), Image.Resampling.NEAREST) for frame in frames]
    export_to_gif(frames, str(output))


def interpolation_of(pipe: "DiffusionPipeline", checkpoint: str) -> Callable:
    """Returns what interpolates with a pipeline's networks: its own method, or the pipeline for diffusion."""
    from .. import TinyInterpolationPipeline
    from ..progress import bar_options

    if hasattr(pipe, "interpolate"):  # on the latents of a VAE or GAN
        return pipe.interpolate
    if "unet" not in pipe.components:
        raise UserError(
            f"'{checkpoint}' is a {type(pipe).__name__}, which has no latents to interpolate between: give a checkpoint "
            "of diffusion, a VAE or a DCGAN."
        )
    with refusals():
        pipe = TinyInterpolationPipeline.from_pipe(pipe)
    pipe.set_progress_bar_config(desc="interpolating", leave=False, **bar_options())
    return pipe
