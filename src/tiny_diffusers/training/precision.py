"""
The faster dtype of a training on a CPU that has bfloat16 in hardware, by a measurement: what `--mixed_precision auto`
takes in a long run.

With AMX, bfloat16 is about twice as fast as float32. With AVX512-BF16 alone it gains little, and some networks are slower.
"""

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files import load_json, read_text, replace_file
from ..hardware import processor_name
from .arguments import TrainingArguments


MIN_STEPS, MIN_MINUTES = 200, 1.0  # of a run that is worth the measurement
MIN_GAIN = 1.1  # of bfloat16 over float32: below it, chance would choose, and float32 is more exact
_SECONDS = 1.5  # after which no further round of passes begins
_PASS_SECONDS = 0.3  # a pass of more images is tried after one in float32 that takes less
_DTYPES = ("bfloat16", "float32")


def is_worth_measuring(settings: TrainingArguments, steps_per_epoch: float) -> bool:
    """Checks that a run is so long that a second at its start is well spent."""
    if settings.max_train_steps is None and settings.max_train_minutes is not None:
        return settings.max_train_minutes >= MIN_MINUTES
    return (settings.max_train_steps or settings.num_epochs * steps_per_epoch) >= MIN_STEPS


def measure_speeds(take_pass: Callable[[str, int], None], batch_size: int) -> dict[str, float]:
    """
    Times passes in float32 and in bfloat16, in turns, for one to three seconds; of a batch, or where that takes too long,
    of one image and of some. Their difference is the time of each further image: a pass has a constant part too, such as
    the cast of the weights, which is larger in bfloat16 and would decide at few images.

    Args:
        take_pass (`Callable`): Takes a forward and a backward pass, of a dtype's name and a number of images.
        batch_size (`int`): Images of a batch.

    Returns:
        `dict[str, float]`: dtype's name -> estimated images/s of a batch, by the fastest pass of each kind: the first ones
        fill caches, and other processes only slow passes down.
    """
    fastest: dict[tuple[str, int], float] = {}

    def seconds(dtype: str, count: int) -> float:
        pass_began = time.perf_counter()
        take_pass(dtype, count)
        taken = time.perf_counter() - pass_began
        fastest[dtype, count] = min(taken, fastest.get((dtype, count), math.inf))
        return taken

    began, some = time.perf_counter(), min(4, batch_size)
    seconds("float32", 1)
    while seconds("float32", some) < _PASS_SECONDS and some < batch_size:
        some = min(4 * some, batch_size)
    seconds("bfloat16", 1)
    seconds("bfloat16", some)
    while time.perf_counter() - began < _SECONDS:
        for count in {1, some}:
            for dtype in _DTYPES:
                seconds(dtype, count)

    speeds = {}
    for dtype in _DTYPES:
        further = max(0.0, fastest[dtype, some] - fastest[dtype, 1]) / max(1, some - 1)
        speeds[dtype] = batch_size / (fastest[dtype, some] + (batch_size - some) * further)
    return speeds


def faster_precision(speeds: dict[str, float]) -> str:
    """Returns accelerate's name of the dtype to take at these speeds: `"bf16"` if it gains enough, else `"no"`."""
    return "bf16" if speeds["bfloat16"] >= MIN_GAIN * speeds["float32"] else "no"


def cache_file(folder: Path, networks: Mapping[str, nn.Module], **given: Any) -> Path:
    """
    Returns the file that keeps the speeds of networks on this processor, with this process's threads and version of torch.

    Args:
        folder (`Path`): The cache, from [`~tiny_diffusers.data.cache_root`].
        networks (`dict[str, nn.Module]`): What is trained; a network counts by its class and config.
        given (`Any`): What else the speeds depend on, as JSON, such as the shape of a batch.
    """
    configs = {
        name: (type(network).__name__, {k: v for k, v in network.config.items() if not k.startswith("_")})
        for name, network in networks.items()
    }
    machine = (processor_name(), torch.get_num_threads(), torch.__version__)
    key = json.dumps([machine, configs, given], sort_keys=True, default=str)
    return folder / "speeds" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def read_speeds(file: Path) -> dict[str, float] | None:
    """Reads what [`write_speeds`] has written; None if there is no such file, or if it is damaged."""
    try:
        found = load_json(read_text(file))
        speeds = {dtype: float(found[dtype]) for dtype in _DTYPES}
    except (OSError, ValueError, OverflowError, TypeError, LookupError):
        return None
    return speeds if all(0 < speed < math.inf for speed in speeds.values()) else None


def write_speeds(file: Path, speeds: dict[str, float]) -> None:
    """Writes speeds for the next run, if the cache can be written."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, json.dumps(speeds) + "\n")
