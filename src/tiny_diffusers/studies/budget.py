"""
Fits the networks of a study to a budget of minutes. The widths of all cells are divided by one factor, so that what they
try against each other stays: a network of about half the width of another, or with one level more, still is.
"""

import dataclasses
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..data import ImageData
from ..errors import UserError, say
from ..evaluation.evaluator import processes
from ..families.conditional_diffusion import ConditionalArguments, build_conditioning
from ..families.unets import build_unet, resolve_unet
from ..hardware import default_dtype, setup_torch
from ..models.unet_tiny import PRESETS
from ..training.arguments import TrainingArguments, network_options
from ..training.process import load_data
from .cells import Study


MIN_STEPS = 500  # with fewer, a network learns too little to be compared
_STEPS_SHARE = 0.8  # of the minutes; the others go to validations, samples and saving
_FACTORS = (1, 2, 4, 8, 16, 32)
_WIDTH_STEP = 8  # widths are multiples of it
_TRIAL_IMAGES = 4  # timed first on a CPU: a batch takes longer, but at most in proportion


def fit_networks(
    study: Study, cells: Iterable[str], factor: int | None = None
) -> tuple[int | None, dict[str, dict[str, Any]]]:
    """
    Narrows the networks of cells so that each trains for the study's steps, or for `MIN_STEPS`, in the budget. Says in one
    line what is changed.

    Only U-Nets that are built from options become narrower: other networks stay as they are.

    Args:
        study ([`Study`]): The study, with a budget.
        cells (`Iterable[str]`): Its cells.
        factor (`int`, *optional*): The factor by which the study has divided the widths of other cells; measured if not
            given.

    Returns:
        `tuple[int | None, dict]`: The factor, None if there is no network to narrow, and cell -> the options that change its
        network.

    Raises:
        UserError: If two cells that differ would have the same network by the given factor.
    """
    setup_torch()
    arguments = {cell: study.arguments_of(cell) for cell in cells}
    data = {cell: load_data(each, processes()) for cell, each in arguments.items()}
    diffusion = [cell for cell in arguments if study.scripts[cell] in ("unconditional", "conditional")]
    narrowed = {cell: arguments[cell] for cell in diffusion if widths_of(arguments[cell], data[cell])}
    others = [cell for cell in arguments if cell not in narrowed]
    if others:
        say(
            f"--budget {study.arguments.budget:g}: the networks of {', '.join(others)} stay"
            f"{'' if study.num_steps else ', and only their steps are fitted to it'}, as only U-Nets that are built from "
            "options become narrower."
        )
    if factor is None:
        factor = _choose_factor(study, narrowed, data) if narrowed else None
    elif not _stay_different(narrowed, data, factor):
        raise UserError(
            f"--cells {' '.join(study.cells)}: the study's networks are {factor} times narrower, and by that factor two of "
            "these cells would have the same: give another --output_dir."
        )
    return factor, {
        cell: narrow(each, data[cell], factor) if cell in narrowed else {} for cell, each in arguments.items()
    }


def _choose_factor(study: Study, cells: Mapping[str, TrainingArguments], data: Mapping[str, ImageData]) -> int:
    """Returns the first factor by which all networks fit, or else the last by which those that differ still do."""
    minutes, num_steps = study.arguments.budget, study.num_steps or MIN_STEPS
    limit, times = 60 * minutes * _STEPS_SHARE / num_steps, {}
    for factor in _FACTORS:
        if not _stay_different(cells, data, factor):
            break
        narrowed = {
            cell: dataclasses.replace(each, **narrow(each, data[cell], factor)) for cell, each in cells.items()
        }
        times[factor] = _slowest(narrowed, data, limit)
        if times[factor] <= limit:
            break
    factor, seconds = max(times), times[max(times)]
    short = "" if seconds <= limit else f"fewer than {num_steps} steps fit"
    if factor > 1:
        say(
            f"--budget {minutes:g}: the recipe's networks take up to {times[1]:.3g} s a step here, so all become about "
            f"{factor} times narrower, {seconds:.3g} s a step{short and f', and still {short}'}; its other settings stay."
        )
    elif short:
        say(
            f"--budget {minutes:g}: {short}, at {seconds:.3g} s a step, but narrower cells would have the same network."
        )
    return factor


def widths_of(arguments: TrainingArguments, data: ImageData) -> list[int] | None:
    """Returns the widths of a U-Net that is built from options or a preset; None for any other network."""
    options = resolve_unet(arguments, data)
    if options.get("network") != "unet":
        return None
    widths = options["block_out_channels"] or PRESETS.get(arguments.preset, {}).get("block_out_channels")
    return widths and list(widths)


def narrow(arguments: TrainingArguments, data: ImageData, factor: int) -> dict[str, Any]:
    """
    Returns the options that divide the widths of a U-Net by about a factor; none for 1.

    Widths stay multiples of 8, of the groups of the norms, and, where they are larger, of an attention head. The levels
    with attention stay those of the original.
    """
    if factor == 1:
        return {}
    options = {**PRESETS.get(arguments.preset, {}), **_known(resolve_unet(arguments, data))}
    step, head = math.lcm(_WIDTH_STEP, options.get("norm_num_groups") or 1), options.get("attention_head_dim")
    widths = []
    for width in widths_of(arguments, data):
        multiple = math.lcm(step, head) if head and width / factor > head else step
        widths.append(max(multiple, round(width / factor / multiple) * multiple))
    return _known({"block_out_channels": widths, "attention": resolve_unet(arguments, data)["attention"]})


def _known(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _stay_different(cells: Mapping[str, TrainingArguments], data: Mapping[str, ImageData], factor: int) -> bool:
    """Checks that networks of different widths have different widths after the division."""
    before = {tuple(widths_of(each, data[cell])) for cell, each in cells.items()}
    options = (narrow(each, data[cell], factor) for cell, each in cells.items())
    return factor == 1 or len({tuple(each["block_out_channels"]) for each in options}) == len(before)


def _slowest(cells: Mapping[str, TrainingArguments], data: Mapping[str, ImageData], limit: float) -> float:
    """Returns the most seconds that a step of any cell takes; the first that are above the limit, if there are."""
    times: dict[str, float] = {}
    for cell, arguments in cells.items():
        network = network_options(arguments), arguments.preset, _given(arguments, data[cell])
        key = repr((network, data[cell].images.shape, arguments.train_batch_size))
        if key not in times:
            times[key] = seconds_a_step(arguments, data[cell], limit)
        if times[key] > limit:
            return times[key]
    return max(times.values())


def _given(arguments: TrainingArguments, data: ImageData) -> dict[str, Any]:
    """Returns the arguments of `build_unet` that stand for classes, a conditioning image and conditions."""
    if not isinstance(arguments, ConditionalArguments):
        return {}
    return {
        "num_class_embeds": len(data.id2label) if data.id2label else None,
        "conditioning": build_conditioning(arguments, data),
        "num_conditions": None if data.conditions is None else len(data.condition_names),
    }


def seconds_a_step(arguments: TrainingArguments, data: ImageData, limit: float = 0.0) -> float:
    """
    Measures a forward and a backward pass of the network for a batch, in the dtype that the hardware has.

    On a CPU, a few images are measured first. Their time in proportion to the batch is too long for a narrow network, which
    spends it on the calls rather than on the images: so the whole batch is measured where that decides whether a step
    takes at most `limit` seconds.
    """
    device = setup_torch(arguments.num_threads)
    unet = build_unet(arguments, data, **_given(arguments, data)).to(device)
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps
    if device.type != "cpu":
        return _seconds(unet, data, batch)
    count = min(batch, _TRIAL_IMAGES)
    seconds = _seconds(unet, data, count)
    in_proportion = seconds * batch / count
    return _seconds(unet, data, batch) if seconds <= limit < in_proportion else in_proportion


def _seconds(unet: torch.nn.Module, data: ImageData, count: int) -> float:
    """Measures a forward and a backward pass for a number of images."""
    device = unet.device
    images = torch.zeros(count, unet.config.in_channels, *data.images.shape[2:], device=device)
    images = images.to(memory_format=torch.channels_last)
    times = []
    for _ in range(2):  # the first fills caches
        began = time.perf_counter()
        with torch.autocast(device.type, default_dtype(device), default_dtype(device) != torch.float32):
            output = unet(images, torch.zeros(count, device=device)).sample
        output.float().square().mean().backward()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)
