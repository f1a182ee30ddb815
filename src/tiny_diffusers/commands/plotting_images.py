"""`tiny-diffusers plot forward`, `denoising` and `reconstructions`: pictures of real images, noised and rebuilt."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError, refusals, say, unknown
from ..resolution import parse_resolution, to_size
from .conditions import add_condition_argument, condition_options
from .real_images import (
    add_images_arguments,
    add_selection_arguments,
    load_data,
    load_dataset,
    load_images,
    load_picture,
    own_options,
    to_tensor,
)
from .sampling import check_unconditioned, default_classes
from .shared import (
    PICTURE_SUFFIXES,
    add_checkpoint_argument,
    add_picture_output,
    add_show_channels,
    add_solver_arguments,
    call_options,
    check_diffusion,
    comma_separated,
    load_checkpoint,
    load_pipeline,
    make_parser,
    positive_number,
    positive_numbers,
    prepare_picture,
    seed_number,
    whole_numbers,
)


if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, SchedulerMixin

    from ..plots import Strip


MAX_TIMESTEPS = 100_000


def _to_pil(images: "torch.Tensor", show_channels: list[int] | None = None) -> list:
    """Converts images in [-1, 1], or beyond, to PIL images."""
    from ..data.images import denormalize
    from ..pipelines.pipeline_tiny import to_picture

    pixels = denormalize(images.cpu()).permute(0, 2, 3, 1).numpy()  # (N, C, H, W) -> (N, H, W, C)
    with refusals():
        return [to_picture(image, show_channels) for image in pixels]


# -------------------------------------------------------------------------------------------------------------- forward


def schedule_names(text: str) -> list[str]:
    from ..noising import SCHEDULES

    names = comma_separated(text)
    for name in names:
        if name not in SCHEDULES:
            raise argparse.ArgumentTypeError(str(unknown("schedule", name, SCHEDULES)))
    return names


def add_beta_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ddpm_num_steps", type=positive_number, default=1000, help="T, the number of timesteps (default: 1000)"
    )
    parser.add_argument("--beta_start", type=float, default=1e-4, help="of linear, sigmoid, quadratic (default: 1e-4)")
    parser.add_argument("--beta_end", type=float, default=0.02, help="of linear, sigmoid, quadratic (default: 0.02)")


def build_schedules(names: Iterable[str], args: argparse.Namespace) -> "dict[str, SchedulerMixin]":
    """Builds the schedulers of noise schedules, with the arguments of [`add_beta_arguments`]."""
    from ..noising import build_schedule

    if args.ddpm_num_steps > MAX_TIMESTEPS:
        raise UserError(f"--ddpm_num_steps {args.ddpm_num_steps}: it must be at most {MAX_TIMESTEPS:,}.")
    for name in ("beta_start", "beta_end"):
        if not 0 < getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: it must be between 0 and 1.")
    with refusals():
        return {name: build_schedule(name, args.ddpm_num_steps, args.beta_start, args.beta_end) for name in names}


def forward_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "plot forward", "Draws an image with more and more noise: a row for each schedule, from the same noise."
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a picture, a dataset (a Hub id, a folder, or digits), or the folder of a run, for the data of its training",
    )
    parser.add_argument(
        "--schedules",
        type=schedule_names,
        default=["linear", "quadratic", "sigmoid", "cosine", "flow"],
        help="of linear, cosine, sigmoid, quadratic, flow and edm (default: linear,quadratic,sigmoid,cosine,flow)",
    )
    parser.add_argument(
        "--checkpoint", metavar="CHECKPOINT", help="draw by the noise schedule of this checkpoint, not by --schedules"
    )
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run the checkpoint's own code; read it first"
    )
    parser.add_argument(
        "--timesteps",
        type=whole_numbers,
        help="the timesteps t, from 0 to T - 1; of edm, the steps of its sampling, from the image (default: 0, T/4, T/2, "
        "3T/4, T - 1)",
    )
    add_beta_arguments(parser)
    parser.add_argument(
        "--resolution", type=parse_resolution, help="side, or height x width, that the image is resized to, in pixels"
    )
    add_selection_arguments(parser)
    parser.add_argument("--seed", type=seed_number, default=0, help="seed of the noise (default: 0)")
    add_show_channels(parser)
    add_picture_output(parser, "forward.png")
    return parser


def forward(args: argparse.Namespace) -> None:
    from ..plots import captioned_strips

    prepare_picture(args.output, given=Path(args.source))
    if args.checkpoint is None:
        found, total = build_schedules(args.schedules, args), args.ddpm_num_steps
    else:
        pipe = load_checkpoint(args)
        check_diffusion(pipe, args.checkpoint, "have a noise schedule")
        found, total = {Path(args.checkpoint).name: pipe.scheduler}, pipe.scheduler.config.num_train_timesteps
    timesteps = args.timesteps or sorted({0, total // 4, total // 2, 3 * total // 4, total - 1})
    _check_timesteps("--timesteps", timesteps, total)
    strips = forward_strips(_load_source(args), found, timesteps, args.seed, args.show_channels)
    captioned_strips(strips).save(args.output)
    say(f"wrote {args.output}")


def forward_strips(
    image: "torch.Tensor",
    schedulers: "dict[str, SchedulerMixin]",
    timesteps: Sequence[int],
    seed: int,
    show_channels: list[int] | None = None,
) -> "list[Strip]":
    """Draws x_t of an image, (1, C, H, W) in [-1, 1]: a row for each scheduler, from the same noise."""
    import torch

    from ..noising import add_noise
    from ..plots import Strip

    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
    strips = [
        Strip([_to_pil(add_noise(image, noise, scheduler, t), show_channels)[0] for t in timesteps], label=name)
        for name, scheduler in schedulers.items()
    ]
    strips[-1].captions = [f"t = {t}" for t in timesteps]
    return strips


def _check_timesteps(flag: str, timesteps: list[int], total: int) -> None:
    for t in timesteps:
        if not 0 <= t < total:
            raise UserError(f"{flag} {t}: there are {total:,} timesteps, so it must be from 0 to {total - 1}.")


def _load_source(args: argparse.Namespace) -> "torch.Tensor":
    """Loads the image of a picture, a dataset or a run's data: (1, C, H, W) in [-1, 1]."""
    from ..evaluation.references import RealImages
    from ..runs import RunFolder

    RealImages(resolution=args.resolution)  # checks its range
    source = Path(args.source)
    if source.suffix.lower() in PICTURE_SUFFIXES:
        return load_picture(source, to_size(args.resolution))
    given = {"split": args.split, "resolution": args.resolution}
    if RunFolder(source).config.is_file():
        return to_tensor(load_dataset(given, source, args.index, 1))
    return to_tensor(load_dataset(given | {"dataset_name": args.source}, None, args.index, 1))


# ------------------------------------------------------------------------------------------------------------ denoising


def denoising_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "plot denoising",
        "Draws how noise turns to an image, a row for each number of steps. With --image or --dataset_name: how a real "
        "image that was noised to t is denoised, a row for each t.",
    )
    add_checkpoint_argument(parser)
    parser.add_argument(
        "--num_inference_steps",
        type=positive_numbers,
        metavar="N,N,...",
        help="numbers of steps (default: 5,10,50); of real images one number, of steps from pure noise (default: 50)",
    )
    parser.add_argument(
        "--what",
        choices=("sample", "x0"),
        default="sample",
        help="sample: the noisy x_t; x0: the x_0 that is predicted from it (default: sample)",
    )
    parser.add_argument("--num_states", type=positive_number, default=8, help="states in a row (default: 8)")
    add_images_arguments(parser)
    parser.add_argument(
        "--from_timesteps",
        type=whole_numbers,
        metavar="T,T,...",
        help="real images: the timesteps t that denoising starts from (default: the quarters of all)",
    )
    parser.add_argument("--class_labels", help="the class, a name or id (default: the first)")
    add_condition_argument(parser)
    parser.add_argument("--seed", type=seed_number, default=0, help="seed of the noise, of all rows (default: 0)")
    add_solver_arguments(parser)
    add_show_channels(parser)
    add_picture_output(parser, "denoising.png")
    return parser


def denoising(args: argparse.Namespace) -> None:
    from ..plots import captioned_strips

    prepare_picture(args.output, given=args.image)
    starts_from_image = args.image is not None or args.dataset_name is not None
    if args.from_timesteps is not None and not starts_from_image:
        raise UserError("--from_timesteps is for real images: give --image or --dataset_name.")
    steps = args.num_inference_steps
    if starts_from_image and len(steps or []) > 1:
        raise UserError("--num_inference_steps: give one number with --image or --dataset_name, not several.")
    captioned_strips(denoising_strips(load_pipeline(args), args)).save(args.output)
    say(f"wrote {args.output}")


def denoising_strips(pipe: "DiffusionPipeline", args: argparse.Namespace, **further) -> "list[Strip]":
    """Draws how noise, or a noisy image, turns to an image, with further options of each call."""
    from ..plots import Strip
    from ..progress import bar_options

    check_diffusion(pipe, args.checkpoint, "denoise")
    starts_from_image = args.image is not None or args.dataset_name is not None
    steps = args.num_inference_steps
    if args.guidance_scale != 0:
        remedy = "use `tiny-diffusers sample --image`, or give --guidance_scale 0"
        check_unconditioned(pipe, args.checkpoint, remedy)
    total = pipe.scheduler.config.num_train_timesteps
    steps = steps or sorted({min(n, total) for n in ([50] if starts_from_image else [5, 10, 50])})
    pipe.set_progress_bar_config(desc="denoising", leave=False, **bar_options())
    options = call_options(pipe.__call__, pipe, args, "eta", "clip_sample", "guidance_scale", "class_labels") | further
    options |= condition_options(pipe.__call__, pipe, args, 1)
    classes = default_classes(pipe, args.guidance_scale)
    if classes and args.class_labels is None:
        options["class_labels"] = classes[:1]

    if not starts_from_image:
        rows = [_denoise(pipe, args, options, num_steps, num_inference_steps=num_steps) for num_steps in steps]
        return [
            Strip([*images, result], [*captions, "image"], f"{num_steps} step{'s' if num_steps > 1 else ''}")
            for num_steps, (images, captions, result) in zip(steps, rows, strict=True)
        ]
    return _denoise_from_image(pipe, args, options, steps[0])


def _denoise(pipe: "DiffusionPipeline", args: argparse.Namespace, options: dict, num_steps: int, **start) -> tuple:
    """Denoises one image; returns its states or predictions of x_0, their timesteps in words, and the result."""
    import torch

    from ..noising import caption, displayed

    num_states = min(args.num_states, num_steps)
    generator = [torch.Generator().manual_seed(args.seed)]
    with refusals():
        output = pipe(
            batch_size=1,
            generator=generator,
            output_type="latent",
            return_intermediates=num_states,
            **start,
            **options,
        )
    images, captions = [], []
    for timestep, sample, pred_original_sample in output.intermediates:
        shown = displayed(sample, pipe.scheduler, timestep) if args.what == "sample" else pred_original_sample
        images += pipe._to_images(shown, "pil")
        captions.append(caption(pipe.scheduler, timestep))
    return images, captions, pipe._to_images(output.images, "pil")[0]


def _denoise_from_image(pipe: "DiffusionPipeline", args: argparse.Namespace, options: dict, num_steps: int) -> list:
    """Returns a strip for each t: the image, x_t, the states on the way back, and the result."""
    import torch

    from ..noising import add_noise, caption, timesteps_from
    from ..pipelines.pipeline_tiny import objective_of
    from ..plots import Strip

    if "vae" in pipe.components:
        raise UserError(
            f"'{args.checkpoint}' denoises latents, which no image starts from here: leave out --image and --dataset_name."
        )
    if not type(pipe.scheduler).__name__.startswith("Tiny"):  # others have x_t in a scale of their own
        fitting = "ddim or ddpm" if objective_of(pipe.scheduler) == "betas" else "euler, multistep or heun"
        raise UserError(f"--scheduler {args.scheduler} can't start from a real image here: give {fitting}.")
    total = pipe.scheduler.config.num_train_timesteps
    if num_steps > total:
        raise UserError(
            f"--num_inference_steps {num_steps}: there are {total:,} timesteps, so it must be at most that."
        )
    starts = args.from_timesteps or sorted({max(1, t) for t in (total // 4, total // 2, 3 * total // 4, total - 1)})
    _check_timesteps("--from_timesteps", starts, total)
    if 0 in starts:
        raise UserError("--from_timesteps 0: there is hardly any noise to remove: it must be at least 1.")
    image = load_images(args, pipe, 1)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(args.seed))
    strips = []
    for t in starts:
        timesteps = timesteps_from(pipe.scheduler, t, max(1, round(num_steps * (t + 1) / total)))
        noisy = add_noise(image, noise, pipe.scheduler, t)
        images, captions, result = _denoise(pipe, args, options, len(timesteps), timesteps=timesteps, latents=noisy)
        first = _to_pil(image, pipe.show_channels)
        if args.what == "x0":  # else the first state is x_t itself
            first += _to_pil(noisy, pipe.show_channels)
            captions = ["x_t", *captions]
        strips.append(
            Strip(
                [*first, *images, result],
                ["given", *captions, "result"],
                f"from {caption(pipe.scheduler, timesteps[0])}",
            )
        )
    return strips


# ------------------------------------------------------------------------------------------------------ reconstructions


def reconstructions_parser() -> argparse.ArgumentParser:
    parser = make_parser("plot reconstructions", "Draws real images, and below each what a VAE makes of it.")
    add_checkpoint_argument(parser)
    add_images_arguments(parser)
    parser.add_argument("--num_images", type=positive_number, default=16, help="of a dataset (default: 16)")
    parser.add_argument(
        "--class_labels", help="the class of --image, a name or id; images of a dataset have their own"
    )
    add_condition_argument(parser, "its value for --image, as images of a dataset have their own")
    add_show_channels(parser)
    add_picture_output(parser, "reconstructions.png")
    return parser


def reconstructions(args: argparse.Namespace) -> None:
    from ..plots import Strip, captioned_strips

    prepare_picture(args.output, given=args.image)
    pipe = load_checkpoint(args)
    if not hasattr(pipe, "reconstruct"):
        raise UserError(
            f"'{args.checkpoint}' is a {type(pipe).__name__}, which can't reconstruct images: give a checkpoint of a VAE."
        )
    if args.image is not None:
        images = load_images(args, pipe, 1)
        options = call_options(pipe.reconstruct, pipe, args, "class_labels")
        options |= condition_options(pipe.reconstruct, pipe, args, 1)
    else:
        for name in ("class_labels", "condition"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name} is for --image: images of a dataset have their own; leave it out.")
        data = load_data(args, pipe, args.num_images)
        images, options = to_tensor(data), own_options(pipe, data)
    with refusals():
        rebuilt = pipe.reconstruct((images / 2 + 0.5).clamp(0, 1), **options).images
    strips, given = [], _to_pil(images, pipe.show_channels)
    for start in range(0, len(given), 8):
        strips.append(Strip(given[start : start + 8], label="given"))
        strips.append(Strip(rebuilt[start : start + 8], label="rebuilt"))
    captioned_strips(strips).save(args.output)
    say(f"wrote {args.output}")
