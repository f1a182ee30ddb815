"""DCGAN: its arguments, its two losses, the builder of its networks."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel
from torch import nn

from ..data import ImageData
from ..errors import UserError
from ..flags import flag
from ..models.dcgan_tiny import TinyDCGANDiscriminator, TinyDCGANGenerator
from ..pipelines.pipeline_tiny_conditions import ConditionStatistics
from ..pipelines.pipeline_tiny_dcgan import TinyDCGANPipeline
from ..training.arguments import LRScheduler, NetworkArguments, Optimizer
from ..training.family import (
    Batch,
    Family,
    check_conditions,
    check_images,
    draw_from_latents,
    halving_widths,
    loaded_options,
    network_refusals,
    sample_size,
)
from .conditions import ConditionArguments


@dataclass(frozen=True)
class DCGANNetworkArguments(NetworkArguments):
    """Options of [`TinyDCGANGenerator`] and [`TinyDCGANDiscriminator`]."""

    latent_dim: int = flag(100, "Size of the generator's latent vector.", within="[1, 65536]")
    generator_channels: list[int] | None = flag(
        None,
        "Widths of the generator's levels, finest first, as 64 128 256 (by resolution) or, front-loaded, 64 256 256.",
        within="[1, 4096]",
    )
    discriminator_channels: list[int] | None = flag(
        None, "Widths of the discriminator's levels, finest first.", within="[1, 4096]"
    )
    class_embed_dim: int = flag(
        16, "Channels of the embedding of class and conditions, tiled to each feature map.", within="[1, 1024]"
    )


@dataclass(frozen=True)
class DCGANArguments(DCGANNetworkArguments, ConditionArguments):
    """The networks, their losses, and DCGAN's settings of the optimizers (arXiv 1511.06434, section 3)."""

    TITLE: ClassVar[str] = "DCGAN"
    SCRIPT: ClassVar[str] = "dcgan"
    FAMILY: ClassVar[str] = "dcgan"
    SMOKE: ClassVar[dict[str, Any]] = {
        **ConditionArguments.SMOKE,
        "generator_channels": [8],
        "discriminator_channels": [8],
    }

    class_conditional: bool = flag(False, "Give both networks the class of the image.")
    real_label: float = flag(1.0, "Target of the discriminator for real images; 0.9 is smoothed.", within="[0, 1]")
    fake_label: float = flag(
        0.0, "Target of the discriminator for generated images; 0.1 is smoothed.", within="[0, 1]"
    )
    instance_noise: float = flag(
        0.0, "Standard deviation of noise on all images that the discriminator sees; 0.1 is usual.", within="[0, inf)"
    )
    instance_noise_steps: int = flag(5000, "Steps over which that noise falls to 0.", within="[1, inf)")

    learning_rate: float = flag(2e-4, "Peak learning rate.", within="[0, inf)")
    lr_scheduler: LRScheduler = flag("constant", "Schedule of the learning rate.")
    optimizer: Optimizer = flag("adam", "Optimizer.")
    adam_beta1: float = flag(0.5, "Adam's beta1 (SGD's momentum).", within="[0, 1)")
    adam_beta2: float = flag(0.999, "Adam's beta2.", within="[0, 1)")
    adam_weight_decay: float = flag(0.0, "Weight decay.", within="[0, inf)")
    max_grad_norm: float = flag(math.inf, "Clip gradients to this norm; DCGAN clips none.", within="[0, inf]")
    validation_split: float = flag(0.0, "A GAN has no validation loss: nothing is held out.", within="[0, 1)")

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.fake_label < self.real_label <= 1:
            raise UserError(
                f"--fake_label {self.fake_label} --real_label {self.real_label}: they must rise within [0, 1]; 0 and 1 "
                "are plain, 0.1 and 0.9 smoothed."
            )
        no_validation = "a GAN has no validation loss"
        for name, off, why in (
            ("validation_split", 0, no_validation),
            ("early_stopping_patience", None, no_validation),
            ("gradient_checkpointing", False, "batch norm would update its statistics twice"),
        ):
            if getattr(self, name) != off:
                raise UserError(f"--{name} {getattr(self, name)}: {why}; leave it out.")


class DCGAN(Family):
    """
    Generative adversarial network (Goodfellow et al. 2014, arXiv 1406.2661) with DCGAN's networks.

    In each step the discriminator learns to tell real images from generated ones; then the generator minimizes the
    non-saturating loss -log D(G(z)) of the updated discriminator.

    Args:
        generator ([`TinyDCGANGenerator`]), discriminator ([`TinyDCGANDiscriminator`]): The networks.
        id2label (`dict[int, str]`, *optional*): The names of the classes, for networks with classes.
        real_label (`float`), fake_label (`float`): The discriminator's targets.
        instance_noise (`float`): Standard deviation, at the start, of the noise on the discriminator's inputs
            (arXiv 1610.04490).
        instance_noise_steps (`int`): Steps over which it falls to 0, linearly.
        condition_statistics ([`ConditionStatistics`], *optional*): The conditions, for networks with conditions.
    """

    def __init__(
        self,
        generator: TinyDCGANGenerator,
        discriminator: TinyDCGANDiscriminator,
        id2label: dict[int, str] | None = None,
        real_label: float = 1.0,
        fake_label: float = 0.0,
        instance_noise: float = 0.0,
        instance_noise_steps: int = 1,
        condition_statistics: ConditionStatistics | None = None,
    ):
        self.modules = {"generator": generator, "discriminator": discriminator}
        self.latent_dim = generator.config.latent_dim
        self.id2label, self.null_label = id2label, generator.config.num_class_embeds
        self.condition_statistics = condition_statistics
        self.real_label, self.fake_label = real_label, fake_label
        self.instance_noise, self.instance_noise_steps = instance_noise, instance_noise_steps
        self.phases = {"instance_noise_steps": instance_noise_steps} if instance_noise else {}

    def losses(self, modules: dict[str, nn.Module], batch: Batch) -> Iterator[tuple]:
        generator, discriminator = modules["generator"], modules["discriminator"]
        given = {"class_labels": batch.labels, "conditions": batch.conditions}
        real = self._noisy(batch.images, batch, "real_noise")
        generated = generator(batch.draws.normal("latents", self.latent_dim), **given).sample
        fake = self._noisy(generated, batch, "fake_noise")

        # 1. the discriminator: real and generated images in batches of their own, for batch norm
        on_real = discriminator(real, **given).logits
        on_fake = discriminator(fake.detach(), **given).logits
        loss = _cross_entropy(on_real, self.real_label) + _cross_entropy(on_fake, self.fake_label)
        yield "discriminator", loss, {"D(x)": on_real.sigmoid().mean(), "D(G(z))": on_fake.sigmoid().mean()}

        # 2. the generator, through a discriminator that takes no gradients and waits for none from other processes
        discriminator = extract_model_from_parallel(discriminator)
        discriminator.requires_grad_(False)
        yield "generator", _cross_entropy(discriminator(fake, **given).logits, 1.0)
        discriminator.requires_grad_(True)

    def _noisy(self, images: torch.Tensor, batch: Batch, purpose: str) -> torch.Tensor:
        sigma = self.instance_noise * max(0.0, 1 - batch.draws.step / self.instance_noise_steps)
        return images + sigma * batch.draws.normal(purpose, *images.shape[1:]) if sigma else images

    def pipeline(self, modules: dict[str, nn.Module]) -> TinyDCGANPipeline:
        return TinyDCGANPipeline(
            modules["generator"],
            modules["discriminator"],
            id2label=self.id2label,
            condition_statistics=self.condition_config,
        )

    def sample(self, pipeline: TinyDCGANPipeline, num_images: int, seed: int) -> tuple[list, dict]:
        return draw_from_latents(pipeline, self.id2label, self.condition_statistics, num_images, seed)


def _cross_entropy(logits: torch.Tensor, target: float) -> torch.Tensor:
    """Computes -t log D - (1 - t) log(1 - D), averaged over the batch, with D = sigmoid(logits)."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def resolve_dcgan(
    arguments: DCGANArguments, data: ImageData, pretrained: TinyDCGANPipeline | None = None
) -> dict[str, Any]:
    """Resolves the options of the networks: loaded ones', or the widths by resolution."""
    if pretrained is None:
        widths = halving_widths(*data.images.shape[2:])
        names = ("generator_channels", "discriminator_channels")
        return {name: getattr(arguments, name) or widths for name in names}
    if pretrained.discriminator is None:
        raise UserError("--pretrained_model_name_or_path: it was saved without its discriminator.")
    config = pretrained.generator.config
    loaded = {
        "latent_dim": config.latent_dim,
        "generator_channels": config.block_out_channels,
        "discriminator_channels": pretrained.discriminator.config.block_out_channels,
        "class_embed_dim": config.class_embed_dim,
    }
    return loaded_options(arguments, loaded)


def build_dcgan(
    settings: DCGANArguments,
    data: ImageData,
    pretrained: TinyDCGANPipeline | None = None,
    num_conditions: int | None = None,
) -> tuple[TinyDCGANGenerator, TinyDCGANDiscriminator]:
    """
    Builds the networks: a loaded pipeline's, or new ones by their options.

    Raises:
        UserError: If they do not fit the data, or cannot be built.
    """
    channels = data.images.shape[1]
    num_class_embeds = len(data.id2label) if settings.class_conditional else None
    if pretrained is not None:
        check_images(
            settings,
            data,
            pretrained.generator.config.out_channels,
            pretrained.generator.config.sample_size,
            pretrained._value_range,
        )
        check_conditions(pretrained, data, num_class_embeds, num_conditions)
        return pretrained.generator, pretrained.discriminator

    torch.manual_seed(settings.seed)  # the initial weights depend on the seed alone
    shared = {
        "sample_size": sample_size(data),
        "num_class_embeds": num_class_embeds,
        "class_embed_dim": settings.class_embed_dim,
        "num_conditions": num_conditions,
    }
    widths = resolve_dcgan(settings, data)
    with network_refusals(settings, block_out_channels="generator_channels"):
        generator = TinyDCGANGenerator(
            out_channels=channels,
            latent_dim=settings.latent_dim,
            block_out_channels=widths["generator_channels"],
            **shared,
        )
    with network_refusals(settings, block_out_channels="discriminator_channels"):
        discriminator = TinyDCGANDiscriminator(
            in_channels=channels, block_out_channels=widths["discriminator_channels"], **shared
        )
    return generator, discriminator
