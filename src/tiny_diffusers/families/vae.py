"""The variational autoencoder: its arguments, its loss, the builder of its network."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ..data import ImageData
from ..flags import flag
from ..models.vae_tiny import RECONSTRUCTIONS, TinyVAEModel, TinyVAEOutput
from ..pipelines.pipeline_tiny_conditions import ConditionStatistics
from ..pipelines.pipeline_tiny_vae import TinyVAEPipeline
from ..training.arguments import NetworkArguments, network_options
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
class VAENetworkArguments(NetworkArguments):
    """Options of [`TinyVAEModel`]."""

    latent_dim: int = flag(64, "Size of the latent vector.", within="[1, 65536]")
    block_out_channels: list[int] | None = flag(
        None, "Widths of the levels, finest first; by resolution if not given.", within="[1, 4096]"
    )
    layers_per_block: int = flag(1, "Residual blocks a level.", within="[1, 32]")
    reconstruction: Literal[RECONSTRUCTIONS] = flag(
        "logistic", "Distribution of the pixels, a likelihood with logistic and gaussian; or mse."
    )
    num_levels: int = flag(
        256, "Levels that pixels are rounded to; 2 makes them binary, for bernoulli.", within="[2, 65536]"
    )
    class_embed_dim: int = flag(
        32,
        "Size of the embedding of class and conditions, which joins the image's channels and the latent vector.",
        within="[1, 1024]",
    )


@dataclass(frozen=True)
class VAEArguments(VAENetworkArguments, ConditionArguments):
    """The network and its loss."""

    TITLE: ClassVar[str] = "VAE"
    SCRIPT: ClassVar[str] = "vae"
    FAMILY: ClassVar[str] = "vae"
    SMOKE: ClassVar[dict[str, Any]] = {
        **ConditionArguments.SMOKE,
        "latent_dim": 4,
        "block_out_channels": [8],
        "kl_warmup_steps": 10,
    }

    class_conditional: bool = flag(False, "Give encoder and decoder the class of the image.")
    kl_weight: float = flag(
        1.0, "Beta: weight of the KL divergence; 1 for the evidence lower bound.", within="[0, inf)"
    )
    kl_warmup_steps: int = flag(500, "Steps over which that weight rises from 0.", within="[0, inf)")


class VAE(Family):
    """
    Variational autoencoder: minimizes the reconstruction loss + beta KL(q(z | x) || N(0, I)), in bits/dim
    (Kingma & Welling 2014, arXiv 1312.6114; beta: Higgins et al. 2017).

    The validation loss is the negative evidence lower bound, whatever beta is; for a network without a likelihood, it is
    the training loss at the end of the warm-up.

    Args:
        vae ([`TinyVAEModel`]): The network.
        kl_weight (`float`): Beta.
        kl_warmup_steps (`int`): Steps over which beta rises linearly from 0 (Bowman et al. 2016, arXiv 1511.06349).
        id2label (`dict[int, str]`, *optional*): The names of the classes, for a network with classes.
        condition_statistics ([`ConditionStatistics`], *optional*): The conditions, for a network with conditions.
    """

    def __init__(
        self,
        vae: TinyVAEModel,
        kl_weight: float = 1.0,
        kl_warmup_steps: int = 0,
        id2label: dict[int, str] | None = None,
        condition_statistics: ConditionStatistics | None = None,
    ):
        self.modules = {"vae": vae}
        self.id2label, self.null_label = id2label, vae.config.num_class_embeds
        self.condition_statistics = condition_statistics
        self.kl_weight, self.kl_warmup_steps = kl_weight, kl_warmup_steps
        self.phases = {"kl_warmup_steps": kl_warmup_steps} if kl_weight else {}
        self.validation_kl_weight = 1.0 if vae.has_likelihood else kl_weight

    def losses(self, modules: dict[str, nn.Module], batch: Batch) -> Iterator[tuple]:
        warmup = min(1.0, batch.draws.step / self.kl_warmup_steps) if self.kl_warmup_steps else 1.0
        reconstruction_loss, kl = self._terms(modules["vae"], batch)
        loss = reconstruction_loss + warmup * self.kl_weight * kl
        yield "vae", loss.mean(), {"reconstruction": reconstruction_loss.mean(), "kl": kl.mean()}

    def validation_loss(self, modules: dict[str, nn.Module], batch: Batch) -> torch.Tensor:
        reconstruction_loss, kl = self._terms(modules["vae"], batch)
        return reconstruction_loss + self.validation_kl_weight * kl

    def _terms(self, vae: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes both terms for each image, (B,), in bits/dim."""
        noise = batch.draws.normal("latents", self.modules["vae"].config.latent_dim)
        output: TinyVAEOutput = vae(batch.images, noise, class_labels=batch.labels, conditions=batch.conditions)
        nats = batch.images[0].numel() * math.log(2)
        return output.reconstruction_loss / nats, output.kl / nats

    def pipeline(self, modules: dict[str, nn.Module]) -> TinyVAEPipeline:
        return TinyVAEPipeline(
            vae=modules["vae"],
            id2label=self.id2label,
            condition_statistics=self.condition_config,
        )

    def sample(self, pipeline: TinyVAEPipeline, num_images: int, seed: int) -> tuple[list, dict]:
        return draw_from_latents(pipeline, self.id2label, self.condition_statistics, num_images, seed)


def resolve_vae(arguments: VAEArguments, data: ImageData, pretrained: TinyVAEPipeline | None = None) -> dict[str, Any]:
    """Resolves the options of the network: a loaded one's, or the widths by resolution."""
    if pretrained is not None:
        return loaded_options(arguments, pretrained.vae.config)
    return {"block_out_channels": arguments.block_out_channels or halving_widths(*data.images.shape[2:])}


def build_vae(
    settings: VAEArguments,
    data: ImageData,
    pretrained: TinyVAEPipeline | None = None,
    num_conditions: int | None = None,
) -> TinyVAEModel:
    """
    Builds the network: a loaded pipeline's, or a new one by its options.

    Raises:
        UserError: If it does not fit the data, or cannot be built.
    """
    channels = data.images.shape[1]
    num_class_embeds = len(data.id2label) if settings.class_conditional else None
    if pretrained is not None:
        check_images(
            settings,
            data,
            pretrained.vae.config.in_channels,
            pretrained.vae.config.sample_size,
            pretrained._value_range,
        )
        check_conditions(pretrained, data, num_class_embeds, num_conditions)
        return pretrained.vae
    options = network_options(settings) | resolve_vae(settings, data)
    torch.manual_seed(settings.seed)  # the initial weights depend on the seed alone
    with network_refusals(settings):
        return TinyVAEModel(
            sample_size=sample_size(data),
            in_channels=channels,
            num_class_embeds=num_class_embeds,
            num_conditions=num_conditions,
            **options,
        )
