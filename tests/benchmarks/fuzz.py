"""
Gives the package wrong and hostile inputs, and counts what happens: success, a refusal of one line, or a fault.

    python tests/benchmarks/fuzz.py                                          # 10,000 inputs
    python tests/benchmarks/fuzz.py --kinds flags --first 17 --inputs 1      # one of them again

A third each are `configs` (values of a wrong type, range or size in the JSON files of checkpoints, which are then loaded
and sampled), `flags` (of the train scripts, or such values in the file of `--model_config_name_or_path`, up to the first
step or a whole short run), and `commands` (of `tiny-diffusers`, with missing, odd and damaged files). Input i of a kind is
a function of the seed and i.

A fault is a traceback, an error of several lines, more time or memory than the limits, a terminal's escape sequence that
is printed, or nonsense without a word: samples or weights that are not finite, or images without any structure. Each is
printed with the command that repeats it. Exits with 1 if there is any. Needs resource and SIGALRM, so no Windows.
"""

import argparse
import collections
import contextlib
import inspect
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers.utils.logging
import numpy as np
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import UNet2DModel

from tiny_diffusers import cli
from tiny_diffusers.commands.shared import load_checkpoint
from tiny_diffusers.errors import UserError, refusals, say
from tiny_diffusers.families.conditional_diffusion import ConditionalArguments
from tiny_diffusers.families.dcgan import DCGANArguments
from tiny_diffusers.families.diffusion import DiffusionArguments
from tiny_diffusers.families.pixelcnn import PixelCNNArguments
from tiny_diffusers.families.vae import VAEArguments
from tiny_diffusers.files import seal
from tiny_diffusers.flags import FlagParser
from tiny_diffusers.training.trainer import Trainer


SECONDS = 60  # that an input may take: the export to ONNX takes 20 on a busy machine
GIGABYTES = 2  # that it may take on top of what the process has
ESCAPE = "\x1b[31m"

NUMBERS = (0, 1, -1, 2, 3, 5, 7, 0.5, -0.5, 1e-12, 1e30, 10**9, 2**31, 2**63, -(2**63), 10**13, 10**400)
WORDS = (
    *(
        "",
        " ",
        ".",
        "..",
        "-",
        "--",
        "~",
        ",",
        "a,b",
        "None",
        "nan",
        "inf",
        "-inf",
        "1e400",
        "0x10",
        "1_000",
        "True",
        "no",
    ),
    *("none", "auto", "cpu", "cuda:99", "meta", "full", "linear", "cosine", "fixed_smal", "piecewise_constant"),
    *(
        "7",
        "cat,frog",
        "é",
        "a\nb",
        ESCAPE + "red",
        "$(touch x)",
        "<b>",
        "x" * 300,
        "a/" * 3000,
        "owner/name",
        "a/b/c",
    ),
    *("missing", "missing/deep/x.png", "folder", "text.txt", "text.txt/x.png", "empty.json", "cut.png", "latin.yaml"),
    *("/proc/x", "/proc/x/y.png", "/dev/null", "x.png", "x.gif", "x.xyz", "x" * 300 + ".png", ESCAPE + ".png"),
)
PLAUSIBLE = (1, 2, 4, 0.5, 0.9, 1.0, "True", "x.png", "new")
VALUES = (
    *(None, True, False, float("nan"), float("inf"), float("-inf"), *NUMBERS, *WORDS),
    *([], [None], [0, 0], [-1, -1], [8], [8, 8], [8, 8, 8], [10**9] * 2, [0.5, "a"], [[8], [8]], [1] * 1000),
    *(
        {},
        {"0": "cat"},
        {"a": {"b": 1}},
        "TinyUNet2DModel",
        "UNet2DModel",
        "DDIMScheduler",
        ["diffusers", "UNet2DModel"],
    ),
    *(["os", "system"], ["unet_tiny", "TinyUNet2DModel"], ["diffusers"], "__init__", "device", "config"),
)
FILES = (b"", b"{", b"[]", b"null", b"1", b'"a"', b"[" * 100_000, b"\xff\xfe{\x00", b'{"a": 1', b'{"a": NaN}')

# More of these is more work and no mistake.
WORK = (
    *("num_images", "num_frames", "max_train_steps", "max_train_minutes", "num_epochs", "gradient_accumulation_steps"),
    *("eval_batch_size", "num_jackknife", "likelihood_images", "max_validation_samples", "rounds", "jump_n_sample"),
)
RUN = [
    *("--max_train_steps", "1", "--max_train_samples", "32", "--train_batch_size", "4", "--eval_batch_size", "2"),
    *("--checkpointing_steps", "2", "--logging_steps", "1", "--mixed_precision", "no", "--num_threads", "1"),
    *("--overwrite_output_dir", "--output_dir", "run"),
]
DIFFUSION = ["--layers_per_block", "1", "--norm_num_groups", "4", "--ddpm_num_inference_steps", "2"]
UNET = [*DIFFUSION, "--block_out_channels", "8", "8", "--attention", "none", "--mid_attention", "none"]
TRANSFORMER = [
    *("--network", "transformer", "--patch_size", "2", "--num_layers", "2", "--num_attention_heads", "1"),
    *("--attention_head_dim", "8", "--position_embedding", "learned", "--ddpm_num_inference_steps", "2"),
]
SCRIPTS = {
    "unconditional": (DiffusionArguments, UNET),
    "conditional": (ConditionalArguments, UNET),
    "pixelcnn": (PixelCNNArguments, ["--hidden_channels", "8", "--num_layers", "3", "--num_levels", "5"]),
    "vae": (VAEArguments, ["--block_out_channels", "8", "--latent_dim", "4"]),
    "dcgan": (
        DCGANArguments,
        ["--generator_channels", "8", "--discriminator_channels", "8", "8", "--latent_dim", "4"],
    ),
}
STOCK = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D"] * 2,
    "up_block_types": ["UpBlock2D"] * 2,
}
NETWORKS = (
    {"_class_name": "UNet2DModel", **STOCK, "dropout": 0.0, "norm_eps": 1e-5, "attention_head_dim": 4},
    {"_class_name": "TinyUNet2DModel", "block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4,
     "attention": ["none", "full"], "mid_attention": "none", "attention_head_dim": 4, "patch_size": 1, "dropout": 0.1},
    {"_class_name": "TinyTransformer2DModel", "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 4,
     "patch_size": 2, "position_embedding": "relative", "mlp_ratio": 2.0, "long_skips": True, "dropout": 0.1},
)  # fmt: skip
SAMPLING = ["--num_images", "2", "--num_inference_steps", "2", "--output", "out.png"]
EVALUATION = ["--num_images", "8", "--features", "pixels", "--num_jackknife", "4", "--baselines", "noise"]


class OverTime(BaseException):
    """An input took longer than it may."""


class Fuzzer:
    """
    Makes inputs and gives them to the package, in this process.

    Args:
        folder (`Path`): Where everything is written; the working directory and the home folder are in it.
        seed (`int`): Of the inputs.
    """

    def __init__(self, folder: Path, seed: int = 0):
        self.folder, self.seed = folder, seed

    def give(self, kind: str, index: int) -> tuple[str, str]:
        """Gives input `index` of a kind; returns "success", "refusal" or "fault", and what the input was."""
        rng = random.Random(f"{self.seed} {kind} {index}")
        case = self.folder / "case"
        shutil.rmtree(case, ignore_errors=True)
        case.mkdir(parents=True)
        with _working_in(case):
            _write_odd_files(case)
            given, act = getattr(self, f"_{kind}")(rng)
            outcome, why = _judge(act)
        return outcome, f"{given}\n{why}".rstrip()

    # ------------------------------------------------------------------------------------------- the three kinds

    def _configs(self, rng: random.Random) -> tuple[str, Callable]:
        variants = ("unconditional-stock", "conditional-stock", "unconditional-flow", "conditional-edm")
        variants += ("conditional-transformer",)
        name = rng.choice([*SCRIPTS, *variants])
        checkpoint = Path(shutil.copytree(self.run_of(name), "checkpoint", ignore=_not_the_pipeline))
        files = sorted(checkpoint.rglob("*.json"))
        changes = [_change(rng, rng.choice(files)) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
        return f"{name}: " + "; ".join(changes), lambda: _load_and_sample(checkpoint)

    def _flags(self, rng: random.Random) -> tuple[str, Callable]:
        name = rng.choice(list(SCRIPTS))
        arguments, network = SCRIPTS[name]
        changes = []
        if network is UNET and rng.random() < 0.3:
            config = Path("network.json")
            config.write_text(json.dumps(rng.choice(NETWORKS)))
            changes = [_change(rng, config) for _ in range(rng.choice((1, 1, 2)))]
            network = ["--model_config_name_or_path", str(config), "--ddpm_num_inference_steps", "2"]
        flags = [] if changes else _random_flags(rng, FlagParser(arguments), rng.choice((1, 1, 2, 3)))
        argv = ["train", name, *RUN, *network, *flags]
        given = "; ".join([f"train {name} ... {_spell(flags)}", *changes])
        return given, lambda: _train(argv, whole=rng.random() < 0.2)

    def _commands(self, rng: random.Random) -> tuple[str, Callable]:
        command = rng.choice(
            (
                *("sample", "interpolate", "edit", "evaluate", "export", "compare"),
                *("plot", "push", "train", "benchmark", "ema", "describe"),
            )
        )
        given = getattr(self, f"_{command}")(rng)
        given, changes = given if isinstance(given, tuple) else (given, [])
        if command != "train":
            parser = cli.COMMANDS[command].parser()
            if command == "plot":
                parser = parser.parsers[given[0] if given[0] in parser.parsers else "losses"]()
            given += _random_flags(rng, parser, rng.choice((0, 1, 2, 4)))
        argv = [command, *map(str, given)]
        return "; ".join([_spell(argv), *changes]), lambda: _run(argv)

    # -------------------------------------------------------------------------------------------- the commands

    def _checkpoint(self, rng: random.Random) -> str | Path:
        name = rng.choice([*SCRIPTS, "conditional", "conditional-stock", "odd"])
        return rng.choice(WORDS) if name == "odd" else self.run_of(name)

    def _sample(self, rng: random.Random) -> list:
        return [self._checkpoint(rng), *SAMPLING]

    def _interpolate(self, rng: random.Random) -> list:
        images = ["--images", *rng.choices(["cut.png", "good.png", "text.txt", "missing.png", "folder"], k=2)]
        frames = ["--num_inference_steps", "2", "--num_frames", "3"]
        return [self._checkpoint(rng), *frames, *(images if rng.random() < 0.3 else [])]

    def _edit(self, rng: random.Random) -> list:
        image = rng.choice(["good.png", "good.png", "cut.png", "text.txt", "missing.png", "folder", "."])
        tasks = ["inpaint", "super_resolution:2", "super_resolution:0", "colorize", "deblur:1", "deblur:nan", "x:y"]
        kind = rng.choice([[], ["--mask", rng.choice(["good.png", "text.txt"])], ["--task", rng.choice(tasks)]])
        degrade = ["--degrade"] if rng.random() < 0.5 else []
        return [self._checkpoint(rng), "--image", image, *kind, *degrade, "--num_inference_steps", "2"]

    def _evaluate(self, rng: random.Random) -> tuple[list, list[str]]:
        if rng.random() < 0.4:
            return [self._checkpoint(rng), *EVALUATION, "--output", "reports/new"], []
        Path("report.json").write_bytes(self.report().read_bytes())
        changes = [_change(rng, Path("report.json")) for _ in range(rng.choice((1, 2, 3)))]
        checkpoint = [self._checkpoint(rng)] if rng.random() < 0.7 else []
        return [*checkpoint, "--from_report", "report.json", "--output", "new"], changes

    def _export(self, rng: random.Random) -> list:
        return [self._checkpoint(rng), rng.choice([word for word in WORDS if word not in (".", "..", "~")])]

    def _compare(self, rng: random.Random) -> tuple[list, list[str]]:
        names = ["one.json", "two.json"]
        for name in names:
            Path(name).write_bytes(self.report().read_bytes())
        return names, [_change(rng, Path(rng.choice(names))) for _ in range(rng.choice((1, 2)))]

    def _describe(self, rng: random.Random) -> list:
        return [self._checkpoint(rng)]

    def _plot(self, rng: random.Random) -> tuple[list, list[str]] | list:
        kind = rng.choice(
            ["losses", "schedules", "forward", "redraw", "reconstructions", "epochs", "samples", "guidance"]
        )
        if kind == "forward":
            return [kind, rng.choice(["good.png", "cut.png", "folder", "digits", self._checkpoint(rng)])]
        if kind == "redraw":
            Path("x.json").write_bytes(rng.choice(FILES))
            return [kind, "x.json"]
        if kind in ("samples", "guidance"):
            return [kind, self._checkpoint(rng), *SAMPLING[:2]]
        if kind != "losses":
            return [kind, self._checkpoint(rng)]
        log = Path("run", "train_log.jsonl")
        log.parent.mkdir()
        losses = rng.choices(VALUES, k=4)
        log.write_text("\n".join(json.dumps({"step": i, "loss": loss}) for i, loss in enumerate(losses)))
        changes = [f"losses {losses!r:.200}", *([] if rng.random() < 0.5 else [_damage(rng, log)])]
        return ["run", *([rng.choice(WORDS)] if rng.random() < 0.3 else [])], changes

    def _push(self, rng: random.Random) -> list:
        return [self._checkpoint(rng), rng.choice(WORDS)]

    def _ema(self, rng: random.Random) -> list:
        return [self._checkpoint(rng)]

    def _benchmark(self, rng: random.Random) -> list:
        return ["--rows", rng.choice(WORDS[1:])]

    def _train(self, rng: random.Random) -> tuple[list, list[str]]:
        """A recipe, or a run that is resumed, with changes in its files."""
        name = rng.choice(list(SCRIPTS))
        shutil.copytree(self.run_of(name), "run")
        checkpoint = Path("run", "checkpoint-2")
        if rng.random() < 0.3:
            recipe = Path("recipe.yaml")
            recipe.write_bytes(Path("run", "config.yaml").read_bytes())
            return [name, "--config", "recipe.yaml", *RUN], [_change(rng, recipe)]
        files = [Path("run", "config.yaml"), Path("run", "run.json"), *checkpoint.rglob("*.json")]
        changes = [_change(rng, rng.choice(files)) for _ in range(rng.choice((1, 2)))]
        if rng.random() < 0.9:
            seal(checkpoint)
        resumed = ["--resume_from_checkpoint", "latest", "--max_train_steps", "3"]
        return [name, *RUN, *SCRIPTS[name][1], *resumed], changes

    # ------------------------------------------------------------------------------------- what inputs are made of

    def run_of(self, name: str) -> Path:
        """Returns the folder of a run of two steps, trained when it is first asked for."""
        run, (script, _, variant) = self.folder / name, name.partition("-")
        if not run.exists():
            network = SCRIPTS[script][1]
            if variant in ("flow", "edm"):
                network = [*network, "--prediction_type", variant]
            elif variant == "transformer":
                network = TRANSFORMER
            elif variant == "stock":
                config = self.folder / "stock.json"
                config.write_text(json.dumps({"_class_name": UNet2DModel.__name__, **STOCK}))
                network = ["--model_config_name_or_path", str(config), "--ddpm_num_inference_steps", "2"]
            argv = ["train", script, *RUN, *network, "--max_train_steps", "2", "--output_dir", str(run)]
            argv += ["--posthoc_ema"] if script == "conditional" else []
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), _fresh_process():
                assert cli.main(argv) == 0, printed.getvalue()
        return run

    def report(self) -> Path:
        """Returns the report of an evaluation, measured when it is first asked for."""
        folder = self.folder / "report"
        if not folder.exists():
            argv = ["evaluate", str(self.run_of("unconditional")), *EVALUATION, "--output", str(folder)]
            argv += ["--num_inference_steps", "2"]
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), _fresh_process():
                assert cli.main(argv) == 0, printed.getvalue()
        return folder / "report.json"


_NOT_THE_PIPELINE = ("run.json", "train_log.jsonl", "snapshots")


def _not_the_pipeline(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name.startswith("checkpoint-") or name in _NOT_THE_PIPELINE]


@contextlib.contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _write_odd_files(folder: Path) -> None:
    from PIL import Image

    (folder / "folder").mkdir()
    (folder / "text.txt").write_text("text")
    (folder / "empty.json").write_text("")
    (folder / "latin.yaml").write_bytes("license: é\n".encode("latin-1"))
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    image.save(folder / "good.png")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:60])


def _random_flags(rng: random.Random, parser: argparse.ArgumentParser, count: int) -> list[str]:
    """Spells random flags of a parser with values, most of which are wrong."""
    actions = [action for action in parser._actions if action.option_strings and action.dest != "help"]
    flags = []
    for action in rng.sample(actions, min(count, len(actions))):
        flags.append(rng.choice(action.option_strings))
        numbers = NUMBERS if action.dest not in WORK else [number for number in NUMBERS if number < 8]
        counts = {None: (1,), 0: (0,), "?": (0, 1), 2: (2, 2, 1)}.get(action.nargs, (1, 1, 2, 3, 0))
        for _ in range(rng.choice(counts)):
            plausible = list(action.choices or PLAUSIBLE)
            pool = rng.choice((plausible, plausible, numbers, WORDS))
            flags.append(str(rng.choice(pool)))
    return flags


def _change(rng: random.Random, file: Path) -> str:
    """Changes a value in a JSON or YAML file, or damages the file; returns what was done."""
    parse, write = (json.loads, json.dumps) if file.suffix == ".json" else (yaml.safe_load, yaml.safe_dump)
    try:
        content = parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or not content or rng.random() < 0.08:
        return _damage(rng, file)
    place, names = content, []
    while True:
        name = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        names.append(name)
        if not isinstance(place[name], (dict, list)) or not place[name] or rng.random() < 0.4:
            break
        place = place[name]
    if rng.random() < 0.1:
        del place[name]
        done = "deleted"
    else:
        place[name] = rng.choice((rng.choice(VALUES), rng.choice(VALUES), _near(rng, place[name])))
        done = f"= {place[name]!r:.60}"
    with contextlib.suppress(ValueError):  # integers of more digits than Python spells
        file.write_text(write(content), encoding="utf-8")
    return f"{file} {'.'.join(map(str, names))} {done}"


def _near(rng: random.Random, value: Any) -> Any:
    """Returns a value that is like another, but not the same."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (int, float)):
        return rng.choice((value + 1, -value, 2 * value, value // 2, 0.5 * min(value, 2**63), str(value), [value]))
    if isinstance(value, list):
        return rng.choice((value[::-1], value * 2, value[1:], value[0] if value else 0))
    return rng.choice((f"{value}x", str(value).upper(), str(value)[:-1], [value], ""))


def _damage(rng: random.Random, file: Path) -> str:
    """Replaces a file by one that is no JSON object, cuts it, or puts a folder in its place."""
    content = rng.choice((*FILES, "cut", "folder", "absent"))
    if content == "cut":
        data = file.read_bytes() if file.is_file() else b""
        file.parent.mkdir(exist_ok=True, parents=True)
        content = data[: rng.randrange(len(data) + 1)]
    if isinstance(content, bytes):
        if file.is_file():
            file.write_bytes(content)
        return f"{file} = {content[:20]!r} ({len(content)} bytes)"
    file.unlink() if file.is_file() else None
    if content == "folder":
        file.mkdir(exist_ok=True)
    return f"{file} is {content}"


def _spell(argv: list[str]) -> str:
    return repr([f"{word[:40]}... ({len(word)} characters)" if len(word) > 100 else word for word in argv])


# ------------------------------------------------------------------------------------------- acting and judging


class Nonsense(Exception):
    """Something was computed that cannot be right, and nothing was said."""


def _load_and_sample(checkpoint: Path) -> int:
    pipe = load_checkpoint(argparse.Namespace(checkpoint=str(checkpoint), trust_remote_code=False))
    with refusals():
        pipe.set_progress_bar_config(disable=True)
        options = {"batch_size": 2, "num_inference_steps": 2, "class_labels": [0, 1]}
        known = inspect.signature(pipe.__call__).parameters
        options = {name: value for name, value in options.items() if name in known}
        if getattr(pipe, "_class_ids", None) is None:
            options.pop("class_labels", None)
        images = pipe(generator=torch.Generator().manual_seed(0), output_type="np", **options).images
    if not np.isfinite(images).all():
        raise Nonsense("samples that are not finite")
    if images.min() == images.max():
        raise Nonsense(f"images that are {images.min()} everywhere")
    return 0


def _run(argv: list[str]) -> int:
    return cli.main(argv)


def _train(argv: list[str], whole: bool) -> int:
    """Trains one step of a run, or the `whole` run if it is short."""
    run = Trainer.run

    def first_step(trainer: Trainer) -> None:
        settings = trainer.settings
        if whole and settings.max_train_steps <= 2 and settings.eval_batch_size <= 8:
            run(trainer)
        else:
            with trainer._claimed_folder():
                trainer.prepare()
                if settings.gradient_accumulation_steps <= 8:
                    trainer.train_step()
        networks = [*trainer.modules.values(), *trainer.networks().values()]
        if not all(torch.isfinite(p).all() for network in networks for p in network.parameters()):
            raise Nonsense("weights that are not finite")

    with mock.patch.object(Trainer, "run", first_step):
        return cli.main(argv)


@contextlib.contextmanager
def _fresh_process() -> Iterator[None]:
    """Leaves what belongs to the whole process as it was."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float32)


def _judge(act: Callable[[], int]) -> tuple[str, str]:
    """Lets an input act; returns the outcome, and of a fault what happened."""
    printed, errors = io.StringIO(), io.StringIO()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors), _fresh_process(), _limits():
            status = act()
    except UserError as error:
        status = 2
        say(f"error: {error}", errors)
    except SystemExit as stop:
        status = stop.code
    except OverTime:
        return "fault", f"more than {SECONDS} seconds"
    except Exception:
        return "fault", traceback.format_exc()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    said = errors.getvalue().strip().splitlines() or [""]
    if grown > GIGABYTES / 2:
        return "fault", f"{grown:.1f} GB of memory"
    if ESCAPE in printed.getvalue() + errors.getvalue():
        return "fault", "a terminal's escape sequence is printed"
    if status == 0:
        return "success", ""
    if status == 2 and "error: " in said[-1]:
        return "refusal", said[-1]
    return "fault", f"status {status}, and the last line is not an error: {said[-3:]}"


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Limits the time and memory of what is done within."""

    def stop(number: int, frame: Any) -> None:
        raise OverTime

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    memory = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + GIGABYTES * 2**30, memory[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, memory)
        signal.signal(signal.SIGALRM, handler)


@contextlib.contextmanager
def fuzzer(seed: int = 0) -> Iterator[Fuzzer]:
    """Makes a fuzzer in a folder of its own, with no way to the Hub and none to the user's files."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder, "home")
        surroundings = {"HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
        offline = mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with mock.patch.dict(os.environ, surroundings), offline:
            yield Fuzzer(Path(folder), seed)


KINDS = ("configs", "flags", "commands")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--inputs", type=int, default=10_000, help="of all kinds together (default: 10000)")
    parser.add_argument("--first", type=int, default=0, help="index of the first input of each kind (default: 0)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="print each input with what came of it")
    args = parser.parse_args()

    diffusers.utils.logging.set_verbosity_error()
    counts = collections.Counter()
    with fuzzer(args.seed) as fuzz:
        for i in range(args.inputs):
            kind, index = args.kinds[i % len(args.kinds)], args.first + i // len(args.kinds)
            outcome, given = fuzz.give(kind, index)
            counts[kind, outcome] += 1
            if outcome == "fault" or args.verbose:
                print(
                    f"\n{outcome}: --kinds {kind} --seed {args.seed} --first {index} --inputs 1\n{given}", flush=True
                )
    print("\n| inputs | success | refusal | fault |\n| --- | ---: | ---: | ---: |")
    for kind in args.kinds:
        print(
            f"| {kind} | "
            + " | ".join(f"{counts[kind, outcome]:,}" for outcome in ("success", "refusal", "fault"))
            + " |"
        )
    return int(any(outcome == "fault" for _, outcome in counts))


if __name__ == "__main__":
    sys.exit(main())
