"""`tiny-diffusers edit`."""

import argparse
import math
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError, refusals, say, unknown
from .conditions import add_condition_argument, condition_options, given_conditions
from .shared import (
    add_checkpoint_argument,
    add_guidance_interval,
    add_output_argument,
    add_sampling_arguments,
    add_show_channels,
    are_pictures,
    call_options,
    check_diffusion,
    find_pictures,
    load_pipeline,
    make_parser,
    positive_number,
    prepare_output,
    read_image_for,
    read_picture,
    save_images,
    seed_number,
    show_image,
)


if TYPE_CHECKING:
    import numpy as np
    import torch
    from diffusers import DiffusionPipeline
    from PIL import Image


MAX_ROWS = 64  # images of a folder in one picture
_OF_SOURCE = ("source_class_labels", "source_condition")  # of the given pictures, for their inversion


def edit_parser() -> argparse.ArgumentParser:
    parser = make_parser("edit")
    add_checkpoint_argument(parser)
    parser.add_argument(
        "--image", required=True, type=Path, metavar="PATH", help="a picture or .npy file, or a folder of them"
    )
    parser.add_argument(
        "--strength",
        type=float,
        help="variations: how much of the image is given up, from 0 to 1 (default without --mask and --task: 0.6)",
    )
    parser.add_argument(
        "--inversion",
        action="store_true",
        help="variations: invert the image instead of adding noise, to keep its layout under another class",
    )
    parser.add_argument(
        "--mask", type=Path, metavar="FILE", help="inpainting: a picture whose white pixels are filled in"
    )
    parser.add_argument(
        "--task",
        metavar="TASK",
        help="restoration: inpaint (with --mask), super_resolution:FACTOR, colorize, or deblur:SIGMA, a Gaussian blur of "
        "SIGMA pixels; the picture is what is observed",
    )
    parser.add_argument(
        "--degrade",
        action="store_true",
        help="restoration: the picture is whole: apply the operator of --task to it first",
    )
    parser.add_argument("--method", choices=("ddnm", "pigdm"), help="restoration: method (default: ddnm)")
    parser.add_argument(
        "--noise_std",
        type=float,
        help="restoration: standard deviation of the noise in the picture, on the scale of images in [-1, 1] "
        "(default: 0)",
    )
    parser.add_argument(
        "--jump_length", type=positive_number, help="inpainting, restoration: number of steps to jump back"
    )
    parser.add_argument(
        "--jump_n_sample",
        type=positive_number,
        help="inpainting, restoration: number of times that each step is taken",
    )
    parser.add_argument(
        "--num_images",
        type=positive_number,
        help="results for each picture (default: 4; 1 with --inversion, whose results are all the same without --eta)",
    )
    parser.add_argument("--class_labels", help="the class of all results, a name or id")
    add_condition_argument(parser, "one value for all results")
    parser.add_argument(
        "--source_class_labels",
        help="with --inversion: the class of the pictures (default: none)",
    )
    add_condition_argument(parser, "with --inversion: its value in the pictures (default: none)", "source_condition")
    add_guidance_interval(parser)
    add_sampling_arguments(parser)
    add_show_channels(parser)
    parser.add_argument("--seed", type=seed_number, default=0, help="result i has the seed SEED + i (default: 0)")
    parser.add_argument("--batch_size", type=positive_number, default=64, help="results at a time (default: 64)")
    add_output_argument(
        parser,
        "edited.png",
        "one picture, a row for each given one: as given, its mask or what is observed of it, the results, their mean and "
        "standard deviation; or the results alone, in a folder, as `sample` saves them",
    )
    return parser


def edit(args: argparse.Namespace) -> None:
    check_edit_flags(args)
    if args.num_images is None:
        args.num_images = 1 if args.inversion and not args.eta else 4
    pictures = find_pictures(args.image)
    output = prepare_output(args.output)
    if not output.is_dir() and len(pictures) > MAX_ROWS:
        raise UserError(f"'{args.image}' has {len(pictures)} pictures, too many for one: give a folder as --output.")
    pipe = editing_pipeline(load_pipeline(args), args)
    suffix = ".png" if are_pictures(pipe) else ".npy"
    names = _result_names(pictures, args.num_images, suffix)
    targets = [output / name for name in names] if output.is_dir() else [output]
    sources = [*pictures.values(), *([args.mask] if args.mask is not None else [])]
    for target in targets:
        if target.exists() and any(source.exists() and target.samefile(source) for source in sources):
            raise UserError(f"--output: '{target}' is one of the given pictures: give another place.")
    pictures = {name: _read(pipe, file, args) for name, file in pictures.items()}
    options = edit_options(pipe, args)
    if pipe._image_shape[0] == 3 and any(getattr(picture, "mode", None) == "L" for picture in pictures.values()):
        if not (args.task == "colorize" and not args.degrade):
            say("gray pictures are converted to RGB, as the network draws in color", sys.stderr)

    say(f"drawing {len(pictures) * args.num_images} images, {output} ...", sys.stderr)
    began = time.perf_counter()
    rows = edit_pictures(pipe, list(pictures.values()), args, **options)
    seconds = time.perf_counter() - began

    if output.is_dir():
        kind = "results" if are_pictures(pipe) else "arrays"
        save_images([image for row in rows for image in row[kind]], targets)
    else:
        edited_picture(rows).save(output)
    say(f"{len(pictures) * args.num_images} images in {seconds:.1f} s: {output}")


def edit_options(pipe: "DiffusionPipeline", args: argparse.Namespace) -> dict:
    """Returns the options of an editing pipeline's call that the flags stand for."""
    names = ("num_inference_steps", "eta", "clip_sample", "class_labels", "guidance_scale", "guidance_interval")
    names += ("strength", "source_class_labels", "method", "noise_std", "jump_length", "jump_n_sample")
    options = call_options(pipe.__call__, pipe, args, *names) | _task_options(args)
    options |= condition_options(pipe.__call__, pipe, args, 1)
    options |= given_conditions("source_condition", pipe.__call__, pipe, args, 1)
    return options | ({"inversion": True} if args.inversion else {})


def edit_pictures(
    pipe: "DiffusionPipeline", pictures: "list[Image.Image] | list[np.ndarray]", args: argparse.Namespace, **options
) -> list[dict]:
    """
    Edits images, a row for each: as given, its mask or what is observed of it, the results, also as arrays if no picture
    holds them, their mean and deviation.
    """
    from ..pipelines.pipeline_tiny import image_generators
    from ..progress import bar_options

    rows, at_once = [], max(1, args.batch_size // args.num_images)
    for start in range(0, len(pictures), at_once):
        part = pictures[start : start + at_once]
        pipe.set_progress_bar_config(desc=f"pictures {start + 1} to {start + len(part)}", **bar_options())
        with refusals():
            observed = _observe(pipe, part, args, options, start, len(pictures)) if args.degrade else part
            num_results = len(part) * args.num_images
            generator = image_generators(args.seed, num_results, first=start * args.num_images)
            results = pipe(observed, num_images=args.num_images, generator=generator, output_type="pt", **options)[0]
            rows += _rows(pipe, part, observed, results.cpu(), args, options.get("mask_image"))
    return rows


def edited_picture(rows: list[dict]) -> "Image.Image":
    """Draws the rows of [`edit_pictures`]."""
    from ..plots import image_grid, pad_to_one_size

    columns = ["given"] + [name for name in ("mask", "observed") if name in rows[0]]
    labels = columns + [str(i + 1) for i in range(len(rows[0]["results"]))]
    statistics = [name for name in ("mean", "2 std") if name in rows[0]]
    images = [
        image
        for row in rows
        for image in (*(row[name] for name in columns), *row["results"], *(row[name] for name in statistics))
    ]
    return image_grid(pad_to_one_size(images), columns=len(labels + statistics), column_labels=labels + statistics)


def _read(pipe: "DiffusionPipeline", path: Path, args: argparse.Namespace) -> "Image.Image | np.ndarray":
    """Reads an image of the pipeline or, for a restoration, what is observed of one, which may be smaller or gray."""
    if args.task is None or args.degrade:
        return read_image_for(pipe, "--image", path)
    channels = 1 if args.task == "colorize" else pipe._image_shape[0]
    return read_picture("--image", path, channels, pipe._value_range)


def check_edit_flags(args: argparse.Namespace) -> None:
    """Refuses flags that do not go together: each of the three kinds of edit has its own."""
    if args.task is not None:
        kind, allowed = "--task", {"mask", "method", "noise_std", "degrade", "jump_length", "jump_n_sample"}
    elif args.mask is not None:
        kind, allowed = "--mask", {"jump_length", "jump_n_sample"}
    else:
        kind, allowed = "variations (no --mask, no --task)", {"strength", "inversion", *_OF_SOURCE}
    every = ("strength", "inversion", *_OF_SOURCE, "method", "noise_std", "degrade", "jump_length", "jump_n_sample")
    for name in every:
        given = getattr(args, name)
        if given is not None and given is not False and name not in allowed:
            raise UserError(f"--{name} means nothing with {kind}: leave it out.")
    for name in _OF_SOURCE:
        if getattr(args, name) is not None and not args.inversion:
            raise UserError(f"--{name} is for the inversion: give --inversion, or leave it out.")
    if args.task is not None and (args.mask is not None) != (args.task.partition(":")[0] == "inpaint"):
        raise UserError("--task inpaint takes a --mask, and the other tasks take none.")


def _result_names(pictures: Iterable[str], num_images: int, suffix: str) -> list[str]:
    """Returns the file names of the results, `num_images` for each picture's name."""
    if num_images == 1:
        return [f"{name}{suffix}" for name in pictures]
    digits = len(str(num_images - 1))
    return [f"{name}-{i:0{digits}}{suffix}" for name in pictures for i in range(num_images)]


def editing_pipeline(pipe: "DiffusionPipeline", args: argparse.Namespace) -> "DiffusionPipeline":
    from .. import TinyImg2ImgPipeline, TinyInpaintPipeline, TinyRestorationPipeline

    check_diffusion(pipe, args.checkpoint, "edit images here")
    editing = TinyInpaintPipeline if args.mask is not None else TinyImg2ImgPipeline
    with refusals():
        return (editing if args.task is None else TinyRestorationPipeline).from_pipe(pipe)


def _task_options(args: argparse.Namespace) -> dict:
    """Returns the arguments of the pipeline that --mask and --task stand for."""
    from ..pipelines.pipeline_tiny_restoration import TASKS

    options = {} if args.mask is None else {"mask_image": read_picture("--mask", args.mask)}
    if args.task is None:
        return options
    name, _, value = args.task.partition(":")
    if name not in TASKS:
        raise unknown("--task", name, TASKS)
    options["operator"] = name
    if name in ("inpaint", "colorize"):
        if value:
            raise UserError(f"--task {name} takes no number, got {args.task}.")
        return options
    kind, example = (int, "super_resolution:2") if name == "super_resolution" else (float, "deblur:1.5")
    try:
        number = kind(value)
    except ValueError:
        raise UserError(f"--task {args.task}: give a number, such as {example}.") from None
    return options | ({"factor": number} if kind is int else {"kernel": _gaussian_kernel(number)})


def _gaussian_kernel(sigma: float) -> "torch.Tensor":
    """Returns the kernel of a Gaussian blur, cut off at three standard deviations: (h, h), of the sum 1."""
    import torch

    if not 0.1 <= sigma <= 100:
        raise UserError(f"--task deblur:{sigma:g}: the standard deviation must be from 0.1 to 100 pixels.")
    radius = math.ceil(3 * sigma)
    line = torch.exp(-torch.arange(-radius, radius + 1).square() / (2 * sigma**2))
    kernel = torch.outer(line, line)
    return kernel / kernel.sum()


def _observe(
    pipe: "DiffusionPipeline",
    pictures: list["Image.Image"],
    args: argparse.Namespace,
    options: dict,
    start: int,
    num_given: int,
) -> "torch.Tensor":
    """Computes what is observed of some of the pictures, from the one at `start` on, with noise of seeds of its own."""
    from ..pipelines.pipeline_tiny import image_generators

    names = ("operator", "mask_image", "factor", "kernel", "noise_std")
    known = {name: options[name] for name in names if name in options}
    generator = image_generators(args.seed + num_given * args.num_images, len(pictures), first=start)
    return pipe.observe(pictures, generator=generator, **known)


def _rows(
    pipe: "DiffusionPipeline",
    pictures: list["Image.Image"],
    observed: "list[Image.Image] | torch.Tensor",
    results: "torch.Tensor",
    args: argparse.Namespace,
    mask: "Image.Image | None",
) -> list[dict]:
    """Returns what is shown of each given picture, in the network's size and mode."""
    from PIL import Image

    _, height, width = pipe._image_shape

    def shown(image: "Image.Image | np.ndarray") -> "Image.Image":
        picture = show_image(pipe, image)
        given_width = image.shape[1] if hasattr(image, "shape") else image.width
        resampling = Image.Resampling.LANCZOS if given_width > width else Image.Resampling.NEAREST
        return picture.resize((width * picture.width // given_width, height), resampling)

    def to_pil(images: "torch.Tensor") -> list["Image.Image"]:
        return pipe._to_images(2 * images - 1, "pil")

    rows = [{"given": shown(picture), "results": []} for picture in pictures]
    per_picture = results.unflatten(0, (len(pictures), args.num_images))
    for row, images in zip(rows, per_picture, strict=True):
        row["results"] = to_pil(images)
        if not are_pictures(pipe):
            row["arrays"] = list(pipe._to_images(2 * images - 1, "np"))
    if mask is not None:
        for row in rows:
            row["mask"] = shown(mask)
    elif args.degrade:
        for row, image in zip(rows, pipe._to_images(2 * observed.cpu() - 1, "np"), strict=True):
            row["observed"] = shown(image)
    if args.num_images > 1:
        mean, std = per_picture.mean(dim=1), per_picture.std(dim=1, correction=0)
        for row, *statistics in zip(rows, to_pil(mean), to_pil(2 * std), strict=True):
            row["mean"], row["2 std"] = statistics
    return rows
