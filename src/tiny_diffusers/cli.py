"""
The command line: `tiny-diffusers COMMAND ...`.

A command is two functions side by side: `COMMAND_parser` declares its arguments, `COMMAND` runs it. torch and diffusers
are imported by what runs, so that `tiny-diffusers --help` answers at once.
"""

import argparse
import contextlib
import dataclasses
import importlib
import inspect
import itertools
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from . import __version__
from .errors import UserError, exit_status, first_line, refusals, say, unknown
from .paths import keep_paths, kept_paths, local_path, public_command


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL import Image

    from .evaluation import Report

# --scheduler -> the name of its class, in this package or in diffusers, and its options
SCHEDULERS = {
    "ddim": ("TinyDDIMScheduler", {}),
    "ddpm": ("TinyDDPMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpm": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm_single": ("DPMSolverSinglestepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "kdpm2_ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "sa": ("SASolverScheduler", {}),
    "sde_dpm": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
SCRIPTS = ("unconditional", "conditional", "pixelcnn", "vae", "dcgan")  # train_scripts/train_SCRIPT.py
DTYPES = ("auto", "float32", "bfloat16", "float16")
PICTURE_SUFFIXES = (".png", ".gif", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
FRAME_SIDE = 256  # pixels that the longer side of an animation's frames is enlarged towards
MAX_SEED = 2**63 - 1
MAX_ROW = 16  # images of one class beside each other in a grid
NUM_IMAGES, MAX_CLASSES = 64, 10  # that `sample` draws by default


# ------------------------------------------------------------------------------------------------------------- train


def train_parser() -> argparse.ArgumentParser:
    parser = _parser("train")
    parser.add_argument("script", choices=SCRIPTS, help="the script train_scripts/train_SCRIPT.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's arguments; --help lists them")
    return parser


def train(args: argparse.Namespace) -> int:
    from .training.process import launch

    script = importlib.import_module(f"{__package__}.train_scripts.train_{args.script}")
    return launch(lambda: script.main(args.arguments))


# ------------------------------------------------------------------------------------------------------------ sample


def sample_parser() -> argparse.ArgumentParser:
    parser = _parser("sample")
    _add_checkpoint_argument(parser)
    _add_sampling_arguments(parser)
    parser.add_argument(
        "--num_images", type=_positive, help=f"default: {NUM_IMAGES}, or a row for each class if no class is named"
    )
    parser.add_argument("--seed", type=_seed, default=0, help="image i has the seed SEED + i (default: 0)")
    parser.add_argument("--batch_size", type=_positive, default=64, help="images at a time (default: 64)")
    parser.add_argument(
        "--class_labels",
        type=_comma_separated,
        help="names or ids, such as cat,frog: each gets an equal share of the images, in this order (default: all, or the "
        f"first {MAX_CLASSES})",
    )
    _add_guidance_interval(parser)
    _add_dynamic_thresholding(parser)
    _add_temperature(parser)
    parser.add_argument(
        "--return_intermediates",
        type=_positive,
        metavar="K",
        help="also show K states of the denoising: one row for each image, from noise to the image",
    )
    _add_output_argument(parser, "samples.png", "one picture of all images, or numbered PNGs in a folder")
    return parser


def sample(args: argparse.Namespace) -> None:
    """Draws each image with a generator of its own, so that none depends on the batch size."""
    from .pipelines.pipeline_tiny import image_generators
    from .plots import image_grid, strip
    from .progress import bar_options

    output = _prepare_output(args.output)
    if args.return_intermediates and output.is_dir():
        raise UserError("--return_intermediates makes one picture of all states: give --output NAME.png.")
    pipe = _load_pipeline(args)
    names = ("num_inference_steps", "eta", "class_labels", "guidance_scale", "guidance_interval")
    options = _call_options(
        pipe.__call__, pipe, args, *names, "dynamic_thresholding", "temperature", "return_intermediates"
    )
    num_images, labels = args.num_images, options.pop("class_labels", None)
    if labels is None and args.guidance_scale != 0 and hasattr(pipe, "_class_ids"):
        labels = _first_classes(pipe)[:num_images] or None
        if labels is not None and num_images is None:
            num_images = len(labels) * min(NUM_IMAGES // len(labels), MAX_ROW)
    num_images = num_images or NUM_IMAGES
    _check_numbered(output, num_images)
    if labels is not None:
        if len(labels) > num_images:
            raise UserError(f"--num_images {num_images} is less than the {len(labels)} --class_labels: give more.")
        labels = [labels[i * len(labels) // num_images] for i in range(num_images)]

    say(f"drawing {num_images} images, {output} ...", sys.stderr)
    images, states = [], []
    began = time.perf_counter()
    for start in range(0, num_images, args.batch_size):
        stop = min(start + args.batch_size, num_images)
        pipe.set_progress_bar_config(desc=f"images {start + 1} to {stop} of {num_images}", **bar_options())
        if labels is not None:
            options["class_labels"] = labels[start:stop]
        generator = image_generators(args.seed, stop - start, first=start)
        with refusals():
            drawn = pipe(batch_size=stop - start, generator=generator, **options)
        images += drawn.images
        states = states or [[] for _ in drawn.intermediates or []]
        for state, intermediate in zip(states, drawn.intermediates or [], strict=True):
            state += intermediate.sample
    seconds = time.perf_counter() - began

    if output.is_dir():
        _save_numbered(images, output)
    elif states:
        strip([*states, images], row_labels=labels).save(output)
    else:
        image_grid(images, **_class_rows(labels)).save(output)
    say(f"{len(images)} images in {seconds:.1f} s, {len(images) / seconds:.1f} a second: {output}")


def _first_classes(pipe: "DiffusionPipeline") -> list[str]:
    """Returns the names of a pipeline's classes, or their ids; of many, the first ten, which is said."""
    names = {int(class_id): name for class_id, name in (pipe.config.get("id2label") or {}).items()}
    classes = [names.get(class_id, str(class_id)) for class_id in pipe._class_ids]
    if len(classes) > MAX_CLASSES:
        say(f"the first {MAX_CLASSES} of {len(classes)} classes; --class_labels names others", sys.stderr)
    return classes[:MAX_CLASSES]


def _class_rows(labels: list[str] | None) -> dict:
    """Returns the columns and row labels of a grid in which each row is of one class; empty if there is none."""
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
    parser = _parser("interpolate")
    _add_checkpoint_argument(parser)
    _add_sampling_arguments(parser)
    parser.add_argument("--seeds", type=_two_seeds, help="seeds of the two ends (default: 0,1)")
    parser.add_argument(
        "--seed",
        type=_seed,
        default=0,
        help="seed of the noise that a scheduler such as ddpm adds, the same in each frame (default: 0)",
    )
    parser.add_argument(
        "--images",
        type=_picture,
        nargs=2,
        metavar="FILE",
        help="two pictures to interpolate between, instead of seeds",
    )
    parser.add_argument("--interpolation", help="slerp, or linear, whose middle frames are smoother (default: slerp)")
    parser.add_argument("--num_frames", type=int, default=16, help="images, both ends included (default: 16)")
    parser.add_argument(
        "--class_labels", type=_comma_separated, help="a name or id for all frames, or one for each end: cat,frog"
    )
    _add_guidance_interval(parser)
    _add_output_argument(
        parser, "interpolation.gif", "an animation (.gif), one picture of all frames, or numbered PNGs in a folder"
    )
    return parser


def interpolate(args: argparse.Namespace) -> None:
    import torch
    from diffusers.utils import export_to_gif
    from PIL import Image

    from .plots import image_grid

    output = _prepare_output(args.output)
    _check_numbered(output, args.num_frames)
    pipe = _load_pipeline(args)
    walk = _interpolation_of(pipe, args.checkpoint)
    names = ("num_inference_steps", "eta", "class_labels", "guidance_scale", "guidance_interval", "interpolation")
    options = _call_options(walk, pipe, args, *names, "seeds", "images")
    if args.seeds is None and args.images is None:
        options["seeds"] = (0, 1)
    if "generator" in inspect.signature(walk).parameters:  # of a scheduler that draws noise in its steps
        options["generator"] = [torch.Generator().manual_seed(args.seed) for _ in range(args.num_frames)]
    with refusals():
        frames = walk(num_frames=args.num_frames, **options).images

    if output.is_dir():
        _save_numbered(frames, output)
    elif output.suffix.lower() == ".gif":
        width, height = frames[0].size
        scale = max(1, FRAME_SIDE // max(width, height))
        frames = [frame.resize((width * scale, height * scale), Image.Resampling.NEAREST) for frame in frames]
        export_to_gif(frames, str(output))
    else:
        image_grid(frames, columns=min(len(frames), MAX_ROW)).save(output)
    say(f"{len(frames)} frames: {output}")


def _interpolation_of(pipe: "DiffusionPipeline", checkpoint: str) -> Callable:
    """Returns what interpolates with a pipeline's networks: its own method, or the pipeline for diffusion."""
    from . import TinyInterpolationPipeline

    if hasattr(pipe, "interpolate"):  # on the latents of a VAE or GAN
        return pipe.interpolate
    if "unet" not in pipe.components:
        raise UserError(
            f"'{checkpoint}' is a {type(pipe).__name__}, which has no latents to interpolate between: give a checkpoint "
            "of diffusion, a VAE or a DCGAN."
        )
    return TinyInterpolationPipeline.from_pipe(pipe)


# -------------------------------------------------------------------------------------------------- export and push


def export_parser() -> argparse.ArgumentParser:
    parser = _parser("export")
    _add_checkpoint_argument(parser)
    parser.add_argument("directory", type=Path, metavar="DIR", help="folder to save it in")
    parser.add_argument(
        "--dtype",
        choices=DTYPES[1:],
        default="float32",
        help="dtype of the weights; the others halve the file (default: float32)",
    )
    parser.add_argument("--no_code", action="store_true", help="leave the code out: it loads with this package alone")
    parser.add_argument(
        "--format",
        choices=("diffusers", "onnx"),
        default="diffusers",
        help="onnx: the network alone, in float32, for any batch size (default: diffusers)",
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
    if args.format == "onnx" and (args.dtype != "float32" or args.no_code):
        raise UserError("--format onnx is float32 and has no code beside it: leave out --dtype and --no_code.")
    _prepare_output(f"{args.directory}/")
    pipe = _from_pretrained(args)
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
    parser = _parser("push")
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


# --------------------------------------------------------------------------------------------- evaluate and compare


# Arguments of a pipeline's call that a report records
SAMPLING = ("num_inference_steps", "eta", "guidance_scale", "guidance_interval", "dynamic_thresholding", "temperature")


def evaluate_parser() -> argparse.ArgumentParser:
    from .evaluation.references import RealImages
    from .evaluation.report import Protocol
    from .flags import FlagParser

    parser = FlagParser(
        Protocol,
        RealImages,
        prog="tiny-diffusers evaluate",
        description="Writes report.json, report.md and report.png to CHECKPOINT/reports/NAME. `torchrun --nproc_per_node N -m "
        "tiny_diffusers.cli evaluate ...` (on GPUs also `accelerate launch -m`) shares the work among processes; a stopped "
        "evaluation resumes where it was.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", help="a folder, or owner/name on the Hub")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run the checkpoint's own code; read it first"
    )
    parser.add_argument("--images", metavar="DIR", help="evaluate these images, of any model, instead of a checkpoint")
    parser.add_argument(
        "--from_report",
        metavar="FILE",
        help="use the protocol of this report.json, and its model if none is given; other flags win over it",
    )
    parser.add_argument("--name", help="name of the report (default: made from the protocol, such as ddim-50)")
    parser.add_argument(
        "--publish",
        action="store_true",
        help="show this report in the checkpoint's card, and let it stand for the folder",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder of the report (default: CHECKPOINT/reports/NAME, or evaluation/reports/NAME if there is no folder)",
    )
    _add_sampling_arguments(parser)
    _add_guidance_interval(parser)
    _add_dynamic_thresholding(parser)
    _add_temperature(parser)
    return parser


def evaluate(args: argparse.Namespace) -> None:
    """Evaluates by the flags; what they leave open an earlier report says, or else the model's own run."""
    from .evaluation import Protocol, references
    from .evaluation.report import REPORT_FORMAT, Report, default_name, find_report
    from .runs import RunFolder

    given, earlier = evaluate_parser().given(args.argv), None
    if args.from_report:
        file = find_report(args.from_report)
        earlier = Report.load(file)
        given = _flags_of(earlier, file, given) | given
        args = argparse.Namespace(**vars(args) | given)
    if (args.checkpoint is None) == (args.images is None):
        raise UserError("Give either a CHECKPOINT or --images DIR to evaluate.")
    run = RunFolder(args.checkpoint) if args.checkpoint is not None and Path(args.checkpoint).is_dir() else None
    if args.publish and run is None:
        raise UserError("--publish is for a report of a checkpoint in a folder: leave it out.")
    _check_name(args)
    flags = {} if run is None or earlier is not None else references.flags_of_run(run, given)
    images = references.choose(given, flags)
    fields = [field.name for field in dataclasses.fields(Protocol) if field.name != "sampling"]
    protocol = Protocol(**{name: getattr(args, name) for name in fields})

    from .evaluation import evaluate as measure
    from .evaluation.evaluator import describe_images, describe_pipeline, processes
    from .evaluation.images import read_folder
    from .hub import add_results

    # 1. The images to measure, and the real ones
    state = processes()  # before anything is put on a device: each process has its own
    if args.images is not None:
        images_or_pipe = read_folder(args.images)
        channels, _, side = images_or_pipe.images.shape[1:]
        path, source = args.images, describe_images(args.images)
    else:
        images_or_pipe = _load_pipeline(args)
        channels, _, side = images_or_pipe._image_shape
        protocol = dataclasses.replace(
            protocol, sampling=_call_options(images_or_pipe.__call__, images_or_pipe, args, *SAMPLING)
        )
        path, source = args.checkpoint, describe_pipeline(images_or_pipe, protocol, args.checkpoint)
    reference, training, images = references.load_real_images(images, channels, side, state)
    if earlier is not None and earlier.measured_by["reference"]["fingerprint"] != reference.fingerprint:
        raise UserError(
            f"The reference images of '{args.from_report}' have changed since: its protocol can't be repeated."
        )
    load, paths = references.describe(images)

    # 2. The folder of the report, where no other is overwritten
    def is_free(folder: Path) -> bool:
        file = folder / "report.json"
        try:
            return not file.exists() or Report.load(file).asks_the_same(protocol.describe(), source, load)
        except UserError:  # of another version, or damaged
            return False

    reports = RunFolder("evaluation").reports if run is None else run.reports
    folder = _report_folder(args, reports, default_name(protocol, source), is_free)
    if run is not None and args.output is None:
        run.check_inside(folder / "report.json")
    _prepare_output(f"{folder}/")
    if state.is_main_process:
        is_own = bool(flags) and references.is_same_dataset(images.dataset_name, flags["dataset_name"])
        origin = f", as {run.config} has it" if is_own else ""
        say(f"data: {', '.join(f'{name} {value}' for name, value in load.items())}{origin}")

    # 3. The report
    notes = [] if run is None else references.find_mismatches(run, reference, training)
    if earlier is not None and earlier.format != REPORT_FORMAT:
        notes.append(
            f"The protocol is that of a report of version {earlier.format}. This one is of version {REPORT_FORMAT}, "
            "which computes some metrics differently: the two cannot be compared."
        )
    with refusals(), _left_if_filled(folder):
        report = measure(
            images_or_pipe,
            reference,
            protocol,
            training=training,
            output_dir=folder,
            name=path,
            load=load,
            notes=notes,
            command=public_command(["tiny-diffusers", "evaluate", *args.argv]),
        )
    if state.is_main_process:
        keep_paths(folder, {**paths, source["kind"]: str(Path(path).resolve())} if Path(path).exists() else paths)
        if args.publish:
            run.publish_report(folder.name)
            if run.card.is_file():
                add_results(run.path, report, folder.name)
        say(report.markdown())
        say(f"report: {folder / 'report.json'}")
    state.wait_for_everyone()
    state.destroy_process_group()  # left to the interpreter's exit, its threads sometimes abort the process


@contextlib.contextmanager
def _left_if_filled(folder: Path) -> Iterator[None]:
    """Deletes a folder, and the one that holds it, if they are empty after an error."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # it holds something
            folder.rmdir()
            folder.parent.rmdir()
        raise


def _check_name(args: argparse.Namespace) -> None:
    """Refuses contradictions in where the report goes."""
    if args.output is not None and (args.publish or args.name is not None):
        raise UserError("--output puts the report elsewhere: leave it out, or leave out --name and --publish.")
    if args.name is not None and not re.fullmatch(r"(?!published$)\w[\w.+-]*", args.name):
        raise UserError(
            f"--name '{args.name}': it must be the plain name of a folder, of letters, digits and _.+-, not 'published'."
        )


def _report_folder(args: argparse.Namespace, reports: Path, default: str, is_free: Callable[[Path], bool]) -> Path:
    """Returns the folder of a report; by default the first of NAME, NAME-2, ... that holds no report of another protocol."""
    if args.output is None and args.name is None:
        names = (f"{default}-{i}" if i > 1 else default for i in itertools.count(1))
        return next(reports / name for name in names if is_free(reports / name))
    folder = Path(args.output) if args.name is None else reports / args.name
    if not is_free(folder):
        raise UserError(f"{folder} holds a report of another protocol: give another name, or delete that one.")
    return folder


def _flags_of(report: "Report", file: Path, given: dict) -> dict:
    """
    Returns the flags that an earlier report was made with: what measures, checked as on the command line.

    A report is data, and may be a stranger's: it never says what to trust, which device to use, which files to load or
    where to write. The paths are those that this machine has kept, or the ones that are given.
    """
    from .evaluation.references import RealImages
    from .evaluation.report import Protocol
    from .flags import as_flags

    load, source = report.measured_by["reference"].get("load") or {}, report.source
    if not load:
        raise UserError(f"'{file}' was not made by this command, and doesn't say how its reference is loaded.")
    names = {field.name for field in (*dataclasses.fields(Protocol), *dataclasses.fields(RealImages))}
    names = {*names, *SAMPLING, "dtype", "scheduler"} - {"sampling", "feature_weights"}
    scheduler = source.get("scheduler", {})
    matching = (
        name
        for name, (class_name, options) in SCHEDULERS.items()
        if {"class": class_name, **options}.items() <= scheduler.items()
    )
    measured_with = {"dtype": source.get("dtype"), "scheduler": next(matching, None)}
    values = {**report.protocol, **report.protocol.get("sampling", {}), **load, **measured_with}
    values = {name: value for name, value in values.items() if name in names}
    if values.get("baselines") == []:
        values["baselines"] = "none"

    folder, name = load.get("train_data_dir"), str(values.get("dataset_name", ""))
    if folder is None and name != "digits" and local_path(name) is not None:
        folder = name
    if folder is not None:
        values["dataset_name"] = kept_paths(file.parent).get("dataset_name")
    needed = {
        "dataset_name": folder if values.get("dataset_name") is None else None,
        "feature_weights": report.protocol.get("feature_weights"),
    }
    for name, value in needed.items():
        if value is not None and name not in given:
            raise UserError(f"'{file}' was measured with files named '{value}': say where they are with --{name}.")
    try:
        parsed = evaluate_parser().given(as_flags(values))
    except UserError as error:
        raise UserError(f"'{file}' is damaged: {error}") from error
    flags = {name: value for name, value in parsed.items() if name in values}  # and none that a value spells
    return flags if given.keys() & {"checkpoint", "images"} else flags | _source_of(report, file)


def _source_of(report: "Report", file: Path) -> dict:
    """Returns the flag of what an earlier report measured: where it lies on this machine, or its name on the Hub."""
    from .runs import RunFolder

    kind, name = report.source.get("kind"), str(report.source.get("name"))
    paths = kept_paths(file.parent)
    if kind != "pipeline":
        folders = [paths.get("images")]
    else:  # the report lies in CHECKPOINT/reports/NAME, or in the checkpoint itself
        parents = file.resolve().parents
        holders = [parents[0], *(parents[2:3] if parents[1].name == "reports" else [])]
        folders = [folder for folder in holders if RunFolder(folder).model_index.is_file()]
        on_hub = name if name.count("/") == 1 and not Path(name).is_absolute() else None
        folders += [paths.get("pipeline"), on_hub]
    found = next((str(folder) for folder in folders if folder is not None), None)
    if found is None:
        raise UserError(f"'{file}' is of '{name}', which is not known here: give its CHECKPOINT or --images.")
    return {"checkpoint" if kind == "pipeline" else "images": found}


def compare_parser() -> argparse.ArgumentParser:
    parser = _parser("compare", "Refuses metrics of different protocols.")
    parser.add_argument(
        "reports", metavar="CHECKPOINT", nargs="+", help="folders of checkpoints or reports, or report.json files"
    )
    parser.add_argument("--output", metavar="FILE", type=Path, help="also write the table to this .md file")
    return parser


def compare(args: argparse.Namespace) -> None:
    from .evaluation.report import Report
    from .evaluation.report import compare as tabulate

    table = tabulate({name: Report.load(name) for name in args.reports})
    say(table)
    if args.output is not None:
        _make_parent(args.output)
        args.output.write_text(table, encoding="utf-8")


# ------------------------------------------------------------------------------------------------ plot and benchmark


def plot_parser() -> argparse.ArgumentParser:
    parser = _parser("plot")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="output folders of the train scripts")
    parser.add_argument(
        "--output", metavar="FILE", type=Path, default=Path("loss_curves.png"), help="default: loss_curves.png"
    )
    return parser


def plot(args: argparse.Namespace) -> None:
    from . import plots
    from .runs import RunFolder

    logs = {str(folder): RunFolder(folder).log for folder in args.runs}
    if args.output.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--output {args.output}: it must end in .png, .svg or .pdf.")
    _make_parent(args.output)
    if len(logs) == 1:
        plots.loss_curves(*logs.values(), args.output, title=args.runs[0].name)
    else:
        plots.compare_losses(logs, args.output)
    say(f"wrote {args.output}")


def benchmark_parser() -> argparse.ArgumentParser:
    from .benchmark import ROWS, Settings
    from .flags import FlagParser

    parser = FlagParser(
        Settings,
        prog="tiny-diffusers benchmark",
        description="Contenders take turns, and a ratio is the median of the rounds' ratios: run nothing else beside it. "
        "Prints a Markdown table row by row, and writes JSON with the facts of the machine.",
    )
    parser.add_argument("--rows", nargs="+", metavar="ROW", default=list(ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--output", type=Path, default=Path("benchmark.json"), metavar="FILE", help="JSON to write")
    return parser


def benchmark(args: argparse.Namespace) -> None:
    from .benchmark import Settings, run

    settings = Settings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)})
    run(settings, args.rows, args.output, args.command_line)


# ---------------------------------------------------------------------------------------------------- the commands


class Command(NamedTuple):
    help: str
    parser: Callable[[], argparse.ArgumentParser]
    run: Callable[[argparse.Namespace], int | None]


COMMANDS = {
    "train": Command("train a model", train_parser, train),
    "sample": Command("draw samples from a checkpoint", sample_parser, sample),
    "interpolate": Command("interpolate between two samples", interpolate_parser, interpolate),
    "evaluate": Command("measure the images of a checkpoint or a folder", evaluate_parser, evaluate),
    "compare": Command("tabulate several evaluated checkpoints", compare_parser, compare),
    "plot": Command("draw the losses of one or several runs", plot_parser, plot),
    "benchmark": Command("measure speed and memory against stock diffusers", benchmark_parser, benchmark),
    "export": Command("save a checkpoint with the code that it needs", export_parser, export),
    "push": Command("push a checkpoint's folder to the Hub", push_parser, push),
}


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


def _run(argv: list[str]) -> int | None:
    parser = _Parser(
        prog="tiny-diffusers",
        description="Train, sample, measure and share generative models of small images.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"tiny-diffusers {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.help, add_help=False)
    command = COMMANDS[parser.parse_args(argv[:1]).command]

    from .flags import expand_user

    args = expand_user(command.parser().parse_args(argv[1:]))
    args.argv, args.command_line = argv[1:], shlex.join(["tiny-diffusers", *argv])
    return command.run(args)


# ----------------------------------------------------------------------------------------------- shared arguments


def _parser(name: str, description: str | None = None) -> argparse.ArgumentParser:
    from .flags import OneLineParser

    return OneLineParser(
        prog=f"tiny-diffusers {name}", description=description or COMMANDS[name].help, allow_abbrev=False
    )


def _add_checkpoint_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder, or owner/name on the Hub")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run the checkpoint's own code; read it first"
    )


def _add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num_inference_steps", type=int, help="default: the pipeline's")
    parser.add_argument(
        "--scheduler",
        metavar="NAME",
        help=f"one of {', '.join(SCHEDULERS)} (default: the one saved with the checkpoint)",
    )
    parser.add_argument("--eta", type=float, help="noise of DDIM, from 0 (none) to 1 (as much as DDPM) (default: 0)")
    parser.add_argument(
        "--guidance_scale",
        type=float,
        help="1: the conditional model itself, above 1: more like the class, 0: no class",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="auto: bfloat16 if the hardware has it, else float32"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, ... (default: the accelerator, if there is one)")


def _add_guidance_interval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--guidance_interval",
        type=float,
        nargs=2,
        metavar=("START", "END"),
        help="share of the steps that are guided, from 0 at the noise to 1 at the image (default: 0 1)",
    )


def _add_dynamic_thresholding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dynamic_thresholding",
        type=float,
        metavar="P",
        help="percentile, such as 0.995, that keeps high guidance from saturating (default: the scheduler's setting)",
    )


def _add_temperature(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--temperature", type=float, help="temperature of a PixelCNN; below 1 likely values are drawn more often"
    )


def _add_output_argument(parser: argparse.ArgumentParser, default: str, help: str) -> None:
    parser.add_argument("--output", default=default, help=f"{help}: NAME.png, DIR/ (default: {default})")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) > MAX_SEED:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 0 to {MAX_SEED}")
    return int(text)


def _comma_separated(text: str) -> list[str]:
    return [item.strip() for item in text.split(",")]


def _two_seeds(text: str) -> tuple[int, int]:
    try:
        first, second = map(_seed, text.split(","))
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(
            f"'{text}' is not two whole numbers from 0 to {MAX_SEED}, such as 0,1"
        ) from None
    return first, second


def _picture(text: str) -> "Image.Image":
    from PIL import Image

    try:
        with Image.open(text) as picture:
            return picture.convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise argparse.ArgumentTypeError(f"'{text}' can't be read as a picture ({first_line(error)})") from None


def _load_pipeline(args: argparse.Namespace) -> "DiffusionPipeline":
    """Loads the pipeline on its device, in its dtype, with the scheduler that was asked for."""
    if args.scheduler is not None and args.scheduler not in SCHEDULERS:
        raise unknown("--scheduler", args.scheduler, SCHEDULERS)

    import diffusers
    import torch

    import tiny_diffusers

    from . import hardware
    from .pipelines.pipeline_tiny import check_scheduler

    num_threads = torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else None
    try:
        device = hardware.setup_torch(num_threads, args.device)
    except UserError as error:
        raise UserError(f"--device: {error}") from error
    dtype = hardware.resolve_dtype(args.dtype, device)
    if args.dtype == "auto" and dtype != torch.float32:
        say(f"{dtype}, which {device} has in hardware; --dtype float32 is slower and more exact", sys.stderr)

    pipe = _from_pretrained(args).to(device, dtype)
    if args.scheduler is not None:
        if "scheduler" not in pipe.components:
            raise UserError(
                f"--scheduler means nothing to '{args.checkpoint}', a {type(pipe).__name__}: leave it out."
            )
        name, options = SCHEDULERS[args.scheduler]
        scheduler_class = getattr(tiny_diffusers if name.startswith("Tiny") else diffusers, name)
        with refusals():
            check_scheduler(pipe.scheduler)  # whose config the other one takes
            pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config, **options)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.to(memory_format=torch.channels_last)  # the format of convolutions, so that none converts
    return pipe


def _from_pretrained(args: argparse.Namespace) -> "DiffusionPipeline":
    from diffusers.utils import logging

    from . import TinyPipeline

    logging.disable_progress_bar()  # of the loading, which is short
    logging.set_verbosity_error()  # no warnings about keys of our schedulers that another one ignores
    try:
        with refusals():
            return TinyPipeline.from_pretrained(args.checkpoint, trust_remote_code=args.trust_remote_code)
    except OSError as error:
        raise UserError(
            f"'{args.checkpoint}' can't be loaded: give a folder with a model_index.json, or the owner/name of a model "
            f"on the Hub ({first_line(error)})."
        ) from error


def _call_options(call: Callable, pipe: "DiffusionPipeline", args: argparse.Namespace, *names: str) -> dict:
    """Returns the named arguments that were given; `call`, the pipeline's own or its interpolation, must know them all."""
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    known = inspect.signature(call).parameters
    for name in options:
        if name not in known:
            raise UserError(f"--{name} means nothing to '{args.checkpoint}', a {type(pipe).__name__}: leave it out.")
    return options


def _prepare_output(text: str) -> Path:
    """
    Creates the output's folder (`text` itself if it ends in a slash, has no suffix or is a folder already), and refuses
    now what could not be written after the work is done.
    """
    path = Path(text)
    is_folder = text.endswith(("/", os.sep)) or not path.suffix or path.is_dir()
    if not is_folder and path.suffix.lower() not in PICTURE_SUFFIXES:
        raise unknown("picture format", path.suffix, PICTURE_SUFFIXES)
    folder = path if is_folder else path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"'{folder}' can't be written to ({error.strerror}): give another place.") from error
    return path


def _make_parent(path: Path) -> None:
    """Creates the folder that a file goes to."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"'{path.parent}' can't be created ({error.strerror}): give another --output.") from error


def _numbered(folder: Path, count: int) -> list[Path]:
    """Lists the files of `count` images in a folder: 00000.png, 00001.png, ..."""
    digits = max(5, len(str(count - 1)))
    return [folder / f"{i:0{digits}}.png" for i in range(count)]


def _check_numbered(output: Path, count: int) -> None:
    """Refuses a folder in which numbered images of an earlier call would be left among the `count` new ones."""
    if output.is_dir():
        earlier = {path for path in output.glob("*.png") if path.stem.isdecimal()} - set(_numbered(output, count))
        if earlier:
            raise UserError(
                f"'{output}' holds more numbered images than the {count} to be saved, such as {min(earlier).name}, and "
                "they would be mixed: remove them, or name another folder."
            )


def _save_numbered(images: list["Image.Image"], folder: Path) -> None:
    for image, path in zip(images, _numbered(folder, len(images)), strict=True):
        image.save(path)


if __name__ == "__main__":
    sys.exit(main())
