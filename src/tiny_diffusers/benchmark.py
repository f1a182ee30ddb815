"""
Speed and memory of this package on the machine at hand, against stock diffusers: `tiny-diffusers benchmark`.

    for row in measure(Settings(), ["training", "sampling"]):
        print(row.markdown())

Contenders take turns, so that other load on the machine slows all of them; a ratio is the median of the rounds' ratios.
Our contenders run the trainer's and the pipelines' own code, with the settings that they choose for this machine.
"""

import contextlib
import gc
import itertools
import json
import math
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import nn

from . import __version__, hardware
from .data import ImageData
from .errors import UserError, unknown
from .families.diffusion import Diffusion, DiffusionArguments, build_scheduler, resolve_diffusion
from .families.unets import build_unet, resolve_unet
from .flags import Flags, flag
from .models.layers_tiny import height_and_width
from .pipelines.pipeline_tiny import TinyPipeline, image_generators
from .resolution import Resolution, to_size
from .training.outputs import count_parameters
from .training.process import MIXED_PRECISION, setup_process
from .training.settings import resolve_settings
from .training.trainer import Trainer


TINY, STOCK = "TinyUNet2DModel", "UNet2DModel"
_MEASURED_SECONDS = 0.5  # of a contender in a round, at least
_MEMORY_STEPS = 2  # after which optimizer, EMA and gradients have all been allocated at once


class Unavailable(UserError):
    """Raised if this machine lacks what a row needs."""


@dataclass(frozen=True)
class Settings(Flags):
    """Settings of the benchmark; every field is a flag of `tiny-diffusers benchmark`."""

    resolution: Resolution = flag(32, "Side of the images, or height x width.", within="[1, 4096]")
    block_out_channels: list[int] = flag(
        [64, 128, 128],
        "Widths of both networks' levels, two or more; the second level has attention.",
        within="[1, 4096]",
    )
    layers_per_block: int = flag(2, "Residual blocks a level, in both networks.", within="[1, 32]")
    batch_size: int = flag(64, "Images of a training step and of a pipeline call.", within="[1, inf)")
    sampling_steps: int = flag(
        50, "DDIM steps of a pipeline call; fewer make the row `sampling` shorter.", within="[1, 1000]"
    )
    rounds: int = flag(5, "Runs of each contender, after one that warms it up.", within="[1, inf)")
    num_threads: int | None = flag(
        None, "CPU threads; if not given, those of OMP_NUM_THREADS or the physical cores.", within="[1, 1024]"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto", "Dtype of this package's contenders; auto is its choice for this machine."
    )

    def __post_init__(self):
        super().__post_init__()
        if len(self.block_out_channels) < 2:
            raise UserError(
                f"--block_out_channels {' '.join(map(str, self.block_out_channels))}: two levels or more are compared, "
                "the second with attention."
            )

    @property
    def size(self) -> tuple[int, int]:
        """Returns the height and width of the images."""
        return height_and_width(to_size(self.resolution))


@dataclass
class Row:
    """
    One row of the table.

    Args:
        what (`str`): What was measured.
        unit (`str`): Unit of the figures.
        figures (`dict[str, list[float]]`): Contender -> its figure in each round.
        compared (`list[tuple[str, str]]`): Pairs of contenders whose ratio, the first over the second, is given.
        notes (`list[str]`): Remarks.
        skipped (`str`, *optional*): Why there are no figures.
    """

    what: str
    unit: str = ""
    figures: dict[str, list[float]] = field(default_factory=dict)
    compared: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: str | None = None

    def ratios(self) -> dict[str, list[float]]:
        """Returns `"A / B"` -> the ratio of their figures in each round."""
        return {
            f"{a} / {b}": [x / y for x, y in zip(self.figures[a], self.figures[b], strict=True)]
            for a, b in self.compared
        }

    def as_dict(self) -> dict[str, Any]:
        """Returns the row for JSON."""
        if self.skipped:
            return {"what": self.what, "skipped": self.skipped}
        return {
            "what": self.what,
            "unit": self.unit,
            "figures": {name: _summary(values) for name, values in self.figures.items()},
            "ratios": {name: _summary(values) for name, values in self.ratios().items()},
            "notes": self.notes,
        }

    def markdown(self) -> str:
        """Returns the row's lines of the table that [`HEADER`] begins."""
        if self.skipped:
            return f"| {self.what} | skipped: {self.skipped} | | | |"
        what, lines = f"{self.what}, {self.unit}", []
        for name, values in self.figures.items():
            lines.append((what, name, *(_round(value) for value in _spread(values))))
        for name, values in self.ratios().items():
            lines.append((what, name, *(f"{value:.2f}x" for value in _spread(values))))
        lines += [(what, note, "", "", "") for note in self.notes]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


HEADER = "| what | | median | lowest | highest |\n| --- | --- | ---: | ---: | ---: |"


def _spread(values: list[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def _summary(values: list[float]) -> dict[str, Any]:
    return dict(zip(("median", "lowest", "highest"), _spread(values), strict=True)) | {"values": values}


def _round(value: float) -> str:
    """Formats a value with three significant digits."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if value else "0"


def measure(settings: Settings, names: Sequence[str], rows: dict[str, Callable] | None = None) -> Iterator[Row]:
    """
    Measures rows in turn.

    Args:
        settings ([`Settings`]): What is measured.
        names (`Sequence[str]`): Names of rows.
        rows (`dict[str, Callable]`, *optional*): name -> function that yields rows; [`ROWS`] if not given.

    Yields:
        [`Row`]: As soon as it has been measured; one name may stand for several.

    Raises:
        UserError: If a row is unknown, before any is measured; for sizes that no network can have.
    """
    rows = _known_rows(names, rows)
    for name in names:
        try:
            yield from rows[name](settings)
        except Unavailable as error:
            yield Row(name, skipped=str(error))
        gc.collect()


def _known_rows(names: Sequence[str], rows: dict[str, Callable] | None) -> dict[str, Callable]:
    rows = ROWS if rows is None else rows
    for name in names:
        if name not in rows:
            raise unknown("row", name, rows)
    return rows


def run(
    settings: Settings, names: Sequence[str], output: Path, command: str, rows: dict[str, Callable] | None = None
) -> None:
    """
    Prints the table row by row, and writes the JSON again after each row, so that it outlives an interruption.

    Args:
        settings ([`Settings`]), names (`Sequence[str]`), rows (`dict[str, Callable]`, *optional*): As for [`measure`].
        output (`Path`): The JSON file.
        command (`str`): The command line, for the JSON file.
    """
    if output.parent.is_file() or output.is_dir():
        raise UserError(f"--output {output}: give the name of a file to write to, such as benchmark.json.")
    rows = _known_rows(names, rows)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: its folder can't be created ({error.strerror}).") from error
    facts = machine(settings)
    print(", ".join(f"{name.replace('_', ' ')} {fact}" for name, fact in facts.items()), f"\n\n{HEADER}", sep="\n")
    result = {"command": command, "machine": facts, "settings": asdict(settings), "rows": []}
    for row in measure(settings, names, rows):
        print(row.markdown(), flush=True)
        result["rows"].append(row.as_dict())
        output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def machine(settings: Settings) -> dict[str, Any]:
    """Returns what the figures depend on beside the code: processor, threads, device, dtype, versions."""
    import diffusers

    device = hardware.default_device()
    return {
        "processor": hardware.processor_name(),
        "physical_cores": hardware.physical_cores(),
        "threads": settings.num_threads or hardware.default_num_threads(),
        "device": hardware.device_name(device),
        "dtype": dtype_name(resolve_dtype(settings)),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "tiny-diffusers": __version__,
    }


# How it is measured


class Contender:
    """
    A timed function in a process of its own: threads and allocator are settings of a whole process.

    Args:
        stack (`contextlib.ExitStack`): Ends the process when it is exited.
        prepare (`Callable`): Returns a context manager of the warmed-up function and facts about it.
        args, kwargs: Arguments of `prepare`.

    Attributes:
        facts (`dict`): The facts.
    """

    def __init__(self, stack: contextlib.ExitStack, prepare: Callable, *args: Any, **kwargs: Any):
        self._pool = stack.enter_context(process())
        self.facts = self._pool.submit(_enter, id(self), prepare, args, kwargs).result()
        stack.callback(lambda: self._pool.submit(_leave, id(self)).result())

    def seconds(self) -> float:
        """Returns the mean time of a run, over as many runs as fill a round."""
        return self._pool.submit(_time, id(self)).result()

    def rate(self, amount: float) -> float:
        """Returns the amount a second, if a run does `amount`."""
        return amount / self.seconds()


# In a contender's process: its function, and the contexts that it needs
_prepared: dict[int, tuple[contextlib.ExitStack, Callable]] = {}


def _enter(key: int, prepare: Callable, args: tuple, kwargs: dict) -> dict:
    stack = contextlib.ExitStack()
    run, facts = stack.enter_context(prepare(*args, **kwargs))
    _prepared[key] = stack, run
    return facts


def _time(key: int) -> float:
    return seconds_of(_prepared[key][1])


def _leave(key: int) -> None:
    _prepared.pop(key)[0].close()


def process() -> Executor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def in_turns(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Runs the contenders in turns; returns each one's figure in each round."""
    figures = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            figures[name].append(run())
    return figures


def rates_of(contenders: dict[str, Contender], rounds: int, images: int) -> dict[str, list[float]]:
    """Returns the images/s of contenders whose run makes `images`."""
    return in_turns({name: partial(c.rate, images) for name, c in contenders.items()}, rounds)


def seconds_of(run: Callable[[], Any]) -> float:
    """Returns the mean time of `run`, repeated for a round; a GPU is synchronized before the clock is read."""
    _synchronize()
    began = time.perf_counter()
    for repeats in itertools.count(1):
        run()
        _synchronize()
        seconds = time.perf_counter() - began
        if seconds >= _MEASURED_SECONDS:
            return seconds / repeats


def warm_up(run: Callable[[], Any]) -> float:
    """Runs twice; returns the seconds of the first run, which builds what later ones reuse."""
    began = time.perf_counter()
    run()
    _synchronize()
    first = time.perf_counter() - began
    run()
    return first


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def set_threads(settings: Settings) -> None:
    """Sets the CPU threads alone, for stock contenders: the allocator stays as it is."""
    torch.set_num_threads(settings.num_threads or hardware.default_num_threads())


def resolve_dtype(settings: Settings) -> torch.dtype:
    """Returns the dtype of this package's contenders."""
    return hardware.resolve_dtype(settings.dtype, hardware.default_device())


def dtype_name(dtype: torch.dtype) -> str:
    """Returns a dtype's name without `torch.`."""
    return str(dtype).removeprefix("torch.")


# The contenders


def noise_images(settings: Settings, count: int, channels: int) -> ImageData:
    """Draws uniformly random images."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, channels, *settings.size)
    images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    return ImageData(images, None, None, "noise", "train", fingerprint="")


def compared_settings(settings: Settings) -> dict[str, Any]:
    """Returns the settings of our training with the layout of [`stock_unet`], the optimizer and the kind of objective."""
    levels = len(settings.block_out_channels)
    return {
        "prediction_type": "v_prediction",
        "optimizer": "adamw",
        "block_out_channels": list(settings.block_out_channels),
        "layers_per_block": settings.layers_per_block,
        "attention": ["none", "full", *["none"] * (levels - 2)],
        "mid_attention": "full",
        "patch_size": 1,
        "resnet_time_scale_shift": "default",
    }


def stock_unet(settings: Settings) -> nn.Module:
    """Builds stock diffusers' network with its defaults, except for the size."""
    from diffusers import UNet2DModel

    levels = len(settings.block_out_channels)
    return UNet2DModel(
        sample_size=to_size(settings.resolution),
        block_out_channels=tuple(settings.block_out_channels),
        layers_per_block=settings.layers_per_block,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", *["DownBlock2D"] * (levels - 2)),
        up_block_types=(*["UpBlock2D"] * (levels - 2), "AttnUpBlock2D", "UpBlock2D"),
    )


@contextlib.contextmanager
def tiny_trainer(settings: Settings, data: ImageData | None = None, **arguments: Any) -> Iterator[Trainer]:
    """Prepares the trainer itself: one of its steps draws images and noise, and does all that a step of a run does."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = DiffusionArguments(
            output_dir=folder,
            train_batch_size=settings.batch_size,
            validation_split=0,
            max_train_steps=10**6,
            num_threads=settings.num_threads,
            mixed_precision=MIXED_PRECISION[resolve_dtype(settings)],
            **arguments,
        )
        accelerator = setup_process(arguments)
        data = data or noise_images(settings, 4 * settings.batch_size, channels=3)
        options = resolve_diffusion(arguments, accelerator.state)
        options |= resolve_unet(replace(arguments, **options), data)
        run = resolve_settings(arguments, accelerator, data, **options)
        trainer = Trainer(run, accelerator, data, Diffusion(build_unet(run, data), build_scheduler(run)))
        trainer.prepare()
        yield trainer


@contextlib.contextmanager
def tiny_steps(settings: Settings, **arguments: Any) -> Iterator[tuple[Callable, dict]]:
    """Prepares training steps of our network."""
    with tiny_trainer(settings, **compared_settings(settings), **arguments) as trainer:
        first = warm_up(trainer.train_step)
        yield trainer.train_step, {"parameters": count_parameters(trainer.family.modules["unet"]), "first_step": first}


@contextlib.contextmanager
def _stock_steps(settings: Settings, dtype: str) -> Iterator[tuple[Callable, dict]]:
    set_threads(settings)
    training = StockTraining(settings, getattr(torch, dtype))
    training()
    yield training, {"parameters": count_parameters(training.unet)}


class StockTraining:
    """
    Training of stock `UNet2DModel` as in diffusers' example script train_unconditional.py, without its data loader.

    Args:
        settings ([`Settings`]): Sizes of the network and the batch.
        dtype (`torch.dtype`): float32, or the dtype of autocast.
    """

    def __init__(self, settings: Settings, dtype: torch.dtype):
        from diffusers import DDPMScheduler
        from diffusers.training_utils import EMAModel

        device = hardware.default_device()
        torch.manual_seed(0)
        self.dtype = dtype
        self.unet = stock_unet(settings).to(device).train()
        self.scheduler = DDPMScheduler(num_train_timesteps=1000)
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
        self.ema = EMAModel(
            self.unet.parameters(),
            decay=0.9999,
            use_ema_warmup=True,
            inv_gamma=1.0,
            power=0.75,
            model_cls=type(self.unet),
            model_config=self.unet.config,
        )
        self.images = torch.rand(settings.batch_size, 3, *settings.size).to(device) * 2 - 1

    def __call__(self) -> None:
        """Takes a step."""
        noise = torch.randn_like(self.images)
        timesteps = torch.randint(0, 1000, (len(noise),), device=noise.device)
        noisy = self.scheduler.add_noise(self.images, noise, timesteps)
        with torch.autocast(noise.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = self.unet(noisy, timesteps).sample
        F.mse_loss(output.float(), noise).backward()
        nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.unet.parameters())


@contextlib.contextmanager
def _convolution(settings: Settings, dtype: str) -> Iterator[tuple[Callable, dict]]:
    """Prepares the first level's 3x3 convolution alone, channels-last: the speed of the hardware at that time."""
    hardware.setup_torch(settings.num_threads)
    placed = {
        "device": hardware.default_device(),
        "dtype": getattr(torch, dtype),
        "memory_format": torch.channels_last,
    }
    width = settings.block_out_channels[0]
    images = torch.randn(settings.batch_size, width, *settings.size).to(**placed)
    weight = torch.randn(width, width, 3, 3).to(**placed)
    F.conv2d(images, weight, padding=1)
    yield lambda: F.conv2d(images, weight, padding=1), {"operations": 2 * 9 * width * images.numel()}


@contextlib.contextmanager
def _tiny_sampler(settings: Settings, dtype: str) -> Iterator[tuple[Callable, dict]]:
    """Prepares our pipeline as `tiny-diffusers sample` loads and calls it, with a generator for each image."""
    hardware.setup_torch(settings.num_threads)
    arguments = DiffusionArguments(**compared_settings(settings))
    arguments = replace(arguments, **resolve_diffusion(arguments, PartialState()))
    unet = build_unet(arguments, noise_images(settings, 1, channels=3)).eval()
    # nn.Module's own `to`: that of diffusers warns at every cast
    nn.Module.to(unet, hardware.default_device(), getattr(torch, dtype), memory_format=torch.channels_last)
    pipe = TinyPipeline(unet, build_scheduler(arguments))
    pipe.set_progress_bar_config(disable=True)

    def sample(steps: int = settings.sampling_steps) -> None:
        generator = image_generators(0, settings.batch_size)
        pipe(batch_size=settings.batch_size, generator=generator, num_inference_steps=steps, eta=0.0)

    sample(2)
    yield sample, {}


@contextlib.contextmanager
def _stock_sampler(settings: Settings) -> Iterator[tuple[Callable, dict]]:
    from diffusers import DDIMPipeline, DDIMScheduler

    set_threads(settings)
    pipe = DDIMPipeline(stock_unet(settings), DDIMScheduler()).to(hardware.default_device())
    pipe.set_progress_bar_config(disable=True)

    def sample(steps: int = settings.sampling_steps) -> None:
        pipe(batch_size=settings.batch_size, generator=torch.Generator().manual_seed(0), num_inference_steps=steps)

    sample(2)
    yield sample, {}


# The rows


def _training(settings: Settings) -> Iterator[Row]:
    dtype = dtype_name(resolve_dtype(settings))
    ours, float32 = f"{TINY}, {dtype}", f"{STOCK}, float32"
    with contextlib.ExitStack() as stack:
        contenders = {
            ours: Contender(stack, tiny_steps, settings),
            float32: Contender(stack, _stock_steps, settings, "float32"),
        }
        if dtype != "float32":
            contenders[f"{STOCK}, {dtype} autocast"] = Contender(stack, _stock_steps, settings, dtype)
        parameters = {name: contender.facts["parameters"] for name, contender in contenders.items()}
        convolutions = {
            name: Contender(stack, _convolution, settings, name) for name in dict.fromkeys([dtype, "float32"])
        }
        runs = {name: partial(c.rate, settings.batch_size) for name, c in contenders.items()}
        runs |= {name: partial(c.rate, c.facts["operations"] / 1e12) for name, c in convolutions.items()}
        figures = in_turns(runs, settings.rounds)
    height, width = settings.size
    size = f"{height}x{width}, batch {settings.batch_size}"
    yield Row(
        f"training, {size}",
        "images/s",
        {name: figures[name] for name in contenders},
        [(ours, name) for name in contenders if name != ours],
        [f"parameters: {parameters[ours]:,} ours, {parameters[float32]:,} stock"],
    )
    yield Row(f"a convolution of it alone, {size}", "TFLOP/s", {name: figures[name] for name in convolutions})


def _sampling(settings: Settings) -> Iterator[Row]:
    dtype = dtype_name(resolve_dtype(settings))
    ours, stock = f"TinyPipeline, {dtype}", "DDIMPipeline, float32"
    with contextlib.ExitStack() as stack:
        contenders = {
            ours: Contender(stack, _tiny_sampler, settings, dtype),
            stock: Contender(stack, _stock_sampler, settings),
        }
        figures = rates_of(contenders, settings.rounds, settings.batch_size)
    what = f"sampling, {settings.sampling_steps}-step DDIM, batch {settings.batch_size}"
    yield Row(what, "images/s", figures, [(ours, stock)])


def _memory(settings: Settings) -> Iterator[Row]:
    """Measures memory once, as it hardly varies."""
    names = (TINY, f"{STOCK}, float32")
    figures = {}
    for name in names:
        with process() as pool:
            figures[name] = [pool.submit(training_memory, settings, name == TINY).result()]
    yield Row(f"peak memory of a training step, batch {settings.batch_size}", "MB", figures, [names])


def training_memory(settings: Settings, tiny: bool) -> float:
    """
    Measures the memory of training in this process, which must be a fresh one, in MB: network, optimizer, EMA, gradients
    and activations. On a GPU it is the memory of the GPU.
    """
    from diffusers import DDPMScheduler, UNet2DModel  # noqa: F401  (before the first look: imports take memory)
    from diffusers.training_utils import EMAModel  # noqa: F401

    peak = torch.cuda.max_memory_allocated if torch.cuda.is_available() else peak_resident_bytes
    before = peak()
    with contextlib.ExitStack() as stack:
        if tiny:
            step = stack.enter_context(tiny_trainer(settings, **compared_settings(settings))).train_step
        else:
            set_threads(settings)
            step = StockTraining(settings, torch.float32)
        for _ in range(_MEMORY_STEPS):
            step()
        return (peak() - before) / 1e6


def peak_resident_bytes() -> int:
    """Returns the peak memory of this process."""
    if sys.platform == "linux":  # where getrusage begins with the parent's peak
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


ROWS = {"training": _training, "sampling": _sampling, "memory": _memory}
