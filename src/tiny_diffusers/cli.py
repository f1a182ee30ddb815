"""
The command line: `tiny-diffusers COMMAND ...`.

A command is two functions side by side, `add_COMMAND`, which declares its arguments, and the one that runs it; `main`
finds it in `COMMANDS`. torch and diffusers are imported by what runs, so that `--help` answers at once.
"""

import argparse
import inspect
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError, unknown


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL import Image

# --scheduler -> the name of its class; this package's where it has it, and diffusers' otherwise
SCHEDULERS = {
    "ddim": "TinyDDIMScheduler",
    "ddpm": "TinyDDPMScheduler",
    "deis": "DEISMultistepScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "dpm_single": "DPMSolverSinglestepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "sde_dpm": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
# and what two of one class set
SCHEDULER_OPTIONS = {"dpm": {"algorithm_type": "dpmsolver++"}, "sde_dpm": {"algorithm_type": "sde-dpmsolver++"}}
DTYPES = ("auto", "float32", "bfloat16", "float16")
PICTURE_SUFFIXES = (".png", ".gif", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
FRAME_SIDE = 256  # pixels that the longer side of an animation's frames is enlarged towards
MAX_ROW = 16  # images of one class beside each other in a grid


def add_sample(commands) -> None:
    parser = commands.add_parser("sample", help="draw samples from a checkpoint", allow_abbrev=False)
    _add_pipeline_arguments(parser)
    parser.add_argument("--num_images", type=_positive, default=64, help="default: 64")
    parser.add_argument("--seed", type=int, default=0, help="image i has the seed SEED + i (default: 0)")
    parser.add_argument("--batch_size", type=_positive, default=64, help="images at a time (default: 64)")
    parser.add_argument(
        "--class_labels",
        type=_comma_separated,
        help="names or ids, such as cat,frog: the images are shared out evenly among them, in this order",
    )
    _add_guidance_interval(parser)
    parser.add_argument(
        "--dynamic_thresholding",
        type=float,
        metavar="P",
        help="percentile, such as 0.995, that keeps high guidance from saturating (default: the scheduler's way)",
    )
    _add_temperature(parser)
    parser.add_argument(
        "--return_intermediates",
        type=_positive,
        metavar="K",
        help="show K states on the way to each image too: a row for each image, from noise to what it became",
    )
    _add_output_argument(parser, "samples.png", "one picture of all images, or numbered PNGs in a folder")
    parser.set_defaults(run=sample)


def sample(args: argparse.Namespace) -> None:
    """Each image has a generator of its own, so that none depends on the batch size."""
    import torch

    from .plots import image_grid, strip

    output = _prepare_output(args.output)
    if args.return_intermediates and output.is_dir():
        raise UserError("--return_intermediates makes one picture of them all: give --output NAME.png.")
    pipe = _load_pipeline(args, "TinyPipeline")
    names = ("num_inference_steps", "eta", "class_labels", "guidance_scale", "guidance_interval")
    options = _call_options(pipe, args, *names, "dynamic_thresholding", "temperature", "return_intermediates")
    labels = options.pop("class_labels", None)
    if labels is not None:
        if len(labels) > args.num_images:
            raise UserError(
                f"--num_images {args.num_images} is less than the {len(labels)} --class_labels: give more."
            )
        labels = [labels[i * len(labels) // args.num_images] for i in range(args.num_images)]

    images, states = [], [[] for _ in range(args.return_intermediates or 0)]
    began = time.perf_counter()
    for start in range(0, args.num_images, args.batch_size):
        stop = min(start + args.batch_size, args.num_images)
        pipe.set_progress_bar_config(desc=f"images {start + 1} to {stop} of {args.num_images}")
        generator = [torch.Generator("cpu").manual_seed(args.seed + i) for i in range(start, stop)]
        if labels is not None:
            options["class_labels"] = labels[start:stop]
        drawn = pipe(batch_size=stop - start, generator=generator, **options)
        images += drawn.images
        for state, intermediate in zip(states, drawn.intermediates or [], strict=True):
            state += intermediate.sample
    seconds = time.perf_counter() - began

    if output.is_dir():
        _save_numbered(images, output)
    elif states:
        strip([*states, images], row_labels=labels).save(output)
    else:
        image_grid(images, **_class_rows(labels)).save(output)
    print(f"{len(images)} images in {seconds:.1f} s, {len(images) / seconds:.1f} a second: {output}")


def _class_rows(labels: list[str] | None) -> dict:
    """How a grid shows classes, where its rows can be of one class each: its columns and the rows' labels."""
    if labels is None:
        return {}
    per_class = labels.count(labels[0])
    columns = next((n for n in range(min(per_class, MAX_ROW), 1, -1) if per_class % n == 0), None)
    rows = [set(labels[i : i + columns]) for i in range(0, len(labels), columns)] if columns else []
    if not rows or any(len(row) > 1 for row in rows):
        return {}
    return {"columns": columns, "row_labels": [row.pop() for row in rows]}


def add_interpolate(commands) -> None:
    parser = commands.add_parser("interpolate", help="walk from one sample to another", allow_abbrev=False)
    _add_pipeline_arguments(parser)
    parser.add_argument("--seeds", type=_two_seeds, help="of the two ends (default: 0,1)")
    parser.add_argument(
        "--images", type=_picture, nargs=2, metavar="FILE", help="two pictures to walk between, in place of seeds"
    )
    parser.add_argument("--interpolation", help="slerp, or linear, whose frames between are smoother (default: slerp)")
    parser.add_argument(
        "--num_frames", type=int, default=16, help="images on the way, its ends among them (default: 16)"
    )
    parser.add_argument(
        "--class_labels", type=_comma_separated, help="a name or id for the whole way, or one for each end: cat,frog"
    )
    _add_guidance_interval(parser)
    _add_output_argument(
        parser, "interpolation.gif", "an animation (.gif), one picture of all frames, or numbered PNGs in a folder"
    )
    parser.set_defaults(run=interpolate)


def interpolate(args: argparse.Namespace) -> None:
    from diffusers.utils import export_to_gif
    from PIL import Image

    from .plots import image_grid

    output = _prepare_output(args.output)
    pipe = _load_pipeline(args, "TinyInterpolationPipeline")
    if args.seeds is None and args.images is None:
        args.seeds = (0, 1)
    names = ("num_inference_steps", "eta", "class_labels", "guidance_scale", "guidance_interval", "interpolation")
    options = _call_options(pipe, args, *names, "seeds", "images")
    frames = pipe(num_frames=args.num_frames, **options).images

    if output.is_dir():
        _save_numbered(frames, output)
    elif output.suffix.lower() == ".gif":
        width, height = frames[0].size
        scale = max(1, FRAME_SIDE // max(width, height))
        frames = [frame.resize((width * scale, height * scale), Image.Resampling.NEAREST) for frame in frames]
        export_to_gif(frames, str(output))
    else:
        image_grid(frames, columns=min(len(frames), MAX_ROW)).save(output)
    print(f"{len(frames)} frames: {output}")


def add_export(commands) -> None:
    parser = commands.add_parser(
        "export",
        help="save a checkpoint with the code that it needs, for those who have only diffusers",
        allow_abbrev=False,
    )
    _add_checkpoint_argument(parser)
    parser.add_argument("directory", type=Path, metavar="DIR", help="where to save it")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="the weights' format; the others halve the file (default: float32)",
    )
    parser.add_argument("--no_code", action="store_true", help="leave the code out: it loads with this package alone")
    parser.set_defaults(run=export)


def export(args: argparse.Namespace) -> None:
    """The card, the pictures and the log come along, where the checkpoint is a folder that has them."""
    import torch

    from . import hub

    source = Path(args.checkpoint)
    if source.exists() and args.directory.exists() and source.samefile(args.directory):
        raise UserError(f"'{args.directory}' is the checkpoint itself: give another folder to export it to.")
    _prepare_output(f"{args.directory}/")
    pipe = _from_pretrained("TinyPipeline", args)
    if args.dtype != "float32":
        pipe.to(getattr(torch, args.dtype))
    hub.export(pipe, args.directory, with_code=not args.no_code)
    if source.is_dir():
        for pattern in ("README.md", "*.png", "*.jsonl", "config.yaml", "run.json", "report.json"):
            for file in source.glob(pattern):
                shutil.copyfile(file, args.directory / file.name)
    print(f"exported to {args.directory}")


def add_push(commands) -> None:
    parser = commands.add_parser("push", help="push a checkpoint's folder to the Hub", allow_abbrev=False)
    parser.add_argument("directory", metavar="DIR", help="the folder that a run or a pipeline was saved in")
    parser.add_argument("repo_id", metavar="OWNER/NAME", help="where to push; made if it doesn't exist")
    parser.add_argument("--private", action="store_true", help="keep a repository that is made here private")
    parser.set_defaults(run=push)


def push(args: argparse.Namespace) -> None:
    """The token is the one of `hf auth login` or `HF_TOKEN`: a flag for it would be kept in the shell's history."""
    from . import hub

    print(hub.push(args.directory, args.repo_id, private=args.private))


def add_evaluate(commands) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="measure a checkpoint's images, or a folder of images, against real ones",
        description="Writes report.json, report.md and report.png, and the figures into the checkpoint's card. `torchrun "
        "--nproc_per_node N -m tiny_diffusers.cli evaluate ...` (on GPUs also `accelerate launch -m`) shares the work among "
        "processes; a stopped run goes on where it was.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", help="a folder, or owner/name on the Hub")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run the code that the checkpoint brings; read it first"
    )
    parser.add_argument("--images", metavar="DIR", help="measure these images, of any model, in place of a checkpoint")
    parser.add_argument(
        "--from_report",
        metavar="FILE",
        help="the very protocol of this report.json; of its model too, if none is given",
    )
    _add_sampling_arguments(parser)
    _add_temperature(parser)
    parser.add_argument("--seed", type=int, default=0, help="image i has the seed SEED + i (default: 0)")
    parser.add_argument("--batch_size", type=_positive, default=64, help="images drawn at a time (default: 64)")

    data = parser.add_argument_group("the reference")
    data.add_argument("--dataset_name", help="real images: a Hub id, a folder, or digits")
    data.add_argument("--dataset_config_name", help="the configuration of a data set that has several")
    data.add_argument("--split", default="test", help="real images to measure against (default: test)")
    data.add_argument(
        "--train_split", help="what the model was trained on, or none (default: train, where there is one)"
    )
    data.add_argument("--classes", help="names or ids, such as cat,frog, where the model knows only these")

    measures = parser.add_argument_group("the measure")
    measures.add_argument(
        "--kind", default="samples", help="samples, or a VAE's reconstructions of the real images (default: samples)"
    )
    measures.add_argument("--num_images", type=_positive, default=10_000, help="default: 10000")
    measures.add_argument(
        "--features",
        default="efficientnet-lite0",
        help="inception, dinov2, efficientnet-lite0 or pixels (default: efficientnet-lite0)",
    )
    measures.add_argument("--feature_weights", metavar="PATH", help="the weights of inception or dinov2")
    measures.add_argument(
        "--feature_dtype", default="float32", help="float32, or bfloat16, which is faster (default: float32)"
    )
    measures.add_argument(
        "--metrics",
        type=_comma_separated,
        help="frechet_distance, frechet_infinity, kernel_distance, inception_score, precision_recall, density_coverage, "
        "diversity, nearest_neighbour, bits_per_dim, or all (default: all but the last two, which take long)",
    )
    measures.add_argument(
        "--baselines", type=_comma_separated, help="of real, blurred, pixel_gaussian, noise, or none (default: all)"
    )
    measures.add_argument(
        "--num_bootstrap", type=int, default=20, help="resamples of an error bar (default: 20; 0: none)"
    )
    measures.add_argument("--likelihood_images", type=_positive, default=256, help="of bits_per_dim (default: 256)")
    parser.add_argument(
        "--output", metavar="DIR", help="default: the checkpoint's folder, or evaluation/ where it is none"
    )
    parser.set_defaults(run=evaluate)


def evaluate(args: argparse.Namespace) -> None:
    """A report says how its images and its reference were had: with `--from_report` its arguments take the place of ours."""
    import shlex

    from .evaluation import METRICS, Protocol, Report

    earlier = Report.load(args.from_report) if args.from_report else None
    if earlier is not None:
        _take_arguments(args, earlier)
    if (args.checkpoint is None) == (args.images is None):
        raise UserError("Give either a CHECKPOINT or --images DIR to evaluate.")
    if args.dataset_name is None:
        raise UserError("Give the real images to measure against: --dataset_name, a Hub id, a folder, or digits.")
    metrics = {"metrics": list(METRICS) if args.metrics == ["all"] else args.metrics} if args.metrics else {}
    baselines = {"baselines": [name for name in args.baselines if name != "none"]} if args.baselines else {}
    protocol = Protocol(
        kind=args.kind,
        seed=args.seed,
        batch_size=args.batch_size,
        features=args.features,
        feature_weights=args.feature_weights,
        feature_dtype=args.feature_dtype,
        num_images=args.num_images,
        num_bootstrap=args.num_bootstrap,
        likelihood_images=args.likelihood_images,
        **metrics,
        **baselines,
    )
    folder = args.output or (args.checkpoint if args.checkpoint and Path(args.checkpoint).is_dir() else "evaluation")
    if args.output is None and args.kind != "samples":  # the checkpoint's own report, and its card, are of samples
        folder = Path(folder, args.kind)
    _prepare_output(f"{folder}/")

    from .evaluation import evaluate as measure
    from .evaluation.evaluator import processes
    from .evaluation.images import read_folder

    state = processes()  # before anything is put on a device: each has its own
    if args.images is not None:
        source, name = read_folder(args.images), args.images
        size = {"resolution": source.images.shape[-1], "channels": source.images.shape[1]}
    else:
        source, name = _load_pipeline(args, "TinyPipeline"), args.checkpoint
        channels, _, width = source._image_shape
        size = {"resolution": width, "channels": channels}
        protocol.sampling = _call_options(source, args, "num_inference_steps", "eta", "guidance_scale", "temperature")
    load = {
        "dataset_name": args.dataset_name,
        "dataset_config_name": args.dataset_config_name,
        "classes": args.classes,
    }
    reference, training = _load_real_images(args, load | size, state)
    if earlier is not None and earlier.measured_by["reference"]["fingerprint"] != reference.fingerprint:
        raise UserError(
            f"The reference images of '{args.from_report}' have changed since: its protocol can't be repeated."
        )

    report = measure(
        source,
        reference,
        protocol,
        training=training,
        output_dir=folder,
        name=name,
        load=load | {"split": args.split, "train_split": args.train_split},
        command=shlex.join(["tiny-diffusers", *sys.argv[1:]]),
    )
    if state.is_main_process:
        if Path(folder, "README.md").is_file() and Path(folder, "model_index.json").is_file():
            from .hub import add_results

            add_results(folder, report)
        print(report.markdown())
        print(f"report: {Path(folder, 'report.json')}")
    state.wait_for_everyone()
    state.destroy_process_group()  # left to the interpreter's exit, its threads sometimes abort the process


def _take_arguments(args: argparse.Namespace, report) -> None:
    """What a report was made with, into the arguments of the command that repeats it."""
    load = report.measured_by["reference"].get("load") or {}
    if not load:
        raise UserError(
            f"'{args.from_report}' was not made by this command, and doesn't say how its reference is loaded."
        )
    if args.checkpoint is None and args.images is None:
        kind = "checkpoint" if report.source["kind"] == "pipeline" else "images"
        setattr(args, kind, report.source["name"])
    settings = report.protocol | load | report.protocol["sampling"]
    scheduler = report.source.get("scheduler", {})
    known = {name: {"class": cls} | SCHEDULER_OPTIONS.get(name, {}) for name, cls in SCHEDULERS.items()}
    settings["scheduler"] = next(
        (name for name, options in known.items() if options.items() <= scheduler.items()), None
    )
    settings["dtype"] = report.source.get("dtype", args.dtype)
    for name, value in settings.items():
        if hasattr(args, name):
            setattr(args, name, value)
    args.baselines = report.protocol["baselines"] or ["none"]


def _load_real_images(args: argparse.Namespace, options: dict, state):
    """The reference and, where there is one, the training set; decoded by one process and read by the others."""
    from .data import load_images

    with state.main_process_first():
        if args.dataset_name == "digits":  # which have one split alone
            return load_images(split="train", **options), None
        reference = load_images(split=args.split, **options)
        if args.train_split == "none":
            return reference, None
        try:
            return reference, load_images(split=args.train_split or "train", **options)
        except UserError as error:
            if args.train_split is not None:
                raise
            print(f"no training set: {error}", file=sys.stderr)
            return reference, None


def add_compare(commands) -> None:
    parser = commands.add_parser(
        "compare",
        help="one table over several evaluated checkpoints or reports",
        description="Refuses figures of different protocols.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "reports", metavar="CHECKPOINT", nargs="+", help="folders that were evaluated, or report.json files"
    )
    parser.add_argument("--output", metavar="FILE", type=Path, help="write the table to this .md file too")
    parser.set_defaults(run=compare)


def compare(args: argparse.Namespace) -> None:
    from .evaluation.report import Report
    from .evaluation.report import compare as tabulate

    table = tabulate({name: Report.load(name) for name in args.reports})
    print(table)
    if args.output is not None:
        args.output.write_text(table, encoding="utf-8")


def add_plot(commands) -> None:
    parser = commands.add_parser("plot", help="draw the losses of one or several runs", allow_abbrev=False)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="output folders of the train scripts")
    parser.add_argument(
        "--output", metavar="FILE", type=Path, default=Path("loss_curves.png"), help="a picture to write"
    )
    parser.set_defaults(run=plot)


def plot(args: argparse.Namespace) -> None:
    from . import plots

    logs = {str(folder): folder / "train_log.jsonl" for folder in args.runs}
    if args.output.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--output {args.output}: it must end in .png, .svg or .pdf.")
    if len(logs) == 1:
        plots.loss_curves(*logs.values(), args.output, title=args.runs[0].name)
    else:
        plots.compare_losses(logs, args.output)
    print(f"wrote {args.output}")


def add_benchmark(commands) -> None:
    parser = commands.add_parser(
        "benchmark",
        help="measure this package's speed and memory on this machine, against stock diffusers",
        description="Contenders run in turns, and a ratio is the median of the rounds' own: let nothing else run beside it. "
        "Prints a table in Markdown as it goes, and writes JSON with the machine's facts.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        metavar="ROW",
        help="of training, sampling, memory, data, start, evaluation, quality, compile, scaling (default: the first six)",
    )
    parser.add_argument("--compile", action="store_true", help="the row compile too: blocks compiled against not")
    parser.add_argument(
        "--scaling", action="store_true", help="the rows scaling too: cost by resolution, batch and width"
    )
    parser.add_argument("--rounds", type=_positive, default=5, help="turns of each contender (default: 5)")
    parser.add_argument(
        "--sampling_steps", type=_positive, default=50, help="fewer make the row sampling shorter (default: 50)"
    )
    parser.add_argument(
        "--batch_size", type=_positive, default=64, help="images of a step, and of a call (default: 64)"
    )
    parser.add_argument("--resolution", type=_positive, default=32, help="side of the images (default: 32)")
    parser.add_argument(
        "--block_out_channels",
        type=_positive,
        nargs="+",
        default=[64, 128, 128],
        help="widths of both networks' levels (default: 64 128 128)",
    )
    parser.add_argument(
        "--layers_per_block", type=_positive, default=2, help="residual blocks of a level, in both (default: 2)"
    )
    parser.add_argument("--num_threads", type=_positive, help="CPU threads (default: the physical cores)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="what this package computes in (default: what it chooses)"
    )
    parser.add_argument(
        "--dataset_name", help="images for the rows data (default: noise) and quality: a Hub id or a folder"
    )
    parser.add_argument("--checkpoint", help="diffusion model for the row quality: a Hub id or a folder")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmark.json"), metavar="FILE", help="default: benchmark.json"
    )
    parser.set_defaults(run=benchmark)


def benchmark(args: argparse.Namespace) -> None:
    """The JSON is written anew after each row, so that what was measured outlives an interruption."""
    import dataclasses
    import json
    import shlex

    from .benchmark import DEFAULT_ROWS, HEADER, Settings, machine, measure

    settings = Settings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)})
    rows = list(args.rows or DEFAULT_ROWS)
    rows += [name for name in ("compile", "scaling") if getattr(args, name) and name not in rows]
    if args.output.parent.is_file() or args.output.is_dir():
        raise UserError(f"--output {args.output}: give the name of a file to write to, such as benchmark.json.")
    args.output.parent.mkdir(parents=True, exist_ok=True)

    facts = machine(settings)
    print(", ".join(f"{name.replace('_', ' ')} {fact}" for name, fact in facts.items()), f"\n\n{HEADER}", sep="\n")
    result = {
        "command": shlex.join(["tiny-diffusers", *sys.argv[1:]]),
        "machine": facts,
        "settings": dataclasses.asdict(settings),
        "rows": [],
    }
    for row in measure(settings, rows):
        print(row.markdown(), flush=True)
        result["rows"].append(row.as_dict())
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


COMMANDS = (add_sample, add_interpolate, add_evaluate, add_compare, add_plot, add_benchmark, add_export, add_push)


def _add_checkpoint_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder, or owner/name on the Hub")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run the code that the checkpoint brings; read it first"
    )


def _add_pipeline_arguments(parser: argparse.ArgumentParser) -> None:
    _add_checkpoint_argument(parser)
    _add_sampling_arguments(parser)


def _add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num_inference_steps", type=int, help="default: the pipeline's")
    parser.add_argument(
        "--scheduler",
        metavar="NAME",
        help=f"one of {', '.join(SCHEDULERS)} (default: the one saved with the checkpoint)",
    )
    parser.add_argument("--eta", type=float, help="noise of DDIM: 0 has none, 1 has as much as DDPM (default: 0)")
    parser.add_argument(
        "--guidance_scale", type=float, help="1: the plain conditional model, above: more like its class, 0: no class"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="auto: bfloat16 where the hardware has it, otherwise float32"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, ... (default: the accelerator that there is)")


def _add_guidance_interval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--guidance_interval",
        type=float,
        nargs=2,
        metavar=("START", "END"),
        help="the share of the steps that are guided, from 0 at the noise to 1 at the image (default: 0 1)",
    )


def _add_temperature(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--temperature", type=float, help="of a PixelCNN; below 1 the likelier is drawn more often")


def _add_output_argument(parser: argparse.ArgumentParser, default: str, help: str) -> None:
    parser.add_argument("--output", default=default, help=f"{help}: NAME.png, DIR/ (default: {default})")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def _comma_separated(text: str) -> list[str]:
    return [item.strip() for item in text.split(",")]


def _two_seeds(text: str) -> tuple[int, int]:
    try:
        first, second = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not two whole numbers, such as 0,1") from None
    return first, second


def _picture(text: str) -> "Image.Image":
    from PIL import Image

    try:
        with Image.open(text) as picture:
            return picture.convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise argparse.ArgumentTypeError(f"'{text}' can't be read as a picture ({_first_line(error)})") from None


def _load_pipeline(args: argparse.Namespace, class_name: str) -> "DiffusionPipeline":
    """The pipeline on its device, in its number format, with the scheduler that was asked for."""
    if args.scheduler is not None and args.scheduler not in SCHEDULERS:
        raise unknown("--scheduler", args.scheduler, SCHEDULERS)

    import diffusers
    import torch

    import tiny_diffusers

    from . import hardware

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(hardware.physical_cores())
    try:
        device = torch.device(args.device) if args.device else hardware.default_device()
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch that was built without CUDA
        raise UserError(f"--device {args.device} can't be used here: {_first_line(error)}") from error
    if device.type == "cpu":
        hardware.keep_freed_memory()
    dtype = hardware.dtype_called(args.dtype, device)
    if args.dtype == "auto" and dtype != torch.float32:
        print(f"{dtype}, which {device} has in hardware; --dtype float32 is slower and more exact", file=sys.stderr)

    pipe = _from_pretrained(class_name, args).to(device, dtype)
    if args.scheduler is not None:
        if "scheduler" not in pipe.components:
            raise UserError(
                f"--scheduler means nothing to '{args.checkpoint}', a {type(pipe).__name__}: leave it out."
            )
        name = SCHEDULERS[args.scheduler]
        scheduler_class = getattr(tiny_diffusers if name.startswith("Tiny") else diffusers, name)
        options = SCHEDULER_OPTIONS.get(args.scheduler, {})
        pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config, **options)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.to(memory_format=torch.channels_last)  # what convolutions compute in, so that none converts
    return pipe


def _from_pretrained(class_name: str, args: argparse.Namespace) -> "DiffusionPipeline":
    from diffusers.utils import logging

    import tiny_diffusers

    logging.disable_progress_bar()  # of the loading, which is short
    logging.set_verbosity_error()  # no word on the keys of our schedulers that another one has no use for
    try:
        return getattr(tiny_diffusers, class_name).from_pretrained(
            args.checkpoint, trust_remote_code=args.trust_remote_code
        )
    except OSError as error:
        raise UserError(
            f"'{args.checkpoint}' can't be loaded: give a folder with a model_index.json, or the owner/name of a model "
            f"on the Hub ({_first_line(error)})."
        ) from error


def _call_options(pipe: "DiffusionPipeline", args: argparse.Namespace, *names: str) -> dict:
    """Those of the named arguments that were given, all of which the pipeline's call must know."""
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    known = inspect.signature(pipe.__call__).parameters
    for name in options:
        if name not in known:
            raise UserError(f"--{name} means nothing to '{args.checkpoint}', a {type(pipe).__name__}: leave it out.")
    return options


def _prepare_output(text: str) -> Path:
    """
    Makes the folder that the output goes into (`text` itself where it ends in a slash, has no suffix or is a folder
    already) and refuses now what could not be written after the work is done.
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


def _save_numbered(images: list["Image.Image"], folder: Path) -> None:
    digits = max(5, len(str(len(images) - 1)))
    for i, image in enumerate(images):
        image.save(folder / f"{i:0{digits}}.png")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def main(argv: list[str] | None = None) -> int:
    """
    Runs one command.

    Args:
        argv (`list[str]`, *optional*):
            The arguments. Defaults to the process's.

    Returns:
        `int`: The exit status: 0, or 2 where what was asked for can't be done, which one line on stderr explains. What
        is not the user's mistake raises.
    """
    parser = argparse.ArgumentParser(
        prog="tiny-diffusers",
        description="Sample from, measure and share generative models of small images.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add_command in COMMANDS:
        add_command(commands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except ValueError as error:  # UserError, and what pipelines and schedulers raise for arguments they can't take
        print("tiny-diffusers: error:", *str(error).split(), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
