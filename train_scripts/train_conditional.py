"""
Train a diffusion model of small images with classes, numbers and labels by name, an image as a condition, or several of
them, for classifier-free guidance.

    accelerate launch train_scripts/train_conditional.py                                    # the embedded 8x8 digits
    tiny-diffusers train conditional --dataset_name uoft-cs/cifar10 --random_flip --max_train_minutes 60
    tiny-diffusers train conditional --dataset_name path/to/images --resolution 32 --conditioning low_resolution:2
    tiny-diffusers train conditional --dataset_name path/to/images --resolution 32 --condition_columns age,smiling
"""

import dataclasses
import sys

from tiny_diffusers.families.budget import fit_to_budget
from tiny_diffusers.families.conditional_diffusion import (
    ConditionalArguments,
    ConditionalDiffusion,
    build_conditioning,
)
from tiny_diffusers.families.conditions import measure_conditions
from tiny_diffusers.families.diffusion import build_scheduler, resolve_diffusion
from tiny_diffusers.families.latents import load_latents
from tiny_diffusers.families.unets import build_unet, resolve_unet
from tiny_diffusers.training.arguments import parse_arguments
from tiny_diffusers.training.process import launch, load_data, setup_process
from tiny_diffusers.training.settings import resolve_settings
from tiny_diffusers.training.trainer import Trainer


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(ConditionalArguments, argv, __doc__)
    accelerator = setup_process(arguments)
    data = load_data(arguments, accelerator, require_labels=arguments.requires_labels)
    arguments, data, vae = load_latents(arguments, accelerator, data)
    arguments = fit_to_budget(arguments, accelerator.state, data)
    options = resolve_diffusion(arguments, accelerator.state)
    options |= resolve_unet(dataclasses.replace(arguments, **options), data)
    settings = resolve_settings(arguments, accelerator, data, **options)

    scheduler = build_scheduler(settings)
    conditioning = build_conditioning(settings, data)
    data, statistics = measure_conditions(settings, data)
    num_class_embeds = None if data.id2label is None else len(data.id2label)
    num_conditions = None if statistics is None else len(statistics.names)
    unet = build_unet(settings, data, num_class_embeds, conditioning, num_conditions)
    family = ConditionalDiffusion(
        unet,
        scheduler,
        data.id2label,
        class_dropout_prob=settings.class_dropout_prob,
        guidance_scales=settings.guidance_scales,
        num_inference_steps=settings.num_inference_steps,
        num_preview_steps=settings.num_preview_steps,
        conditioning=conditioning,
        condition_statistics=statistics,
        augment_prob=settings.augment_prob,
        vae=vae,
    )

    Trainer(settings, accelerator, data, family).run()


if __name__ == "__main__":
    sys.exit(launch(main))
