"""
Train a variational autoencoder on small images.

    accelerate launch train_scripts/train_vae.py                                            # the embedded 8x8 digits
    tiny-diffusers train vae --dataset_name ylecun/mnist --resolution 32 --max_train_minutes 10
"""

import sys

from tiny_diffusers.families.vae import VAE, VAEArguments, build_vae, resolve_vae
from tiny_diffusers.pipelines.pipeline_tiny_vae import TinyVAEPipeline
from tiny_diffusers.training.arguments import parse_arguments
from tiny_diffusers.training.family import load_pretrained
from tiny_diffusers.training.process import launch, load_data, setup_process
from tiny_diffusers.training.settings import resolve_settings
from tiny_diffusers.training.trainer import Trainer


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(VAEArguments, argv)
    accelerator = setup_process(arguments)
    data = load_data(arguments, accelerator)
    pretrained = load_pretrained(arguments, TinyVAEPipeline)
    settings = resolve_settings(arguments, accelerator, data, **resolve_vae(arguments, data, pretrained))

    vae = build_vae(settings, data, pretrained)
    family = VAE(vae, settings.kl_weight, settings.kl_warmup_steps)

    Trainer(settings, accelerator, data, family).run()


if __name__ == "__main__":
    sys.exit(launch(main))
