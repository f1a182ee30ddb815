"""
Tune a diffusion model of small images into a consistency model, which draws an image in one or two passes of the network.

    tiny-diffusers train consistency --pretrained_model_name_or_path runs/ddpm-digits       # the embedded 8x8 digits
    tiny-diffusers train consistency --pretrained_model_name_or_path model_cards/mnist-32 \
        --dataset_name ylecun/mnist --resolution 32 --max_train_minutes 10
"""

import dataclasses
import sys

from tiny_diffusers.families.budget import fit_to_budget
from tiny_diffusers.families.conditional_diffusion import build_conditioning
from tiny_diffusers.families.conditions import measure_conditions
from tiny_diffusers.families.consistency import (
    ConditionalConsistency,
    Consistency,
    ConsistencyArguments,
    build_consistency_scheduler,
    load_trajectories,
    load_tuned,
    resolve_consistency,
)
from tiny_diffusers.families.latents import load_latents
from tiny_diffusers.families.unets import build_unet, resolve_unet
from tiny_diffusers.training.arguments import parse_arguments
from tiny_diffusers.training.process import launch, load_data, setup_process
from tiny_diffusers.training.settings import resolve_settings
from tiny_diffusers.training.trainer import Trainer


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(ConsistencyArguments, argv, __doc__)
    accelerator = setup_process(arguments)
    pipeline = load_tuned(arguments)
    has_classes = getattr(pipeline, "_num_rows", 0) > 0  # from scratch there are none
    data = load_data(arguments, accelerator, require_labels=has_classes)
    arguments, data, vae = load_latents(arguments, accelerator, data)
    arguments = fit_to_budget(arguments, accelerator.state, data)
    options = resolve_consistency(arguments, data, pipeline, accelerator.state)
    options |= resolve_unet(dataclasses.replace(arguments, **options), data)
    settings = resolve_settings(arguments, accelerator, data, **options)

    scheduler = build_consistency_scheduler(settings)
    conditioning = build_conditioning(settings, data)
    data, statistics = measure_conditions(settings, data)
    id2label = data.id2label if has_classes else None
    num_class_embeds = None if id2label is None else len(id2label)
    num_conditions = None if statistics is None else len(statistics.names)
    unet = build_unet(settings, data, num_class_embeds, conditioning, num_conditions)
    options = {"num_stages": settings.num_stages, "augment_prob": settings.augment_prob, "vae": vae}
    options["trajectories"] = load_trajectories(settings, accelerator, data, pipeline, num_class_embeds)
    options["held_out"] = settings.validation_split
    if id2label is None and conditioning is None and statistics is None:
        family = Consistency(unet, scheduler, settings.num_inference_steps, **options)
    else:
        family = ConditionalConsistency(
            unet,
            scheduler,
            id2label,
            class_dropout_prob=settings.class_dropout_prob,
            guidance_scales=settings.guidance_scales,
            num_inference_steps=settings.num_inference_steps,
            conditioning=conditioning,
            condition_statistics=statistics,
            **options,
        )

    Trainer(settings, accelerator, data, family).run()


if __name__ == "__main__":
    sys.exit(launch(main))
