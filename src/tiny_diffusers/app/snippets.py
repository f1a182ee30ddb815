"""The command and the lines of Python that make the same images as a request of the app."""

import argparse
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..samplers import SCHEDULERS
from .models import GUIDE, Model


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..commands.sampling import SamplePlan


def command_line(command: str, words: Sequence[str]) -> str:
    """Returns a command as it is typed in a shell."""
    return shlex.join(["tiny-diffusers", *command.split(), *words])


def python_of_samples(model: Model, pipe: "DiffusionPipeline", plan: "SamplePlan", args: argparse.Namespace) -> str:
    """Returns the lines of Python that draw the images of `sample`."""
    imports, setup = [], []
    if args.scheduler is not None:
        class_name, options = SCHEDULERS[model.objective][args.scheduler]
        library = "tiny_diffusers" if class_name.startswith("Tiny") else "diffusers"
        imports.append(f"from {library} import {class_name}")
        given = "".join(f", {name}={value!r}" for name, value in options.items())
        setup.append(f"pipe.scheduler = {class_name}.from_config(pipe.scheduler.config{given})")
    options = {name: repr(value) for name, value in plan.options.items() if name != "conditions"}
    of_images = {}  # name -> values, one for each image
    if plan.labels is not None:
        of_images["class_labels"] = plan.labels
    if "conditions" in plan.options:
        of_images["conditions"] = plan.options["conditions"]
    if plan.pictures is not None:
        imports.append("from PIL import Image")
        picture = 'Image.open("picture.png")'
        options["image"] = f"pipe.observe({picture})" if args.degrade else picture
    total, size = plan.num_images, args.batch_size
    setup.append(f"generator = [torch.Generator().manual_seed({args.seed} + i) for i in range({total})]")
    if total <= size:
        options |= {name: repr(values) for name, values in of_images.items()}
        draw = [f"images = {_call(total, 'generator', options)}"]
    else:  # a rounding may depend on the number of images in a batch
        setup += [f"{name} = {values!r}" for name, values in of_images.items()]
        options |= {name: f"{name}[i : i + {size}]" for name in of_images}
        draw = ["images = []", f"for i in range(0, {total}, {size}):", f"    batch = generator[i : i + {size}]"]
        draw.append(f"    images += {_call('len(batch)', 'batch', options)}")
    return "\n".join([*_load(model, pipe, imports), *setup, *draw])


def python_of_completion(
    model: Model, pipe: "DiffusionPipeline", kept: int, count: int, seed: int, options: dict
) -> str:
    """Returns the lines of Python that complete a picture below the rows that are kept."""
    width, height = model.size
    given = {"images": "given", "mask": "mask", **{name: repr(value) for name, value in options.items()}}
    lines = [
        *_load(model, pipe, ["from PIL import Image"]),
        f"mask = torch.arange({height})[:, None].expand(-1, {width}) < {kept}",
        f"generator = [torch.Generator().manual_seed({seed} + i) for i in range({count})]",
        f'given = [Image.open("picture.png")] * {count}',
        f"images = {_call(count, 'generator', given)}",
    ]
    return "\n".join(lines)


def _load(model: Model, pipe: "DiffusionPipeline", imports: list[str]) -> list[str]:
    """Returns the imports, and the lines that load a pipeline as the command does."""
    device = f'.to("{pipe.device}")' if pipe.device.type != "cpu" else ""
    networks = [pipe._network_name, *([GUIDE] if getattr(pipe, GUIDE, None) is not None else [])]
    return [
        "import torch",
        *imports,
        "from tiny_diffusers import TinyPipeline",
        "",
        f"pipe = TinyPipeline.from_pretrained({model.checkpoint!r}){device}",
        *(f"pipe.{name}.to(memory_format=torch.channels_last)  # as the command does" for name in networks),
    ]


def _call(batch_size: int | str, generator: str, options: dict[str, str]) -> str:
    given = "".join(f", {name}={value}" for name, value in options.items())
    return f"pipe(batch_size={batch_size}, generator={generator}{given}).images"
