"""
Train an unconditional diffusion model on small images.

    accelerate launch train_scripts/train_unconditional.py                                  # the embedded 8x8 digits
    accelerate launch train_scripts/train_unconditional.py --dataset_name ylecun/mnist --resolution 32 --max_train_minutes 10
"""

import sys

from tiny_diffusers.training.arguments import parse_arguments
from tiny_diffusers.training.diffusion import Diffusion, DiffusionArguments, build_scheduler, build_unet
from tiny_diffusers.training.trainer import Trainer, launch, load_data, start


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(DiffusionArguments, argv)
    accelerator = start(arguments)
    data = load_data(arguments, accelerator)

    scheduler = build_scheduler(arguments)
    unet = build_unet(arguments, data)
    family = Diffusion(unet, scheduler, arguments.ddpm_num_inference_steps)

    Trainer(arguments, accelerator, data, family).run()


if __name__ == "__main__":
    sys.exit(launch(main))
