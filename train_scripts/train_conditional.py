"""
Train a class-conditional diffusion model on small images, guided by dropping some of the labels.

    accelerate launch train_scripts/train_conditional.py                                    # the embedded 8x8 digits
    accelerate launch train_scripts/train_conditional.py --dataset_name uoft-cs/cifar10 --random_flip --max_train_minutes 60
"""

import sys

from tiny_diffusers.training.arguments import parse_arguments
from tiny_diffusers.training.diffusion import ConditionalArguments, ConditionalDiffusion, build_scheduler, build_unet
from tiny_diffusers.training.trainer import Trainer, launch, load_data, start


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(ConditionalArguments, argv)
    accelerator = start(arguments)
    data = load_data(arguments, accelerator, require_labels=True)

    scheduler = build_scheduler(arguments)
    unet = build_unet(arguments, data, num_class_embeds=len(data.id2label))
    family = ConditionalDiffusion(
        unet,
        scheduler,
        data.id2label,
        arguments.class_dropout_prob,
        arguments.guidance_scales,
        arguments.ddpm_num_inference_steps,
    )

    Trainer(arguments, accelerator, data, family).run()


if __name__ == "__main__":
    sys.exit(launch(main))
