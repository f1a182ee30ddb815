"""
Fits diffusion networks to a budget of minutes: widths are divided by a factor, so that enough steps are taken.

The networks of one study are divided by the same factor, so that what they try against each other stays: a network of about
half the width of another, or with one level more, still is.
"""

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..data import ImageData
from ..errors import say
from ..hardware import default_dtype, setup_torch
from ..models.unet_tiny import PRESETS
from ..training.arguments import TrainingArguments, network_options
from ..training.settings import earlier_settings, resolve
from .conditional_diffusion import ConditionalArguments, build_conditioning
from .diffusion import DiffusionArguments
from .unets import build_unet, resolve_unet


MIN_STEPS = 500  # with fewer, a network learns too little to be judged
_STEPS_SHARE = 0.8  # of the minutes; the others go to validations, samples and saving
_FACTORS = (1, 2, 4, 8, 16, 32)
_WIDTH_STEP = 8  # widths are multiples of it
_TRIAL_IMAGES = 4  # timed first on a CPU: a batch takes longer, but at most in proportion
_NARROWED = ("block_out_channels", "attention")


def fit_to_budget(arguments: DiffusionArguments, state: PartialState, data: ImageData) -> DiffusionArguments:
    """
    Resolves `--budget`: the minutes of the run, and a narrower U-Net if `MIN_STEPS` of the one that was asked for, or
    `--max_train_steps`, would not fit into them. Says in one line what is changed. A resumed run keeps its network.

    Args:
        arguments ([`DiffusionArguments`]): The settings as asked for.
        state (`PartialState`): The processes, of which the first measures.
        data ([`ImageData`]): The images, with their latents if the run is on these.
    """
    if arguments.budget is None:
        return arguments
    steps = arguments.max_train_steps
    length = {"max_train_minutes": arguments.budget} if steps is None else {}
    earlier = earlier_settings(arguments, data)
    if earlier:
        network = {name: earlier[name] for name in _NARROWED if earlier.get(name) is not None}
    elif widths_of(arguments, data) is None:
        if state.is_main_process:
            say(
                f"--budget {arguments.budget:g}: the network stays, as only U-Nets that are built from options become "
                "narrower."
            )
        network = {}
    else:
        factor = [None]
        if state.is_main_process:
            factor = [choose_factor({"": arguments}, {"": data}, arguments.budget, steps)]
        network = narrow(arguments, data, broadcast_object_list(factor)[0])
    return resolve(arguments, **length, **network)


def choose_factor(
    networks: Mapping[str, TrainingArguments],
    data: Mapping[str, ImageData],
    minutes: float,
    num_steps: int | None = None,
) -> int:
    """
    Returns the first factor by which steps of all networks fit into the minutes, or else the last by which those of
    different widths still differ, and says so.

    Args:
        networks (`Mapping[str, TrainingArguments]`): Name -> the arguments that a network is built from.
        data (`Mapping[str, ImageData]`): Name -> its images.
        minutes (`float`): Minutes for the training of each.
        num_steps (`int`, *optional*): How many steps must fit; `MIN_STEPS` if not given.
    """
    num_steps = num_steps or MIN_STEPS
    limit, times = 60 * minutes * _STEPS_SHARE / num_steps, {}
    widths: dict[int, list[list[int]]] = {}
    for factor in _FACTORS:
        narrowed = {
            name: dataclasses.replace(each, **narrow(each, data[name], factor)) for name, each in networks.items()
        }
        tried = [widths_of(each, data[name]) for name, each in narrowed.items()]
        if not stay_different(networks, data, factor) or tried in widths.values():
            break
        widths[factor], times[factor] = tried, _slowest(narrowed, data, limit)
        if times[factor] <= limit:
            break
    factor, seconds = max(times), times[max(times)]
    short = "" if seconds <= limit else f"fewer than {num_steps} steps may fit"
    if factor > 1:
        narrower = f"about {factor} times narrower"
        if len(networks) == 1:
            narrower += f" ({' '.join(map(str, widths[factor][0]))})"
        say(
            f"--budget {minutes:g}: a step takes up to {times[1]:.3g} s here, so the network becomes {narrower}, with up to "
            f"{seconds:.3g} s{short and f', and still {short}'}; all other settings stay."
        )
    elif short:
        say(
            f"--budget {minutes:g}: {short}, as a step takes up to {seconds:.3g} s here, and no narrower network is tried."
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

    Widths become multiples of 8, of the groups of the norms, and, where they are larger, of an attention head. The levels
    with attention stay those of the original.
    """
    if factor == 1:
        return {}
    options = {**PRESETS.get(arguments.preset, {}), **_known(resolve_unet(arguments, data))}
    step, head = math.lcm(_WIDTH_STEP, options.get("norm_num_groups") or 1), options.get("attention_head_dim")
    widths = []
    for width in widths_of(arguments, data):
        multiple = math.lcm(step, head) if head and width / factor > head else step
        widths.append(min(width, max(multiple, round(width / factor / multiple) * multiple)))
    return _known({"block_out_channels": widths, "attention": resolve_unet(arguments, data)["attention"]})


def _known(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def stay_different(networks: Mapping[str, TrainingArguments], data: Mapping[str, ImageData], factor: int) -> bool:
    """Checks that networks of different widths have different widths after the division."""
    before = {tuple(widths_of(each, data[name])) for name, each in networks.items()}
    options = (narrow(each, data[name], factor) for name, each in networks.items())
    return factor == 1 or len({tuple(each["block_out_channels"]) for each in options}) == len(before)


def _slowest(networks: Mapping[str, TrainingArguments], data: Mapping[str, ImageData], limit: float) -> float:
    """Returns the most seconds that a step of any network takes; the first that are above the limit, if there are."""
    times: dict[str, float] = {}
    for name, arguments in networks.items():
        network = network_options(arguments), arguments.preset, _given(arguments, data[name])
        key = repr((network, data[name].input_shape, arguments.train_batch_size))
        if key not in times:
            times[key] = seconds_a_step(arguments, data[name], limit)
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
    Measures a forward and a backward pass of the network for a batch, at most, in the dtype of its training.

    On a CPU, a few images are measured first. Their time in proportion to the batch is too long for a narrow network, which
    spends it on the calls rather than on the images: so the whole batch is measured where that decides whether a step
    takes at most `limit` seconds.
    """
    device = setup_torch(arguments.num_threads)
    dtype = torch.float32 if arguments.mixed_precision == "no" else default_dtype(device)
    unet = build_unet(arguments, data, **_given(arguments, data)).to(device)
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps
    if device.type != "cpu":
        return _seconds(unet, data, batch, dtype)
    count = min(batch, _TRIAL_IMAGES)
    seconds = _seconds(unet, data, count, dtype)
    in_proportion = seconds * batch / count
    return _seconds(unet, data, batch, dtype) if seconds <= limit < in_proportion else in_proportion


def _seconds(unet: torch.nn.Module, data: ImageData, count: int, dtype: torch.dtype) -> float:
    """Measures a forward and a backward pass for a number of images."""
    device = unet.device
    images = torch.zeros(count, unet.config.in_channels, *data.input_shape[1:], device=device)
    images = images.to(memory_format=torch.channels_last)
    times = []
    for _ in range(2):  # the first fills caches
        began = time.perf_counter()
        with torch.autocast(device.type, dtype, dtype != torch.float32):
            output = unet(images, torch.zeros(count, device=device)).sample
        output.float().square().mean().backward()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)
