"""
Train the autoencoder of latent diffusion on small images: then `--vae` trains a diffusion model on its latents.

    tiny-diffusers train autoencoder                                                        # the embedded 8x8 digits
    tiny-diffusers train autoencoder --dataset_name ylecun/mnist --resolution 32 --max_train_minutes 5
"""

import sys

from diffusers import AutoencoderKL

from tiny_diffusers.families.autoencoder import (
    Autoencoder,
    AutoencoderArguments,
    build_autoencoder,
    load_perceptual,
    resolve_autoencoder,
)
from tiny_diffusers.pipelines.pipeline_tiny_vae import TinyVAEPipeline
from tiny_diffusers.training.arguments import parse_arguments
from tiny_diffusers.training.family import load_pretrained
from tiny_diffusers.training.process import launch, load_data, setup_process
from tiny_diffusers.training.settings import resolve_settings
from tiny_diffusers.training.trainer import Trainer


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(AutoencoderArguments, argv, __doc__)
    accelerator = setup_process(arguments)
    data = load_data(arguments, accelerator)
    pretrained = load_pretrained(arguments, TinyVAEPipeline, AutoencoderKL)
    settings = resolve_settings(arguments, accelerator, data, **resolve_autoencoder(arguments, data, pretrained))

    vae = build_autoencoder(settings, data, pretrained)
    extractor = load_perceptual(settings, accelerator.device)
    family = Autoencoder(vae, settings.reconstruction, settings.kl_weight, extractor, settings.perceptual_weight)

    Trainer(settings, accelerator, data, family).run()


if __name__ == "__main__":
    sys.exit(launch(main))
