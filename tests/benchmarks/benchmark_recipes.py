"""
Estimates how long each cell of the recipes takes, from its operations: nothing is trained.

    python tests/benchmarks/benchmark_recipes.py --two_cores 110 --gpu 90000

A training step is taken for three forward passes, at so many GFLOP/s. 110 is the rate of one measurement: a step of the
network of unconditional_betas_and_losses (171 M parameters, 32 images) took 19 s on two cores of a Xeon. 90,000 is 30% of
the peak of an A100 in bfloat16. Small networks stay below that, so their times on a GPU are too short. `--measure` times a
step here as `tiny-diffusers study --budget` does, for the diffusion recipes.
"""

import argparse
import dataclasses
import math

import torch
from accelerate import PartialState
from torch.utils.flop_counter import FlopCounterMode

from tiny_diffusers.data import ImageData
from tiny_diffusers.families.budget import seconds_a_step
from tiny_diffusers.families.dcgan import build_dcgan
from tiny_diffusers.families.diffusion import DiffusionArguments, resolve_diffusion
from tiny_diffusers.families.pixelcnn import build_pixelcnn
from tiny_diffusers.families.unets import build_unet
from tiny_diffusers.families.vae import build_vae
from tiny_diffusers.studies.cells import arguments_class
from tiny_diffusers.training.arguments import TrainingArguments, load_cells, parse_arguments
from tiny_diffusers.training.recipes import script_of, shipped_recipes


# dataset -> images of its training split, channels, side
DATASETS = {
    "digits": (1797, 1, 8),
    "ylecun/mnist": (60_000, 1, 28),
    "uoft-cs/cifar10": (50_000, 3, 32),
    "tanganke/stl10": (5_000, 3, 96),
    "huggan/anime-faces": (21_551, 3, 64),
    "huggan/flowers-102-categories": (8_189, 3, 64),
    "nielsr/CelebA-faces": (202_599, 3, 64),
}
CLASSES = 10
VALIDATION = 0.05


def stand_in(arguments: TrainingArguments) -> ImageData:
    """Returns two images of the size of a cell's."""
    _, channels, side = DATASETS[arguments.dataset_name]
    side = arguments.resolution or side
    images = torch.zeros(2, channels, side, side, dtype=torch.uint8)
    return ImageData(images, None, dict(enumerate("abcdefghij")), "stand-in", "train", "")


def count(arguments: TrainingArguments, script: str, data: ImageData) -> tuple[int, float]:
    """Counts the parameters, and the GFLOP of a forward pass of one image."""
    device = "cpu" if script in ("dcgan", "pixelcnn") else "meta"  # these compute with constants of their own
    x = torch.zeros(1, *data.images.shape[1:], device=device)
    with torch.device(device), FlopCounterMode(display=False) as counter:
        if isinstance(arguments, DiffusionArguments):
            module = build_unet(arguments, data, CLASSES if script == "conditional" else None)
            module(x, torch.zeros(1))
            modules = [module]
        elif script == "vae":
            modules = [build_vae(arguments, data)]
            modules[0](x)
        elif script == "dcgan":
            modules = list(build_dcgan(arguments, data))
            labels = torch.zeros(1, dtype=torch.long) if arguments.class_conditional else None
            modules[0](torch.zeros(1, modules[0].config.latent_dim), labels)
            for _ in range(2):  # of real images, and of generated ones
                modules[1](x, labels)
        else:
            modules = [build_pixelcnn(arguments, data)]
            modules[0](x)
    return sum(p.numel() for m in modules for p in m.parameters()), counter.get_total_flops() / 1e9


def num_steps(arguments: TrainingArguments) -> int | None:
    """Returns the steps of a cell; None if it says its minutes."""
    if arguments.max_train_steps or arguments.max_train_minutes:
        return arguments.max_train_steps
    images = DATASETS[arguments.dataset_name][0]
    if arguments.classes:
        images = images // CLASSES * len(arguments.classes.split(","))
    return math.ceil(arguments.num_epochs * images * (1 - VALIDATION) / arguments.train_batch_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=shipped_recipes(), default=list(shipped_recipes()))
    parser.add_argument("--two_cores", type=float, default=110.0, help="GFLOP/s")
    parser.add_argument("--gpu", type=float, default=90_000.0, help="GFLOP/s")
    parser.add_argument("--measure", action="store_true", help="also time a step here")
    args = parser.parse_args()

    print("| recipe | cell | parameters (M) | GFLOP an image | steps | two cores (h) | GPU (h) | s a step here |")
    print("| --- | --- |" + " ---: |" * 6)
    for name in args.recipes:
        recipe = shipped_recipes()[name]
        for cell, changes in (load_cells(recipe)[1] or {None: {}}).items():
            script = script_of(recipe, changes.get("script"))
            argv = ["--config", name, *(["--cell", cell] if cell else [])]
            arguments = parse_arguments(arguments_class(script), argv)
            if isinstance(arguments, DiffusionArguments):
                arguments = dataclasses.replace(arguments, **resolve_diffusion(arguments, PartialState()))
            data, steps = stand_in(arguments), num_steps(arguments)
            parameters, forward = count(arguments, script, data)
            training, seconds = 3 * forward, ""
            if args.measure and isinstance(arguments, DiffusionArguments):
                seconds = f"{seconds_a_step(arguments, data):.2f}"
            hours = ["by its minutes"] * 2
            if steps:
                work = steps * arguments.train_batch_size * training
                hours = [f"{work / rate / 3600:.2g}" for rate in (args.two_cores, args.gpu)]
            words = [
                name,
                cell or "–",
                f"{parameters / 1e6:.2f}",
                f"{training:.2f}",
                f"{steps or 0:,}",
                *hours,
                seconds,
            ]
            print("| " + " | ".join(words) + " |", flush=True)


if __name__ == "__main__":
    main()
