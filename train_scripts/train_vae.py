"""
Train a variational autoencoder on small images.

    accelerate launch train_scripts/train_vae.py                                            # the embedded 8x8 digits
    tiny-diffusers train vae --dataset_name ylecun/mnist --resolution 32 --max_train_minutes 10
"""

import sys

from tiny_diffusers.families.conditions import measure_conditions
from tiny_diffusers.families.vae import VAE, VAEArguments, build_vae, resolve_vae
from tiny_diffusers.models.vae_tiny import TinyVAEModel
from tiny_diffusers.pipelines.pipeline_tiny_vae import TinyVAEPipeline
from tiny_diffusers.training.arguments import parse_arguments
from tiny_diffusers.training.family import load_pretrained
from tiny_diffusers.training.process import launch, load_data, setup_process
from tiny_diffusers.training.settings import resolve_settings
from tiny_diffusers.training.trainer import Trainer


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(VAEArguments, argv, __doc__)
    accelerator = setup_process(arguments)
    data = load_data(arguments, accelerator, require_labels=arguments.class_conditional)
    pretrained = load_pretrained(arguments, TinyVAEPipeline, TinyVAEModel)
    settings = resolve_settings(arguments, accelerator, data, **resolve_vae(arguments, data, pretrained))

    data, statistics = measure_conditions(settings, data)
    num_conditions = None if statistics is None else len(statistics.names)
    vae = build_vae(settings, data, pretrained, num_conditions)
    id2label = data.id2label if settings.class_conditional else None
    family = VAE(vae, settings.kl_weight, settings.kl_warmup_steps, id2label, statistics)

    Trainer(settings, accelerator, data, family).run()


if __name__ == "__main__":
    sys.exit(launch(main))
