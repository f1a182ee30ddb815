"""
The command line: `tiny-diffusers COMMAND ...`.

A command is two functions side by side: `COMMAND_parser` declares its arguments, `COMMAND` runs it; the longer ones are in
`commands/`. torch and diffusers are imported by what runs, so that `tiny-diffusers --help` answers at once.
"""

import argparse
import dataclasses
import importlib
import shlex
import sys
from pathlib import Path

from . import __version__
from .commands.app import app, app_parser
from .commands.averages import ema, ema_parser
from .commands.cards import card, card_parser
from .commands.completion import completion, completion_parser
from .commands.describing import describe, describe_parser
from .commands.doctor import doctor, doctor_parser
from .commands.editing import edit, edit_parser
from .commands.evaluation import compare, compare_parser, evaluate, evaluate_parser
from .commands.plotting import plot, plot_parser
from .commands.sampling import interpolate, interpolate_parser, sample, sample_parser
from .commands.searching import search, search_parser
from .commands.shared import (
    DTYPES,
    Command,
    add_checkpoint_argument,
    add_guidance_model,
    build_parser,
    load_checkpoint,
    make_parser,
    prepare_output,
)
from .commands.studies import study, study_parser
from .errors import UserError, exit_status, say, unknown
from .training.recipes import SCRIPTS


# ------------------------------------------------------------------------------------------------------------- train


def train_parser() -> argparse.ArgumentParser:
    parser = make_parser("train")
    listed = f"{{{','.join(SCRIPTS)}}}"  # also in the error of a command line that names none
    parser.add_argument("script", choices=SCRIPTS, metavar=listed, help="the script train_scripts/train_SCRIPT.py")
    rest = parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's arguments; --help lists them")
    rest.required = False  # argparse takes it for required, though it may be empty
    return parser


def train(args: argparse.Namespace) -> int:
    from .training.process import launch

    script = importlib.import_module(f"{__package__}.train_scripts.train_{args.script}")
    return launch(lambda: script.main(args.arguments))


# -------------------------------------------------------------------------------------------------- export and push


def export_parser() -> argparse.ArgumentParser:
    parser = make_parser("export")
    add_checkpoint_argument(parser)
    parser.add_argument("directory", type=Path, metavar="DIR", help="folder to save it in")
    parser.add_argument(
        "--dtype",
        choices=DTYPES[1:],
        default="float32",
        help="dtype of the weights; the others halve the file (default: float32)",
    )
    parser.add_argument(
        "--no_code", action="store_true", help="leave the code out: the checkpoint then needs this package to load"
    )
    parser.add_argument(
        "--format",
        choices=("diffusers", "onnx"),
        default="diffusers",
        help="onnx: the network alone, in float32, for any batch size (default: diffusers)",
    )
    parser.add_argument(
        "--guidance_model",
        metavar="CHECKPOINT",
        help="a weaker checkpoint, smaller or less trained, that --guidance_scale above 1 leads away from",
    )
    return parser


def export(args: argparse.Namespace) -> None:
    """Exports a pipeline, with the card, the pictures and the log of a folder that has them."""
    import torch

    from . import hub
    from .runs import RunFolder

    target = RunFolder(args.directory)
    if target.model_index.exists() or target.config.exists():
        raise UserError(f"'{args.directory}' holds a model or a run already: give another folder to export to.")
    if args.format == "onnx" and (args.dtype != "float32" or args.no_code or args.guidance_model):
        raise UserError(
            "--format onnx is one network in float32, without code: leave out --dtype, --no_code and --guidance_model."
        )
    prepare_output(f"{args.directory}/")
    pipe = load_checkpoint(args)
    if args.guidance_model is not None:
        add_guidance_model(pipe, args)
    if args.format == "onnx":
        from .onnx_export import export_onnx

        say(f"exported to {export_onnx(pipe, args.directory)}")
        return
    if args.dtype != "float32":
        pipe.to(getattr(torch, args.dtype))
    source = args.checkpoint if Path(args.checkpoint).is_dir() else None
    hub.export(pipe, args.directory, with_code=not args.no_code, source=source)
    say(f"exported to {args.directory}")


def push_parser() -> argparse.ArgumentParser:
    parser = make_parser("push")
    parser.add_argument("directory", metavar="DIR", help="folder of a run, or that a pipeline was saved in")
    parser.add_argument("repo_id", metavar="OWNER/NAME", help="repository to push to; created if it doesn't exist")
    parser.add_argument("--private", action="store_true", help="create the repository as private")
    parser.add_argument("--include", nargs="+", default=[], metavar="FILE", help="further files of the folder to push")
    parser.add_argument("--dry_run", action="store_true", help="list what would be pushed, and push nothing")
    return parser


def push(args: argparse.Namespace) -> None:
    """Pushes with the token of `hf auth login` or `HF_TOKEN`: a flag for it would stay in the shell's history."""
    from . import hub

    url = hub.push(args.directory, args.repo_id, private=args.private, include=args.include, dry_run=args.dry_run)
    if url is not None:
        say(url)


# --------------------------------------------------------------------------------------------------------- benchmark


def benchmark_parser() -> argparse.ArgumentParser:
    from .benchmark import ROWS, Settings
    from .flags import FlagParser

    parser = FlagParser(
        Settings,
        prog="tiny-diffusers benchmark",
        description="Measures speed and memory of this package and of stock diffusers, which take turns; a ratio is "
        "the median over the rounds. Run nothing else at the same time. Prints a Markdown table, and "
        "writes JSON that describes the machine as well.",
    )
    parser.add_argument("--rows", nargs="+", metavar="ROW", default=list(ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--output", type=Path, default=Path("benchmark.json"), metavar="FILE", help="JSON to write")
    return parser


def benchmark(args: argparse.Namespace) -> None:
    from .benchmark import Settings, run

    settings = Settings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)})
    run(settings, args.rows, args.output, args.command_line)


# ---------------------------------------------------------------------------------------------------- the commands


# In the order in which one does it, as --help lists them
_GROUPS = {
    "make a model": {
        "train": Command(
            "train a model on images",
            train_parser,
            train,
            "unconditional --dataset_name path/to/images --resolution 32 --max_train_minutes 10",
        ),
        "study": Command(
            "train and measure each cell of a recipe's grid",
            study_parser,
            study,
            "unconditional_digits_betas --seeds 0,1",
        ),
        "search": Command(
            "search for the best settings of a recipe", search_parser, search, "unconditional_mine.yaml --trials 50"
        ),
        "ema": Command(
            "rebuild averages of a run's weights, of any length",
            ema_parser,
            ema,
            "runs/ddpm-digits --sigma_rel 0.05 0.1",
        ),
    },
    "use a model": {
        "sample": Command(
            "draw samples from a checkpoint",
            sample_parser,
            sample,
            "runs/ddpm-digits --num_images 64 --output samples.png",
        ),
        "interpolate": Command(
            "interpolate between two samples",
            interpolate_parser,
            interpolate,
            "runs/ddpm-digits --seeds 0,1 --output walk.gif",
        ),
        "edit": Command(
            "vary, inpaint or restore given pictures",
            edit_parser,
            edit,
            "runs/ddpm-digits --image digit.png --strength 0.6 --output variations.png",
        ),
        "app": Command("use checkpoints in a browser", app_parser, app, "runs/ddpm-digits"),
    },
    "see how good it is": {
        "evaluate": Command(
            "measure the images of a checkpoint or a folder",
            evaluate_parser,
            evaluate,
            "runs/ddpm-digits --num_images 1000",
        ),
        "compare": Command(
            "tabulate several evaluated checkpoints, or runs", compare_parser, compare, "runs/a runs/b --settings"
        ),
        "plot": Command(
            "draw losses, noise schedules, denoising, samples and more",
            plot_parser,
            plot,
            "losses runs/a runs/b --output losses.png",
        ),
        "describe": Command(
            "list the layers of a network, and draw it",
            describe_parser,
            describe,
            "runs/ddpm-digits --output network.png",
        ),
    },
    "share a model": {
        "card": Command(
            "rewrite a model card, with the metrics of a report",
            card_parser,
            card,
            "runs/ddpm-digits",
        ),
        "export": Command(
            "save a checkpoint with the code that it needs, or as ONNX",
            export_parser,
            export,
            "runs/ddpm-digits digits --dtype float16",
        ),
        "push": Command(
            "push a checkpoint's folder, or a Space, to the Hub",
            push_parser,
            push,
            "runs/ddpm-digits me/my-digits --dry_run",
        ),
    },
    "this machine": {
        "benchmark": Command(
            "measure speed and memory against stock diffusers", benchmark_parser, benchmark, "--rows training sampling"
        ),
        "doctor": Command("print versions, the machine and what is missing", doctor_parser, doctor, ""),
        "completion": Command(
            "print a script for completion in a shell",
            completion_parser,
            completion,
            "bash > ~/.local/share/bash-completion/completions/tiny-diffusers",
        ),
    },
}
COMMANDS = {name: command for commands in _GROUPS.values() for name, command in commands.items()}


def main(argv: list[str] | None = None) -> int:
    """
    Runs one command.

    Args:
        argv (`list[str]`, *optional*): The arguments; the process's by default.

    Returns:
        `int`: The exit status: 0, or 2 for a user's mistake, which is printed as one line. Anything else raises.
    """
    argv = sys.argv[1:] if argv is None else argv
    return exit_status(lambda: _run(argv), "tiny-diffusers: error")


class _Parser(argparse.ArgumentParser):
    """Parser of the command's name; those of the commands' arguments are in `flags.py`, which takes longer to import."""

    def error(self, message: str):
        raise UserError(f"{message}. --help lists the commands.")

    def _check_value(self, action: argparse.Action, value: str) -> None:
        if value not in COMMANDS:
            raise unknown("command", value, COMMANDS)


def _list_commands() -> str:
    """Returns the table of the commands for --help."""
    lines = []
    for title, commands in _GROUPS.items():
        lines += [f"{title}:", *(f"  {name:13}{command.help}" for name, command in commands.items()), ""]
    return "\n".join([*lines, "tiny-diffusers COMMAND --help lists a command's arguments, with an example."])


def _run(argv: list[str]) -> int | None:
    parser = _Parser(
        prog="tiny-diffusers",
        usage="tiny-diffusers COMMAND ...",
        description="Train, sample, measure and share generative models of small images.",
        epilog=_list_commands(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"tiny-diffusers {__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help=argparse.SUPPRESS)
    name = parser.parse_args(argv[:1]).command
    command = COMMANDS[name]

    from .flags import expand_user

    parser = build_parser(name, command)
    args = expand_user(parser.parse_args(argv[1:]))
    args.argv, args.command_line = argv[1:], shlex.join(["tiny-diffusers", *argv])
    return command.run(args)


if __name__ == "__main__":
    sys.exit(main())
