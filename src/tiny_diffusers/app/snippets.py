"""The command and the lines of Python that make the same images as a request of the app."""

import argparse
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..samplers import SCHEDULERS
from .models import Model


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..commands.sampling import SamplePlan


def command_line(command: str, words: Sequence[str]) -> str:
    """Returns a command as it is typed in a shell."""
    return shlex.join(["tiny-diffusers", *command.split(), *words])


def python_of_samples(model: Model, pipe: "DiffusionPipeline", plan: "SamplePlan", args: argparse.Namespace) -> str:
    """Returns the lines of Python that draw the images of `sample`."""
    imports, setup = ["import torch", "from tiny_diffusers import TinyPipeline"], []
    device = f'.to("{pipe.device.type}")' if pipe.device.type != "cpu" else ""
    if args.scheduler is not None:
        class_name, options = SCHEDULERS[model.objective][args.scheduler]
        library = "tiny_diffusers" if class_name.startswith("Tiny") else "diffusers"
        imports.insert(1, f"from {library} import {class_name}")
        given = "".join(f", {name}={value!r}" for name, value in options.items())
        setup.append(f"pipe.scheduler = {class_name}.from_config(pipe.scheduler.config{given})")
    options = dict(plan.options)
    if plan.labels is not None:
        options["class_labels"] = plan.labels
    call = ["generator=generator", *(f"{name}={value!r}" for name, value in options.items())]
    lines = [
        *imports,
        "",
        f"pipe = TinyPipeline.from_pretrained({model.checkpoint!r}){device}",
        f"pipe.{pipe._network_name}.to(memory_format=torch.channels_last)  # as the command does",
        *setup,
        f"generator = [torch.Generator().manual_seed({args.seed} + i) for i in range({plan.num_images})]",
        f"images = pipe(batch_size={plan.num_images}, {', '.join(call)}).images",
    ]
    return "\n".join(lines)
