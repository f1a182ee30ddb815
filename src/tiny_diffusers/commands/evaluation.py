"""`tiny-diffusers evaluate` and `compare`."""

import argparse
import contextlib
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError, refusals, say
from ..paths import keep_paths, kept_paths, local_path, public_command
from ..samplers import SCHEDULERS
from .shared import (
    CHECKPOINT_HELP,
    add_dynamic_thresholding,
    add_guidance_interval,
    add_sampling_arguments,
    add_temperature,
    call_options,
    checkpoint_name,
    load_pipeline,
    make_parent,
    make_parser,
    prepare_output,
)


if TYPE_CHECKING:
    from ..evaluation import Report


# Arguments of a pipeline's call that a report records
SAMPLING = (
    "num_inference_steps",
    "eta",
    "clip_sample",
    "guidance_scale",
    "guidance_interval",
    "dynamic_thresholding",
    "temperature",
)


def evaluate_parser() -> argparse.ArgumentParser:
    from ..evaluation.references import RealImages
    from ..evaluation.report import Protocol
    from ..flags import FlagParser

    parser = FlagParser(
        Protocol,
        RealImages,
        prog="tiny-diffusers evaluate",
        description="Measures the images of a checkpoint or a folder against real images, and writes report.json, "
        "report.md and report.png to CHECKPOINT/reports/NAME. `torchrun --nproc_per_node N -m "
        "tiny_diffusers.cli evaluate ...` (on GPUs also `accelerate launch -m`) shares the work among "
        "processes; a stopped evaluation resumes where it was.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=checkpoint_name, nargs="?", help=CHECKPOINT_HELP)
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run the checkpoint's own code; read it first"
    )
    parser.add_argument("--images", metavar="DIR", help="evaluate these images, of any model, instead of a checkpoint")
    parser.add_argument(
        "--from_report",
        metavar="FILE",
        help="use the protocol of this report.json, and its model if none is given; other flags override it",
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
        help="folder of the report (default: CHECKPOINT/reports/NAME, or evaluation/reports/NAME for a model by name or of the Hub)",
    )
    add_sampling_arguments(parser)
    add_guidance_interval(parser)
    add_dynamic_thresholding(parser)
    add_temperature(parser)
    return parser


def evaluate(args: argparse.Namespace) -> None:
    """Evaluates by the flags; what they leave open an earlier report says, or else the model's own run."""
    from .. import zoo
    from ..evaluation import Protocol, references
    from ..evaluation.report import REPORT_FORMAT, Report, default_name, find_report
    from ..runs import RunFolder

    given, earlier = evaluate_parser().given(args.argv), None
    if args.checkpoint is not None and not given.keys().isdisjoint(("channels", "value_range")):
        raise UserError("--channels and --value_range are for --images: of a CHECKPOINT they are the model's.")
    if args.from_report:
        file = find_report(args.from_report)
        earlier = Report.load(file)
        given = _flags_of(earlier, file, given) | given
        args = argparse.Namespace(**vars(args) | given)
    if (args.checkpoint is None) == (args.images is None):
        raise UserError("Give either a CHECKPOINT or --images DIR to evaluate.")
    run = RunFolder(args.checkpoint) if args.checkpoint is not None and Path(args.checkpoint).is_dir() else None
    is_installed = run is not None and zoo.is_installed(args.checkpoint)  # where no report belongs
    if args.publish and (run is None or is_installed):
        raise UserError("--publish is for a report of a checkpoint in a folder: leave it out.")
    _check_name(args)
    if args.checkpoint is not None and run is None and "dataset_name" not in given:
        raise UserError(
            f"There is no folder '{args.checkpoint}', whose run would say what it was trained on: name its folder, or, for a "
            "model on the Hub, give the real images to measure against by --dataset_name."
        )
    flags = {} if run is None or earlier is not None else references.flags_of_run(run, given)
    images = references.choose(given, flags)
    fields = [field.name for field in dataclasses.fields(Protocol) if field.name != "sampling"]
    protocol = Protocol(**{name: getattr(args, name) for name in fields})

    from ..cards import add_results
    from ..evaluation import evaluate as measure
    from ..evaluation.drawing import describe_images, describe_pipeline
    from ..evaluation.evaluator import processes
    from ..evaluation.images import read_folder, round_to_8_bits
    from ..hardware import last_barrier

    # 1. The images to measure, and the real ones
    state = processes()  # before anything is put on a device: each process has its own
    conditioning = None
    if args.images is not None:
        images_or_pipe = read_folder(args.images, images.channels)
        shape, value_range = tuple(images_or_pipe.images.shape[1:]), None
        path, source = args.images, describe_images(args.images)
    else:
        images_or_pipe = load_pipeline(args)
        shape, value_range = images_or_pipe._image_shape, images_or_pipe._value_range
        conditioning = getattr(images_or_pipe, "_conditioning", None)
        protocol = dataclasses.replace(
            protocol, sampling=call_options(images_or_pipe.__call__, images_or_pipe, args, *SAMPLING)
        )
        path, source = args.checkpoint, describe_pipeline(images_or_pipe, protocol, args.checkpoint)
    conditioning_channels = None if conditioning is None else conditioning.shape[0]
    reference, training, images = references.load_real_images(images, shape, state, conditioning_channels, value_range)
    if args.images is not None and images_or_pipe.value_range != reference.value_range:
        images_or_pipe = read_folder(args.images, images.channels, reference.value_range or (0.0, 1.0))
        if reference.value_range is None:  # arrays of 8-bit images lie in [0, 1], as `sample` saves them
            images_or_pipe = round_to_8_bits(images_or_pipe)
    if earlier is not None and earlier.measured_by["reference"]["fingerprint"] != reference.fingerprint:
        raise UserError(
            f"The reference images of '{args.from_report}' have changed since: its protocol can't be repeated."
        )
    load, paths = references.describe(images)

    # 2. The folder of the report, where no other is overwritten
    def is_free(folder: Path) -> bool:
        return not (folder / "report.json").exists() or bool(
            Report.load_same(folder, protocol.describe(), source, load)
        )

    reports = RunFolder("evaluation").reports if run is None or is_installed else run.reports
    folder = _report_folder(args, reports, default_name(protocol, source), is_free)
    if run is not None and not is_installed and args.output is None:
        run.check_inside(folder / "report.json")
    created = [path for path in (folder, folder.parent) if not path.exists()]
    prepare_output(f"{folder}/")
    if state.is_main_process:
        is_own = bool(flags) and references.is_same_dataset(images.dataset_name, flags["dataset_name"])
        origin = f", as {run.config} has it" if is_own else ""
        place = f" ({paths['dataset_name']})" if "dataset_name" in paths else ""
        say(f"data: {', '.join(f'{name} {value}' for name, value in load.items())}{place}{origin}")

    # 3. The report
    notes = [] if run is None else references.find_mismatches(run, reference, training)
    if args.images is not None:
        notes += [f"The images to measure have {note}." for note in images_or_pipe.notes if "clipped" in note]
    if earlier is not None and earlier.format != REPORT_FORMAT:
        notes.append(
            f"The protocol is that of a report of version {earlier.format}. This one is of version {REPORT_FORMAT}, "
            "which computes some metrics differently: the two cannot be compared."
        )
    with refusals(), _removed_if_empty(created):
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
    last_barrier()
    state.destroy_process_group()  # left to the interpreter's exit, its threads sometimes abort the process


@contextlib.contextmanager
def _removed_if_empty(folders: list[Path]) -> Iterator[None]:
    """Deletes the folders, in this order, that are empty after an error."""
    try:
        yield
    except BaseException:
        for folder in folders:
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()
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
    from ..evaluation.references import RealImages
    from ..evaluation.report import Protocol
    from ..flags import as_flags

    load, source = report.measured_by["reference"].get("load") or {}, report.source
    if not load:
        raise UserError(f"'{file}' was not made by this command, and doesn't say how its reference is loaded.")
    names = {field.name for field in (*dataclasses.fields(Protocol), *dataclasses.fields(RealImages))}
    names = {*names, *SAMPLING, "dtype", "scheduler", "timestep_spacing"} - {"sampling", "feature_weights"}
    scheduler = source.get("scheduler", {})
    matching = (
        name
        for schedulers in SCHEDULERS.values()
        for name, (class_name, options) in schedulers.items()
        if {"class": class_name, **options}.items() <= scheduler.items()
    )
    measured_with = {
        "dtype": source.get("dtype"),
        "scheduler": next(matching, None),
        "timestep_spacing": scheduler.get("timestep_spacing"),
    }
    sampling = report.protocol.get("sampling", {})
    if given.keys() & {"checkpoint", "scheduler"}:  # it may have no such setting, and has defaults of its own
        names.discard("timestep_spacing")
    else:  # the defaults of that time
        sampling = {name: source.get("sampling", {}).get(name) for name in ("num_inference_steps", "eta")} | sampling
        sampling = {name: value for name, value in sampling.items() if value is not None}
    values = {**report.protocol, **sampling, **load, **measured_with}
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
    from ..runs import RunFolder

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
    parser = make_parser(
        "compare", "Tabulates the metrics of several checkpoints, or runs. Metrics of different protocols are refused."
    )
    parser.add_argument(
        "reports", metavar="CHECKPOINT", nargs="+", help="folders of checkpoints or reports, or report.json files"
    )
    parser.add_argument(
        "--settings",
        action="store_true",
        help="tabulate runs: the settings that differ, losses, and the metrics of those that are evaluated",
    )
    parser.add_argument("--all_settings", action="store_true", help="the same, with all settings")
    parser.add_argument("--output", metavar="FILE", type=Path, help="also write the table to this .md file")
    return parser


def compare(args: argparse.Namespace) -> None:
    from ..evaluation import comparison
    from ..evaluation.report import Report

    if args.settings or args.all_settings:
        table = comparison.tabulate_runs(args.reports, args.all_settings)
    else:
        table = comparison.compare({name: Report.load(name) for name in args.reports})
    say(table)
    if args.output is not None:
        make_parent(args.output)
        args.output.write_text(table, encoding="utf-8")
