"""
From the arguments, as asked for, to the settings of the run: the same dataclass, with what the machine, the data, the
family and an earlier run resolve.

Neither is ever written to. The settings are what a run uses, saves in its `config.yaml`, shows in its card and compares
when it is resumed.
"""

import dataclasses
import logging
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..data import ImageData, held_out
from ..resolution import spell_resolution
from ..runs import RunFolder
from .arguments import Arguments, TrainingArguments, is_open, network_options, read_settings, saved_settings


logger = logging.getLogger(__name__)

# What `--max_train_minutes` resolves: see `timing.py`.
MEASURED = ("max_train_steps", "eval_batch_size", "max_validation_samples")


def resolve_settings(arguments: Arguments, accelerator: Accelerator, data: ImageData, **options: Any) -> Arguments:
    """
    Resolves what the arguments leave open with the machine, the data and, on a resume, the earlier run's settings.
    Later are resolved, as they may depend on the speed of the network, the number of steps, by [`resolve_num_steps`], and
    `--mixed_precision auto`, by the [`~tiny_diffusers.training.trainer.Trainer`].

    Args:
        arguments ([`TrainingArguments`]): The settings as asked for.
        accelerator (`Accelerator`): From [`~tiny_diffusers.training.process.setup_process`].
        data ([`ImageData`]): The images, of one size.
        options (`Any`): What the family resolves, such as the options of its network.
    """
    settings = resolve(
        arguments,
        num_threads=torch.get_num_threads(),
        resolution=spell_resolution(*data.images.shape[2:]),
        output_dir=_output_dir(arguments, data),
        **options,
    )
    if not settings.resume_from_checkpoint:
        return settings
    earlier = earlier_settings(arguments, data)
    open_options = [name for name in options if getattr(arguments, name) is None and earlier.get(name) is not None]
    values = {name: earlier[name] for name in open_options}
    if "network" in open_options:  # with its options: those of the other network stay None
        left_open = [name for name, value in network_options(arguments).items() if value is None]
        values |= {name: earlier.get(name) for name in left_open}
    minutes = settings.max_train_minutes
    if settings.max_train_steps is None and minutes is not None and minutes == earlier.get("max_train_minutes"):
        values |= {name: earlier[name] for name in MEASURED if name in earlier and is_open(settings, name)}
    if settings.ema_start_step is None:
        values["ema_start_step"] = earlier.get("ema_start_step")
    return resolve(settings, **values)


def earlier_settings(arguments: Arguments, data: ImageData) -> dict[str, Any]:
    """Returns the settings of the run that the arguments resume, as its `config.yaml` has them; of a new run, none."""
    if not arguments.resume_from_checkpoint:
        return {}
    return read_settings(RunFolder(_output_dir(arguments, data)).config, type(arguments))


def _output_dir(arguments: Arguments, data: ImageData) -> str:
    name = Path(arguments.train_data_dir or data.name).name
    return arguments.output_dir or str(Path("runs", f"{arguments.FAMILY}-{name}"))


def split_indices(settings: TrainingArguments, data: ImageData) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the indices of the images to train on, and of those that are held out, or None."""
    if settings.validation_split == 0:
        return torch.arange(len(data)), None
    return held_out(len(data), settings.validation_split, settings.seed)


def resolve_num_steps(
    settings: Arguments, steps_per_epoch: float, measured: dict[str, int] | None = None
) -> Arguments:
    """
    Resolves the number of steps, and what follows from it.

    Args:
        settings ([`TrainingArguments`]): The settings so far.
        steps_per_epoch (`float`): Optimizer steps in which every image is seen once.
        measured (`dict[str, int]`, *optional*): What fits into `--max_train_minutes`: values of [`MEASURED`].
    """
    measured = dict(measured or {})
    num_measured = measured.pop("max_train_steps", None)
    steps = settings.max_train_steps or num_measured or math.ceil(settings.num_epochs * steps_per_epoch)
    ema_start_step = settings.ema_start_step
    if ema_start_step is None:
        ema_start_step = min(2000, steps // 10)
    return resolve(settings, max_train_steps=steps, ema_start_step=ema_start_step, **measured)


def resolve(settings: Arguments, **values: Any) -> Arguments:
    """Replaces settings, and records the names of those that nobody asked for."""
    changed = [name for name, value in values.items() if value != getattr(settings, name)]
    return dataclasses.replace(settings, **values, resolved=list(dict.fromkeys([*settings.resolved, *changed])))


def warn_of_changes(settings: TrainingArguments, earlier: dict[str, Any], resolved: Collection[str]) -> None:
    """
    Warns of each setting that makes the resumed run another run than the earlier one.

    Args:
        settings ([`TrainingArguments`]): The settings of the resumed run.
        earlier (`dict[str, Any]`): Those of the earlier run.
        resolved (`Collection[str]`): The names of those of `earlier` that nobody asked for.
    """
    saved = saved_settings(settings)
    # What an earlier length measured, another one resolves anew
    measured = [name for name in MEASURED if name in resolved and name not in settings.given]
    for field in dataclasses.fields(settings):
        value, before = saved.get(field.name), earlier.get(field.name)
        newly_resolved = before is None and field.name in settings.resolved
        if newly_resolved or field.name in measured:
            continue
        if field.metadata.get("changes_run") and field.name in earlier and before != value:
            logger.warning(f"--{field.name} is {value}, but was {before} in the run that is resumed.")
