"""`tiny-diffusers plot samples`, `epochs`, `interpolation` and `guidance`: pictures of what checkpoints draw."""

import argparse
import contextlib
import inspect
import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError, refusals, say
from .conditions import add_condition_argument, condition_options
from .sampling import (
    check_enough_images,
    check_unconditioned,
    default_classes,
    draw_images,
    interpolation_of,
    spread,
)
from .shared import (
    CHECKPOINT_HELP,
    add_checkpoint_argument,
    add_guidance_interval,
    add_picture_output,
    add_sampling_arguments,
    add_temperature,
    call_options,
    check_diffusion,
    checkpoint_name,
    comma_separated,
    finite_numbers,
    load_pipeline,
    make_parser,
    names_that_differ,
    positive_number,
    prepare_picture,
    read_picture,
    seed_number,
    two_seeds,
)


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin
    from PIL import Image

    from ..plots import Strip


GRID_SIDE = 256  # pixels that the longer side of a sample grid is reduced to
GRIDS_PER_ROW = 4


# -------------------------------------------------------------------------------------------------------------- samples


def samples_parser() -> argparse.ArgumentParser:
    parser = make_parser("plot samples", "Draws samples of several checkpoints, a row each, from the same seeds.")
    parser.add_argument("checkpoints", metavar="CHECKPOINT", type=checkpoint_name, nargs="+", help=CHECKPOINT_HELP)
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run the checkpoints' own code; read it first"
    )
    parser.add_argument("--num_images", type=positive_number, default=10, help="images of each (default: 10)")
    parser.add_argument("--seed", type=seed_number, default=0, help="image i has the seed SEED + i (default: 0)")
    parser.add_argument("--batch_size", type=positive_number, default=64, help="images at a time (default: 64)")
    parser.add_argument(
        "--class_labels", type=comma_separated, help="names or ids, such as cat,frog (default: the first ones)"
    )
    add_condition_argument(parser)
    add_sampling_arguments(parser)
    add_temperature(parser)
    add_picture_output(parser, "samples_compared.png")
    return parser


def samples(args: argparse.Namespace) -> None:
    from ..plots import captioned_strips

    prepare_picture(args.output)
    check_enough_images(args.num_images, args.class_labels or [])
    pipes = [load_pipeline(own) for own in _each_checkpoint(args)]
    captioned_strips(samples_strips(pipes, args)).save(args.output)
    say(f"wrote {args.output}")


def _each_checkpoint(args: argparse.Namespace) -> list[argparse.Namespace]:
    return [argparse.Namespace(**vars(args) | {"checkpoint": checkpoint}) for checkpoint in args.checkpoints]


def samples_strips(
    pipes: "list[DiffusionPipeline]", args: argparse.Namespace, further: list[dict] | None = None
) -> "list[Strip]":
    """
    Draws a row for each pipeline, with further options of its call. A flag applies to each checkpoint whose pipeline has
    the option, and at least one must.
    """
    from ..plots import Strip

    options = ("num_inference_steps", "eta", "clip_sample", "guidance_scale", "temperature", "class_labels")
    if args.guidance_scale != 0:
        for checkpoint, pipe in zip(args.checkpoints, pipes, strict=True):
            remedy = "use `tiny-diffusers sample --image`, or give --guidance_scale 0"
            check_unconditioned(pipe, checkpoint, remedy)
    known = [[name for name in options if name in inspect.signature(pipe.__call__).parameters] for pipe in pipes]
    for name in options:
        if getattr(args, name) is not None and not any(name in names for names in known):
            raise UserError(f"--{name} means nothing to any of these checkpoints: leave it out.")
    takes_conditions = [getattr(pipe, "_condition_statistics", None) is not None for pipe in pipes]
    if args.condition is not None and not any(takes_conditions):
        raise UserError("--condition means nothing to any of these checkpoints: leave it out.")
    each_args = _each_checkpoint(args)
    for own, names in zip(each_args, known, strict=True):
        own.guidance_scale = args.guidance_scale if "guidance_scale" in names else None  # 0 draws without conditions
    conditions = [
        condition_options(pipe.__call__, pipe, own, 1).get("conditions") if takes_some else None
        for own, pipe, takes_some in zip(each_args, pipes, takes_conditions, strict=True)
    ]
    sizes = ["x".join(map(str, pipe._image_shape[1:])) for pipe in pipes]
    for checkpoint, size in zip(args.checkpoints, sizes, strict=True):
        if size != sizes[0]:
            raise UserError(
                f"'{args.checkpoints[0]}' draws {sizes[0]} pixels and '{checkpoint}' {size}: give checkpoints of one size."
            )

    strips, labels = [], []
    names_of_rows, further = names_that_differ(args.checkpoints), further or [{}] * len(pipes)
    rows = zip(_each_checkpoint(args), pipes, known, conditions, names_of_rows, further, strict=True)
    for own, pipe, names, values, label, more in rows:
        given = call_options(pipe.__call__, pipe, own, *names) | more
        classes = given.pop("class_labels", None) or default_classes(pipe, args.guidance_scale)[: args.num_images]
        labels.append(spread(classes, args.num_images) if classes else None)
        if values is not None:
            given["conditions"] = [{name: numbers[0] for name, numbers in values.items()}] * args.num_images
        images, _ = draw_images(pipe, args.num_images, args.seed, args.batch_size, labels[-1], **given)
        strips.append(Strip(images, label=label))
    for strip, classes, following in zip(strips, labels, [*labels[1:], None], strict=True):
        if classes is not None and classes != following:  # rows of the same classes share their captions
            strip.captions = classes
    return strips


# --------------------------------------------------------------------------------------------------------------- epochs


def epochs_parser() -> argparse.ArgumentParser:
    parser = make_parser("plot epochs", "Draws the sample grids of a run over its training, from the same seeds.")
    parser.add_argument("run", metavar="RUN", type=Path, help="output folder of a train script")
    parser.add_argument("--num_grids", type=positive_number, default=8, help="evenly spaced grids (default: 8)")
    add_picture_output(parser, "epochs.png")
    return parser


def epochs(args: argparse.Namespace) -> None:
    import numpy as np

    from ..plots import Strip, captioned_strips, read_log
    from ..runs import RunFolder

    prepare_picture(args.output)
    run = RunFolder(args.run)
    grids = run.list_grids()
    if not grids:
        raise UserError(
            f"'{args.run}' has no sample grids in {run.grid(0).parent.name}/: give the folder of a run that has drawn some "
            "(--save_images_epochs, --save_images_steps)."
        )
    series = read_log(run.log) if run.log.is_file() else {}
    steps, values = series.get("epoch", (np.array([]), np.array([])))
    grids = {run.grid_step(grid): grid for grid in grids}
    if run.samples.is_file() and len(steps):  # those of the end, which are drawn with more steps
        last = list(grids.values())[-1]
        if _thumbnail(run.samples).size == _thumbnail(last).size:  # they may be more images
            grids.setdefault(int(steps[-1]), run.samples)
    chosen = np.unique(np.linspace(len(grids) - 1, 0, min(args.num_grids, len(grids))).round().astype(int))
    captions, pictures = [], []
    for step, grid in (list(grids.items())[i] for i in chosen):
        is_logged = len(steps) > 0 and steps[0] <= step <= steps[-1]
        captions.append(f"step {step:,}" + (f", epoch {np.interp(step, steps, values):.3g}" if is_logged else ""))
        pictures.append(_thumbnail(grid))
    if len({picture.size for picture in pictures}) > 1:
        raise UserError(f"The sample grids of '{args.run}' are of several sizes: they are not of one run.")
    strips = [
        Strip(pictures[start : start + GRIDS_PER_ROW], captions[start : start + GRIDS_PER_ROW])
        for start in range(0, len(pictures), GRIDS_PER_ROW)
    ]
    captioned_strips(strips, padding=6).save(args.output)
    say(f"wrote {args.output}")


def _thumbnail(path: Path) -> "Image.Image":
    from PIL import Image

    picture = read_picture("RUN", path)
    picture.thumbnail((GRID_SIDE, GRID_SIDE), Image.Resampling.BOX)
    return picture


# -------------------------------------------------------------------------------------------------------- interpolation


def interpolation_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "plot interpolation",
        "Draws the images between two seeds: without noise in the steps, by DDIM or the ODE of flow and EDM, and below it "
        "with fresh noise in each, by DDPM, which loses the path. A VAE or a DCGAN has one row.",
    )
    add_checkpoint_argument(parser)
    parser.add_argument("--seeds", type=two_seeds, default=(0, 1), help="seeds of the two ends (default: 0,1)")
    parser.add_argument("--num_frames", type=positive_number, default=10, help="images, both ends too (default: 10)")
    parser.add_argument("--interpolation", help="slerp, or linear, whose middle images are smoother (default: slerp)")
    parser.add_argument("--class_labels", type=comma_separated, help="a name or id, or one for each end: cat,frog")
    add_condition_argument(parser, "one value for all images, or one for each end: age=20,60")
    parser.add_argument("--seed", type=seed_number, default=0, help="seed of the fresh noise (default: 0)")
    add_guidance_interval(parser)
    add_sampling_arguments(parser)
    add_picture_output(parser, "interpolation.png")
    return parser


def interpolation(args: argparse.Namespace) -> None:
    from ..plots import captioned_strips

    prepare_picture(args.output)
    if args.num_frames < 2:
        raise UserError("--num_frames 1: it must be at least 2, both ends included.")
    captioned_strips(interpolation_strips(load_pipeline(args), args)).save(args.output)
    say(f"wrote {args.output}")


def interpolation_strips(pipe: "DiffusionPipeline", args: argparse.Namespace, **further) -> "list[Strip]":
    """Draws the row without noise in the steps and, for diffusion, the one with it, with further options of each call."""
    from .. import TinyDDPMScheduler
    from ..pipelines.pipeline_tiny import image_generators, objective_of
    from ..plots import Strip

    eta = args.eta  # of the second row alone
    names = ("num_inference_steps", "clip_sample", "class_labels", "guidance_scale", "guidance_interval")
    walk = interpolation_of(pipe, args.checkpoint)
    options = (
        call_options(walk, pipe, args, *names, "interpolation", "seeds") | {"num_frames": args.num_frames} | further
    )
    options |= condition_options(walk, pipe, args, 2)
    classes = default_classes(pipe, args.guidance_scale)
    if classes and args.class_labels is None:
        options["class_labels"] = classes[:1]
    captions = [f"{i / (args.num_frames - 1):.0%}" for i in range(args.num_frames)]

    if "unet" not in pipe.components:
        if eta is not None:
            raise UserError(f"--eta means nothing to '{args.checkpoint}', a {type(pipe).__name__}: leave it out.")
        with refusals():
            strips = [Strip(walk(**options).images, captions)]
    else:
        with refusals():
            strips = [Strip(walk(**options).images, label=_solver_name(pipe.scheduler))]
        is_on_betas = objective_of(pipe.scheduler) == "betas"
        if is_on_betas:
            pipe.scheduler = TinyDDPMScheduler.from_config(pipe.scheduler.config)
        if not is_on_betas or eta is not None:
            options["eta"] = 1.0 if eta is None else eta
        walk = interpolation_of(pipe, args.checkpoint)
        generator = image_generators(args.seed, args.num_frames)
        with refusals(), _expected_warning():
            images = walk(generator=generator, **options).images
        strips.append(Strip(images, captions, label="DDPM" if is_on_betas else f"eta {options['eta']:g}"))
    return strips


def _solver_name(scheduler: "SchedulerMixin") -> str:
    names = {"TinyDDIMScheduler": "DDIM", "TinyFlowMatchScheduler": "ODE", "TinyEDMScheduler": "ODE"}
    name = type(scheduler).__name__
    return names.get(name, name.removesuffix("Scheduler"))


@contextlib.contextmanager
def _expected_warning() -> Iterator[None]:
    """Leaves out the warning that a path with fresh noise is not smooth: that is what the second row shows."""
    logger = logging.getLogger("tiny_diffusers.pipelines.pipeline_tiny_interpolation")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# ------------------------------------------------------------------------------------------------------------- guidance


def guidance_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "plot guidance",
        "Draws classes at several guidance scales, a row a class, from one noise; and below it walks between classes, whose "
        "embeddings are mixed.",
    )
    add_checkpoint_argument(parser)
    parser.add_argument("--class_labels", type=comma_separated, help="names or ids (default: the first ten)")
    add_condition_argument(parser)
    parser.add_argument(
        "--guidance_scales", type=finite_numbers, default=[0, 1, 2, 4, 8], help="the columns (default: 0,1,2,4,8)"
    )
    parser.add_argument("--num_walks", type=int, default=3, help="walks, between neighboring rows (default: 3)")
    parser.add_argument("--num_frames", type=positive_number, default=8, help="images of a walk (default: 8)")
    parser.add_argument("--seed", type=seed_number, default=0, help="seed of the noise (default: 0)")
    add_guidance_interval(parser)
    add_sampling_arguments(parser)
    add_picture_output(parser, "guidance.png")
    return parser


def guidance(args: argparse.Namespace) -> None:
    """Draws both grids. `--guidance_scale` is that of the walks."""
    import torch

    from ..plots import Strip, captioned_strips
    from ..progress import bar_options

    prepare_picture(args.output)
    if args.num_walks < 0 or args.num_frames < 2:
        raise UserError("--num_walks must be at least 0 and --num_frames at least 2.")
    pipe = load_pipeline(args)
    check_diffusion(pipe, args.checkpoint, "be guided")
    check_unconditioned(pipe, args.checkpoint, "use `tiny-diffusers sample --image` with a --guidance_scale")
    classes = args.class_labels or default_classes(pipe, None)
    if not classes or "guidance_scale" not in inspect.signature(pipe.__call__).parameters:
        raise UserError(f"'{args.checkpoint}' has no classes to guide to: give a class-conditional checkpoint.")
    names = ("num_inference_steps", "eta", "clip_sample", "guidance_interval")
    options = call_options(pipe.__call__, pipe, args, *names) | condition_options(pipe.__call__, pipe, args, 1)
    scales = args.guidance_scales
    pipe.set_progress_bar_config(desc="guiding", leave=False, **bar_options())
    columns = []
    for scale in scales:
        generator = [torch.Generator().manual_seed(args.seed) for _ in classes]
        with refusals():
            columns.append(pipe(classes, guidance_scale=scale, generator=generator, **options).images)
    strips = [Strip(row, label=name) for name, row in zip(classes, zip(*columns, strict=True), strict=True)]
    strips[0].heading = "Guidance scale w"
    strips[-1].captions = [f"w = {scale:g}" for scale in scales]

    walk = interpolation_of(pipe, args.checkpoint)
    scale = 1.0 if args.guidance_scale is None else args.guidance_scale
    walks = [
        _walk(walk, ends, args, options | {"guidance_scale": scale})
        for ends in list(itertools.pairwise(classes))[: args.num_walks]
    ]
    if walks:
        walks[0].heading = f"Walks between classes, w = {scale:g}"
        walks[-1].captions = [f"{i / (args.num_frames - 1):.0%}" for i in range(args.num_frames)]
    captioned_strips([*strips, *walks]).save(args.output)
    say(f"wrote {args.output}")


def _walk(walk: Callable, ends: tuple[str, str], args: argparse.Namespace, options: dict) -> "Strip":
    """Draws a walk between two classes from one noise, without noise in the steps."""
    from ..plots import Strip

    options = {name: value for name, value in options.items() if name != "eta"}
    with refusals():
        seeds = (args.seed, args.seed)
        images = walk(seeds=seeds, class_labels=list(ends), num_frames=args.num_frames, **options).images
    return Strip(images, label=" to ".join(ends))
