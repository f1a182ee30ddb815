"""`tiny-diffusers plot`: its kinds of pictures, and those of curves: noise schedules, losses, and both from a file."""

import argparse
import functools
from pathlib import Path

from ..errors import UserError, say, unknown
from .plotting_images import (
    add_beta_arguments,
    build_schedules,
    denoising,
    denoising_parser,
    forward,
    forward_parser,
    reconstructions,
    reconstructions_parser,
    schedule_names,
)
from .plotting_nearest import nearest, nearest_parser
from .plotting_samples import (
    epochs,
    epochs_parser,
    guidance,
    guidance_parser,
    interpolation,
    interpolation_parser,
    samples,
    samples_parser,
)
from .shared import (
    FIGURE_SUFFIXES,
    Command,
    build_parser,
    check_diffusion,
    load_checkpoint,
    make_parser,
    names_that_differ,
    prepare_picture,
)


def plot_parser() -> argparse.ArgumentParser:
    from ..flags import KindParser

    kinds = "\n".join(f"  {name:16}{kind.help}" for name, kind in KINDS.items())
    return KindParser(
        {name: functools.partial(build_parser, f"plot {name}", kind) for name, kind in KINDS.items()},
        _kind_of,
        prog="tiny-diffusers plot",
        usage="tiny-diffusers plot KIND ... | RUN [RUN ...] | FILE.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"kinds (each has a --help of its own):\n{kinds}\n\nOnly RUNs are short for losses RUN ..., and FILE.json "
        "for redraw FILE.json.",
    )


def _kind_of(words: list[str]) -> tuple[str, list[str]]:
    """Splits a command line into the kind of picture and its arguments. Runs alone are losses, and a JSON file is redrawn."""
    first = words[0] if words else ""
    if first in KINDS:
        return first, words[1:]
    if first.endswith(".json") or any(word.partition("=")[0] == "--from" for word in words):
        return "redraw", words
    if not first:
        raise UserError(f"Give a kind of picture ({', '.join(KINDS)}), or the folder of a run.")
    if not (first.startswith("-") or "/" in first or Path(first).expanduser().exists()):
        raise unknown("kind of picture, or folder of a run,", first, KINDS)
    return "losses", words


def plot(args: argparse.Namespace) -> None:
    KINDS[args.kind].run(args)


def _add_figure_output(parser: argparse.ArgumentParser, default: str | None) -> None:
    parser.add_argument(
        "--output",
        type=Path,
        default=default and Path(default),
        metavar="FILE",
        help="the picture, .png, .svg or .pdf; the values that it shows are written beside it, to a .json file of the "
        f"same name (default: {default or 'a .png beside the file'})",
    )


def _prepare_output(output: Path) -> Path:
    """Refuses now what could not be written later; returns where the values go: no other JSON file is replaced."""
    from ..plots import Curves

    prepare_picture(output, FIGURE_SUFFIXES)
    values = output.with_suffix(".json")
    if values.exists():
        try:
            Curves.load(values)
        except UserError as error:
            raise UserError(
                f"--output {output}: the values would go to '{values}', which exists and holds something else: give "
                "another name."
            ) from error
    return values


# ------------------------------------------------------------------------------------------------------------ schedules


def schedules_parser() -> argparse.ArgumentParser:
    parser = make_parser("plot schedules", "Draws the betas, alphas_cumprod and log-SNR of noise schedules.")
    parser.add_argument(
        "checkpoints",
        metavar="CHECKPOINT",
        nargs="*",
        help="checkpoints whose own schedules to draw (default: the four beta schedules)",
    )
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run the checkpoints' own code; read it first"
    )
    parser.add_argument(
        "--schedules",
        type=schedule_names,
        help="of linear, cosine, sigmoid, quadratic, flow and edm, beside those of the checkpoints",
    )
    add_beta_arguments(parser)
    _add_figure_output(parser, "schedules.png")
    return parser


def schedules(args: argparse.Namespace) -> None:
    from ..noising import BETA_SCHEDULES, noise_levels
    from ..plots import schedule_curves

    values = _prepare_output(args.output)
    names = args.schedules or ([] if args.checkpoints else BETA_SCHEDULES)
    found = build_schedules(names, args)
    for checkpoint in args.checkpoints:
        pipe = load_checkpoint(argparse.Namespace(**vars(args) | {"checkpoint": checkpoint}))
        check_diffusion(pipe, checkpoint, "have a noise schedule")
        found[checkpoint] = pipe.scheduler
    curves = schedule_curves({name: noise_levels(scheduler)._asdict() for name, scheduler in found.items()})
    curves.save(values)
    say(f"wrote {curves.draw(args.output)} and {values}")


# --------------------------------------------------------------------------------------------------------------- losses


def losses_parser() -> argparse.ArgumentParser:
    parser = make_parser("plot losses", "Draws the losses of one or several runs.")
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", type=Path, help="output folders of the train scripts, or published models"
    )
    parser.add_argument(
        "--which",
        choices=("train", "validation", "both"),
        help="default: both of one run; of several, the validation loss if all have it, else the training loss",
    )
    _add_figure_output(parser, "loss_curves.png")
    return parser


def losses(args: argparse.Namespace) -> None:
    from .. import plots
    from ..runs import RunFolder
    from ..zoo import find_published

    names = names_that_differ([str(folder) for folder in args.runs])
    logs = {name: RunFolder(find_published(folder)).log for name, folder in zip(names, args.runs, strict=True)}
    values = _prepare_output(args.output)
    if len(logs) == 1 and args.which is None:
        curves = plots.loss_curves_of_run(*logs.values(), title=args.runs[0].name)
    else:
        curves = plots.loss_curves_of_runs(logs, args.which)
    curves.save(values)
    say(f"wrote {curves.draw(args.output)} and {values}")


def redraw_parser() -> argparse.ArgumentParser:
    parser = make_parser("plot redraw", "Draws curves from the values that were written beside their picture.")
    parser.add_argument("file", metavar="FILE.json", nargs="?", type=Path, help="the values")
    parser.add_argument("--from", dest="source", metavar="FILE.json", type=Path, help="the same, as a flag")
    _add_figure_output(parser, None)
    return parser


def redraw(args: argparse.Namespace) -> None:
    from ..plots import Curves

    if (args.file is None) == (args.source is None):
        raise UserError("Give one file of curves: plot FILE.json, or plot --from FILE.json.")
    file = args.file or args.source
    curves = Curves.load(file)
    output = args.output or file.with_suffix(".png")
    values = _prepare_output(output)
    if values != file:
        curves.save(values)
    say(f"wrote {curves.draw(output)}")


KINDS = {
    "schedules": Command(
        "betas, alphas_cumprod and log-SNR of noise schedules",
        schedules_parser,
        schedules,
        "runs/ddpm-digits --schedules linear,cosine --output schedules.png",
    ),
    "forward": Command(
        "an image that turns to noise, a row for each schedule",
        forward_parser,
        forward,
        "digit.png --schedules linear,cosine,flow --output forward.png",
    ),
    "denoising": Command(
        "noise, or a noisy image, that turns to an image",
        denoising_parser,
        denoising,
        "runs/ddpm-digits --output denoising.gif",
    ),
    "losses": Command("losses of one or several runs", losses_parser, losses, "runs/a runs/b --output losses.png"),
    "interpolation": Command(
        "images between two seeds, by DDIM and by DDPM",
        interpolation_parser,
        interpolation,
        "runs/ddpm-digits --seeds 0,1 --output interpolation.png",
    ),
    "samples": Command(
        "samples of several checkpoints from the same seeds",
        samples_parser,
        samples,
        "runs/a runs/b --output samples.png",
    ),
    "nearest": Command(
        "samples and the training images nearest to them",
        nearest_parser,
        nearest,
        "runs/ddpm-digits --output nearest.png",
    ),
    "epochs": Command(
        "samples of a run over its training", epochs_parser, epochs, "runs/ddpm-digits --output epochs.png"
    ),
    "guidance": Command(
        "classes at several guidance scales, and walks between classes",
        guidance_parser,
        guidance,
        "runs/ddpm-cats --output guidance.png",
    ),
    "reconstructions": Command(
        "images and what a VAE makes of them",
        reconstructions_parser,
        reconstructions,
        "runs/vae-digits --output reconstructions.png",
    ),
    "redraw": Command(
        "curves, from the .json file beside their picture", redraw_parser, redraw, "losses.json --output losses.svg"
    ),
}
