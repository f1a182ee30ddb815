"""
Train an unconditional diffusion model on small images.

    accelerate launch train_scripts/train_unconditional.py                                  # the embedded 8x8 digits
    tiny-diffusers train unconditional --dataset_name ylecun/mnist --resolution 32 --max_train_minutes 10
"""

import dataclasses
import sys

from tiny_diffusers.families.budget import fit_to_budget
from tiny_diffusers.families.diffusion import Diffusion, DiffusionArguments, build_scheduler, resolve_diffusion
from tiny_diffusers.families.latents import load_latents
from tiny_diffusers.families.unets import build_unet, resolve_unet
from tiny_diffusers.training.arguments import parse_arguments
from tiny_diffusers.training.process import launch, load_data, setup_process
from tiny_diffusers.training.settings import resolve_settings
from tiny_diffusers.training.trainer import Trainer


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(DiffusionArguments, argv, __doc__)
    accelerator = setup_process(arguments)
    data = load_data(arguments, accelerator)
    arguments, data, vae = load_latents(arguments, accelerator, data)
    arguments = fit_to_budget(arguments, accelerator.state, data)
    options = resolve_diffusion(arguments, accelerator.state)
    options |= resolve_unet(dataclasses.replace(arguments, **options), data)
    settings = resolve_settings(arguments, accelerator, data, **options)

    scheduler = build_scheduler(settings)
    unet = build_unet(settings, data)
    family = Diffusion(
        unet, scheduler, settings.num_inference_steps, settings.num_preview_steps, settings.augment_prob, vae
    )

    Trainer(settings, accelerator, data, family).run()


if __name__ == "__main__":
    sys.exit(launch(main))
