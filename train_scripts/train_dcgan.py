"""
Train a DCGAN on small images, unconditionally or on their classes.

    accelerate launch train_scripts/train_dcgan.py                                          # the embedded 8x8 digits
    accelerate launch train_scripts/train_dcgan.py --dataset_name ylecun/mnist --resolution 32 --max_train_minutes 10
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel
from torch import nn

from tiny_diffusers.data import ImageData
from tiny_diffusers.errors import UserError
from tiny_diffusers.models.dcgan_tiny import TinyDCGANDiscriminator, TinyDCGANGenerator
from tiny_diffusers.pipelines.pipeline_tiny_dcgan import TinyDCGANPipeline
from tiny_diffusers.training.arguments import TrainingArguments, flag, parse_arguments
from tiny_diffusers.training.baselines import check_given, halving_widths, load_pretrained
from tiny_diffusers.training.trainer import Batch, Family, Trainer, launch, load_data, start


_MAX_GRID_CLASSES = 10


@dataclass
class DCGANArguments(TrainingArguments):
    """The networks, their game, and DCGAN's settings of the optimisers (arXiv 1511.06434, section 3)."""

    SMOKE: ClassVar[dict[str, Any]] = {
        **TrainingArguments.SMOKE,
        "generator_channels": [8],
        "discriminator_channels": [8],
    }

    latent_dim: int = flag(100, "Size of the generator's latent vector.")
    generator_channels: list[int] | None = flag(
        None,
        "Widths of the generator's levels, finest first, as 64 128 256 (by resolution) or, front-loaded, 64 256 256.",
    )
    discriminator_channels: list[int] | None = flag(None, "Widths of the discriminator's levels, finest first.")
    class_conditional: bool = flag(False, "Give both networks the class of the image.")
    class_embed_dim: int = flag(16, "Channels that the class's embedding is tiled to.")
    real_label: float = flag(1.0, "What the discriminator is to say of real images; 0.9 is smoothed.")
    fake_label: float = flag(0.0, "What the discriminator is to say of generated images; 0.1 is smoothed.")
    instance_noise: float = flag(0.0, "Standard deviation of noise on all that the discriminator sees; 0.1 is usual.")
    instance_noise_steps: int = flag(5000, "Steps over which that noise falls to none.")

    learning_rate: float = flag(2e-4, "Highest learning rate.")
    lr_scheduler: str = flag("constant", "As for the other families; DCGAN's is constant.")
    optimizer: str = flag("adam", "adamw, adam or sgd.")
    adam_beta1: float = flag(0.5, "Adam's beta1 (SGD's momentum).")
    adam_beta2: float = flag(0.999, "Adam's beta2.")
    adam_weight_decay: float = flag(0.0, "Weight decay.")
    max_grad_norm: float = flag(math.inf, "Gradients are clipped to this norm; DCGAN clips none.")
    validation_split: float = flag(0.0, "A GAN has no validation loss: nothing is held out.")

    def __post_init__(self):
        if not 0 <= self.fake_label < self.real_label <= 1:
            raise UserError(
                f"--fake_label {self.fake_label} --real_label {self.real_label}: they must rise within [0, 1]; 0 and 1 "
                "are plain, 0.1 and 0.9 smoothed."
            )
        if not 0 <= self.instance_noise < math.inf:
            raise UserError(f"--instance_noise {self.instance_noise}: it must be a finite number of at least 0.")
        if self.instance_noise_steps < 1:
            raise UserError(f"--instance_noise_steps {self.instance_noise_steps}: it must be at least 1.")
        for name, off in (
            ("validation_split", 0),
            ("early_stopping_patience", None),
            ("gradient_checkpointing", False),
        ):
            if getattr(self, name) != off:
                why = "batch norm would count twice" if "gradient" in name else "a GAN has no validation loss"
                raise UserError(f"--{name} {getattr(self, name)}: {why}; leave it out.")


class DCGAN(Family):
    """
    Generative adversarial network (Goodfellow et al. 2014, arXiv 1406.2661) with DCGAN's networks.

    Each step the discriminator learns to tell real images from generated ones, and then the generator to be taken for
    real by the discriminator as it is now: the non-saturating loss, -log D(G(z)).

    Args:
        generator ([`TinyDCGANGenerator`]), discriminator ([`TinyDCGANDiscriminator`]): The networks.
        id2label (`dict[int, str]`, *optional*): The names of the classes, for networks with classes.
        real_label (`float`), fake_label (`float`): The discriminator's targets.
        instance_noise (`float`): Standard deviation, at the start, of the noise on the discriminator's inputs
            (arXiv 1610.04490).
        instance_noise_steps (`int`): Steps over which it falls to 0, linearly.
    """

    name = "dcgan"

    def __init__(
        self,
        generator: TinyDCGANGenerator,
        discriminator: TinyDCGANDiscriminator,
        id2label: dict[int, str] | None = None,
        real_label: float = 1.0,
        fake_label: float = 0.0,
        instance_noise: float = 0.0,
        instance_noise_steps: int = 1,
    ):
        self.modules = {"generator": generator, "discriminator": discriminator}
        self.latent_dim = generator.config.latent_dim
        self.id2label, self.null_label = id2label, generator.config.num_class_embeds
        self.real_label, self.fake_label = real_label, fake_label
        self.instance_noise, self.instance_noise_steps = instance_noise, instance_noise_steps
        self.phases = {"instance_noise_steps": instance_noise_steps} if instance_noise else {}

    def losses(self, modules: dict[str, nn.Module], batch: Batch) -> Iterator[tuple]:
        generator, discriminator, labels = modules["generator"], modules["discriminator"], batch.labels
        real = self._noisy(batch.images, batch, "real_noise")
        generated = generator(batch.draws.normal("latents", self.latent_dim), labels).sample
        fake = self._noisy(generated, batch, "fake_noise")

        # 1. the discriminator: real and generated images apart, so that batch norm sees each by itself
        on_real = discriminator(real, labels).logits
        on_fake = discriminator(fake.detach(), labels).logits
        loss = _cross_entropy(on_real, self.real_label) + _cross_entropy(on_fake, self.fake_label)
        yield "discriminator", loss, {"D(x)": on_real.sigmoid().mean(), "D(G(z))": on_fake.sigmoid().mean()}

        # 2. the generator, through a discriminator that takes no gradients, nor waits for other processes to send them
        discriminator = extract_model_from_parallel(discriminator)
        discriminator.requires_grad_(False)
        yield "generator", _cross_entropy(discriminator(fake, labels).logits, 1.0)
        discriminator.requires_grad_(True)

    def _noisy(self, images: torch.Tensor, batch: Batch, purpose: str) -> torch.Tensor:
        sigma = self.instance_noise * max(0.0, 1 - batch.draws.step / self.instance_noise_steps)
        return images + sigma * batch.draws.normal(purpose, *images.shape[1:]) if sigma else images

    def pipeline(self, modules: dict[str, nn.Module]) -> TinyDCGANPipeline:
        return TinyDCGANPipeline(modules["generator"], modules["discriminator"], id2label=self.id2label)

    def sample(self, pipeline: TinyDCGANPipeline, num_images: int, seed: int) -> tuple[list, dict]:
        """A row for each class where there are classes, each from the same latents."""
        if self.id2label is None:
            generators = [torch.Generator().manual_seed(seed + i) for i in range(num_images)]
            return pipeline(batch_size=num_images, generator=generators).images, {}
        classes = list(self.id2label)[:_MAX_GRID_CLASSES]
        each = max(1, num_images // len(classes))
        labels = [class_id for class_id in classes for _ in range(each)]
        generators = [torch.Generator().manual_seed(seed + i % each) for i in range(len(labels))]
        images = pipeline(class_labels=labels, generator=generators).images
        return images, {"columns": each, "row_labels": [self.id2label[class_id] for class_id in classes]}


def _cross_entropy(logits: torch.Tensor, target: float) -> torch.Tensor:
    """-t log D - (1 - t) log(1 - D), the mean over the batch, of D = sigmoid(logits)."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def build_dcgan(arguments: DCGANArguments, data: ImageData) -> tuple[TinyDCGANGenerator, TinyDCGANDiscriminator]:
    """
    The networks: a checkpoint's, or new ones by the arguments.

    Raises:
        UserError: If they do not fit the data, or cannot be built.
    """
    channels, resolution = data.images.shape[1], data.images.shape[-1]
    num_class_embeds = len(data.id2label) if arguments.class_conditional else None
    if arguments.pretrained_model_name_or_path:
        pipeline = load_pretrained(arguments, TinyDCGANPipeline)
        config = pipeline.generator.config
        given = (config.out_channels, config.sample_size, config.num_class_embeds)
        if given != (channels, resolution, num_class_embeds):
            raise UserError(
                "--pretrained_model_name_or_path: its images have (channels, pixels a side, classes) "
                f"{given}, but those of {data.name} have {(channels, resolution, num_class_embeds)}."
            )
        if pipeline.discriminator is None:
            raise UserError("--pretrained_model_name_or_path: it was saved without its discriminator.")
        names = {int(class_id): name for class_id, name in (pipeline.config.get("id2label") or {}).items()}
        if names and names != data.id2label:
            raise UserError(
                f"--pretrained_model_name_or_path: its classes are {list(names.values())[:5]}, but those of {data.name} are "
                f"{list(data.id2label.values())[:5]}: give the same --classes."
            )
        network = {"latent_dim": config.latent_dim, "generator_channels": config.block_out_channels}
        network |= {"discriminator_channels": pipeline.discriminator.config.block_out_channels}
        if num_class_embeds:
            network |= {"class_embed_dim": config.class_embed_dim}
        check_given(arguments, network)
        return pipeline.generator, pipeline.discriminator

    torch.manual_seed(arguments.seed)  # the initial weights are the seed's alone
    shared = {
        "sample_size": resolution,
        "num_class_embeds": num_class_embeds,
        "class_embed_dim": arguments.class_embed_dim,
    }
    default = halving_widths(resolution)
    widths = "generator_channels"  # the flag that is read next
    try:
        generator = TinyDCGANGenerator(
            out_channels=channels,
            latent_dim=arguments.latent_dim,
            block_out_channels=arguments.generator_channels or default,
            **shared,
        )
        widths = "discriminator_channels"
        discriminator = TinyDCGANDiscriminator(
            in_channels=channels, block_out_channels=arguments.discriminator_channels or default, **shared
        )
    except ValueError as error:
        raise UserError(str(error).replace("block_out_channels", f"--{widths}")) from error
    return generator, discriminator


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(DCGANArguments, argv)
    accelerator = start(arguments)
    data = load_data(arguments, accelerator, require_labels=arguments.class_conditional)

    generator, discriminator = build_dcgan(arguments, data)
    family = DCGAN(
        generator,
        discriminator,
        data.id2label if arguments.class_conditional else None,
        arguments.real_label,
        arguments.fake_label,
        arguments.instance_noise,
        arguments.instance_noise_steps,
    )

    Trainer(arguments, accelerator, data, family).run()


if __name__ == "__main__":
    sys.exit(launch(main))
