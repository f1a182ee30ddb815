"""
Fits the networks of a study to a budget of minutes. All cells are divided by one factor, so that what they try against
each other stays: a network of half the width of another, or with one level more, still is.
"""

import dataclasses
import time
from typing import Any

import torch

from ..data import ImageData
from ..errors import say
from ..evaluation.evaluator import processes
from ..families.unets import build_unet, default_network
from ..hardware import default_dtype, setup_torch
from ..models.unet_tiny import PRESETS
from ..training.arguments import TrainingArguments, network_options
from ..training.process import load_data
from .cells import Study


MIN_STEPS = 500  # with fewer, a network learns too little to be compared
_STEPS_SHARE = 0.8  # of the minutes; the others go to validations, samples and saving
_FACTORS = (1, 2, 4, 8, 16, 32)
_MIN_WIDTH = 8
_TRIAL_IMAGES = 4  # on a CPU, whose time a step is proportional to the number of images


def fit_networks(study: Study) -> dict[str, dict[str, Any]]:
    """
    Returns the options by which the networks of all cells become so narrow that each takes `MIN_STEPS` in the budget;
    none if they do as they are. Says in one line what is changed.
    """
    minutes = study.arguments.budget
    if study.script not in ("unconditional", "conditional"):
        say(f"--budget {minutes:g}: the steps are fitted to it, and the networks of train_{study.script}.py stay.")
        return {}
    setup_torch()
    cells = {run.cell: study.parse(run.flags) for run in study.runs({}) if run.seed == study.arguments.seeds[0]}
    data = {cell: load_data(arguments, processes()) for cell, arguments in cells.items()}
    limit, first = 60 * minutes * _STEPS_SHARE / MIN_STEPS, None
    for factor in _FACTORS:
        narrowed = {cell: narrow(arguments, data[cell], factor) for cell, arguments in cells.items()}
        seconds = _slowest(narrowed, data, study.script == "conditional", limit)
        first = first or seconds
        if seconds <= limit:
            break
    if factor == 1:
        return {}
    short = "" if seconds <= limit else f", and fewer than {MIN_STEPS} steps still fit"
    say(
        f"--budget {minutes:g}: the recipe's networks take up to {first:.3g} s a step here, so all become {factor} times "
        f"narrower, {seconds:.3g} s a step{short}; its other settings stay."
    )
    return {cell: {"block_out_channels": arguments.block_out_channels} for cell, arguments in narrowed.items()}


def narrow(arguments: TrainingArguments, data: ImageData, factor: int) -> TrainingArguments:
    """Returns the arguments with all widths of the network divided by a factor, to multiples of 8."""
    widths = arguments.block_out_channels or PRESETS.get(arguments.preset, {}).get("block_out_channels")
    widths = widths or default_network(data.images.shape[-1])["block_out_channels"]
    widths = [max(_MIN_WIDTH, round(width / factor / 8) * 8) for width in widths] if factor > 1 else list(widths)
    return dataclasses.replace(arguments, block_out_channels=widths)


def _slowest(
    cells: dict[str, TrainingArguments], data: dict[str, ImageData], conditional: bool, limit: float
) -> float:
    """Returns the most seconds that a step of any cell takes; the first that are above the limit, if there are."""
    times: dict[str, float] = {}
    for cell, arguments in cells.items():
        key = repr((network_options(arguments), arguments.preset, data[cell].images.shape, arguments.train_batch_size))
        if key not in times:
            times[key] = seconds_a_step(arguments, data[cell], conditional)
        if times[key] > limit:
            return times[key]
    return max(times.values())


def seconds_a_step(arguments: TrainingArguments, data: ImageData, conditional: bool) -> float:
    """Measures a forward and a backward pass of the network for a batch, in the dtype that training takes here."""
    device = setup_torch(arguments.num_threads)
    unet = build_unet(arguments, data, len(data.id2label) if conditional else None).to(device)
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps
    count = min(batch, _TRIAL_IMAGES) if device.type == "cpu" else batch
    images = torch.zeros(count, *data.images.shape[1:], device=device).to(memory_format=torch.channels_last)
    times = []
    for _ in range(2):  # the first fills caches
        began = time.perf_counter()
        with torch.autocast(device.type, default_dtype(device), default_dtype(device) != torch.float32):
            output = unet(images, torch.zeros(count, device=device)).sample
        output.float().square().mean().backward()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - began)
    return min(times) * batch / count
