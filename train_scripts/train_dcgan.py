"""
Train a DCGAN on small images, unconditionally, or by their classes, or numbers and labels by name.

    accelerate launch train_scripts/train_dcgan.py                                          # the embedded 8x8 digits
    tiny-diffusers train dcgan --dataset_name ylecun/mnist --resolution 32 --max_train_minutes 10
"""

import sys

from tiny_diffusers.families.conditions import measure_conditions
from tiny_diffusers.families.dcgan import DCGAN, DCGANArguments, build_dcgan, resolve_dcgan
from tiny_diffusers.pipelines.pipeline_tiny_dcgan import TinyDCGANPipeline
from tiny_diffusers.training.arguments import parse_arguments
from tiny_diffusers.training.family import load_pretrained
from tiny_diffusers.training.process import launch, load_data, setup_process
from tiny_diffusers.training.settings import resolve_settings
from tiny_diffusers.training.trainer import Trainer


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(DCGANArguments, argv, __doc__)
    accelerator = setup_process(arguments)
    data = load_data(arguments, accelerator, require_labels=arguments.class_conditional)
    pretrained = load_pretrained(arguments, TinyDCGANPipeline)
    settings = resolve_settings(arguments, accelerator, data, **resolve_dcgan(arguments, data, pretrained))

    data, statistics = measure_conditions(settings, data)
    num_conditions = None if statistics is None else len(statistics.names)
    generator, discriminator = build_dcgan(settings, data, pretrained, num_conditions)
    family = DCGAN(
        generator,
        discriminator,
        id2label=data.id2label if settings.class_conditional else None,
        real_label=settings.real_label,
        fake_label=settings.fake_label,
        instance_noise=settings.instance_noise,
        instance_noise_steps=settings.instance_noise_steps,
        condition_statistics=statistics,
    )

    Trainer(settings, accelerator, data, family).run()


if __name__ == "__main__":
    sys.exit(launch(main))
