"""The autoencoder of latent diffusion, diffusers' `AutoencoderKL`: its arguments, its loss, the builder of its network."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any, ClassVar, Literal

import torch
from diffusers import AutoencoderKL
from torch import nn

from ..data import ImageData
from ..errors import UserError
from ..evaluation import features
from ..flags import flag
from ..pipelines.pipeline_tiny_autoencoder import downsampling_factor, latent_shape
from ..pipelines.pipeline_tiny_vae import TinyVAEPipeline
from ..training.arguments import NetworkArguments, TrainingArguments, network_options
from ..training.family import Batch, Family, check_images, loaded_options, sample_size


_WIDTHS = (32, 64, 64)  # of as many levels as suit the resolution
_GROUPS = 8  # at most


@dataclass(frozen=True)
class AutoencoderNetworkArguments(NetworkArguments):
    """Options of [`AutoencoderKL`]."""

    latent_channels: int = flag(4, "Channels of the latents.", within="[1, 1024]")
    block_out_channels: list[int] | None = flag(
        None,
        "Widths of the levels, finest first, each of half the resolution of the one before; by resolution if not given: "
        "latents of 16x16 for 64x64 pixels, and of 8x8 for 32x32.",
        within="[1, 4096]",
    )
    layers_per_block: int = flag(
        1, "Residual blocks a level of the encoder; the decoder has one more.", within="[1, 32]"
    )
    norm_num_groups: int | None = flag(
        None,
        f"Groups of the group norms; if not given, the most up to {_GROUPS} that divide all widths.",
        within="[1, 4096]",
    )


@dataclass(frozen=True)
class AutoencoderArguments(AutoencoderNetworkArguments, TrainingArguments):
    """The network and its loss."""

    TITLE: ClassVar[str] = "autoencoder"
    SCRIPT: ClassVar[str] = "autoencoder"
    FAMILY: ClassVar[str] = "autoencoder"
    SMOKE: ClassVar[dict[str, Any]] = {**TrainingArguments.SMOKE, "block_out_channels": [8, 8]}

    reconstruction: Literal["l1", "l2"] = flag("l1", "Mean absolute or squared error of a pixel.")
    kl_weight: float = flag(
        1e-3, "Weight of the KL divergence to N(0, I), the mean over the latents in nats.", within="[0, inf)"
    )
    perceptual_features: str | None = flag(
        None,
        "Also minimize the perceptual distance of these features, efficientnet-lite0. Then measure by others: a distance "
        "that was trained on tells little.",
    )
    perceptual_weight: float = flag(0.1, "Weight of the perceptual distance, which is 4 at most.", within="[0, inf)")


def _forward(
    vae: AutoencoderKL, images: torch.Tensor, noise: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Encodes and decodes images: the forward pass in training. The stock one does not return q(z | x), of which the loss is.

    Args:
        vae ([`AutoencoderKL`]): The network.
        images (`torch.Tensor` of shape `(B, C, H, W)`): The images, in [-1, 1].
        noise (`torch.Tensor` of shape `(B, K, h, w)`, *optional*): Draws of N(0, I) to sample the latents with; without
            them the latents are the means.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: The reconstructions, and the means and the logarithms of the
        variances of q(z | x).
    """
    posterior = vae.encode(images).latent_dist
    latents = posterior.mean if noise is None else posterior.mean + posterior.std * noise
    return vae.decode(latents).sample, posterior.mean, posterior.logvar


class Autoencoder(Family):
    """
    Autoencoder with maps as latents (Rombach et al. 2022, arXiv 2112.10752, without the adversarial loss): minimizes the
    mean error of a pixel + weight x mean KL(q(z | x) || N(0, I)) of a latent, and the perceptual distance if asked for.

    The validation loss is the error of the reconstructions from the means of the latents.

    Args:
        vae ([`AutoencoderKL`]): The network. Its forward pass becomes that of training.
        reconstruction (`str`): `"l1"` or `"l2"`.
        kl_weight (`float`): Weight of the KL divergence.
        extractor ([`~tiny_diffusers.evaluation.features.Extractor`], *optional*): Features of the perceptual distance.
        perceptual_weight (`float`): Weight of that distance.
    """

    shows_examples = True
    measured_options = ("latents_mean", "latents_std", "scaling_factor")

    def __init__(
        self,
        vae: AutoencoderKL,
        reconstruction: str = "l1",
        kl_weight: float = 1e-3,
        extractor: features.Extractor | None = None,
        perceptual_weight: float = 0.1,
    ):
        vae.forward = MethodType(_forward, vae)  # of this network alone: it is saved as the stock class that it is
        self.modules = {"vae": vae}
        self.reconstruction, self.kl_weight = reconstruction, kl_weight
        self.extractor, self.perceptual_weight = extractor, perceptual_weight

    def losses(self, modules: dict[str, nn.Module], batch: Batch) -> Iterator[tuple]:
        noise = batch.draws.normal("latents", *latent_shape(self.modules["vae"]))
        reconstructed, mean, logvar = modules["vae"](batch.images, noise)
        error = self._errors(reconstructed, batch.images).mean()
        kl = (mean.square() + logvar.exp() - 1 - logvar).mean() / 2
        loss, scalars = error + self.kl_weight * kl, {"reconstruction": error, "kl": kl}
        if self.extractor is not None:
            levels = ((images / 2 + 0.5).clamp(0, 1) * 255 for images in (reconstructed, batch.images))
            scalars["perceptual"] = features.layer_distance(self.extractor, *levels).mean()
            loss = loss + self.perceptual_weight * scalars["perceptual"]
        yield "vae", loss, scalars

    def validation_loss(self, modules: dict[str, nn.Module], batch: Batch) -> torch.Tensor:
        return self._errors(modules["vae"](batch.images)[0], batch.images)

    def _errors(self, reconstructed: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Computes the mean error of a pixel of each image, (B,)."""
        difference = reconstructed.float() - images
        return (difference.abs() if self.reconstruction == "l1" else difference.square()).mean(dim=(1, 2, 3))

    @torch.no_grad()
    def measure(self, networks: dict[str, nn.Module], batches: Iterator[Batch]) -> None:
        """Writes mean and standard deviation of each channel of the latents into the network's config."""
        vae = networks["vae"]
        latents = (vae.encode(batch.images).latent_dist.mean for batch in batches)
        vae.register_to_config(**measure_latents(latents))

    def pipeline(self, modules: dict[str, nn.Module]) -> TinyVAEPipeline:
        return TinyVAEPipeline(vae=modules["vae"])

    def sample(self, pipeline: TinyVAEPipeline, num_images: int, seed: int) -> tuple[list, dict]:
        """Draws a row of held-out images, and below it their reconstructions."""
        images = self.examples.images[: max(1, num_images // 2)]
        rebuilt = pipeline.reconstruct((images / 2 + 0.5).clamp(0, 1)).images
        given = pipeline._to_images(images, "pil")
        return [*given, *rebuilt], {"columns": len(given), "row_labels": ["given", "rebuilt"]}


def measure_latents(batches: Iterator[torch.Tensor]) -> dict[str, Any]:
    """
    Measures the latents of some images.

    Args:
        batches (`Iterator[torch.Tensor]`): The latents, `(B, C, h, w)` each.

    Returns:
        `dict[str, Any]`: Values of the network's config: `latents_mean` and `latents_std`, a number for each channel, and
        the `scaling_factor` 1. A channel that never changes has the deviation 1.
    """
    count, total, squares = 0, 0.0, 0.0
    for latents in batches:
        values = latents.double().cpu().transpose(0, 1).flatten(1)  # (C, B h w)
        count += values.shape[1]
        total, squares = total + values.sum(1), squares + values.square().sum(1)
    mean = total / count
    deviations = (squares / count - mean.square()).clamp(min=0).sqrt()
    stds = [deviation or 1.0 for deviation in deviations.tolist()]
    return {"latents_mean": mean.tolist(), "latents_std": stds, "scaling_factor": 1.0}


def default_widths(height: int, width: int) -> list[int]:
    """
    Returns the widths of the levels by resolution: up to three, as long as the latents keep a side of 4, and even sides,
    which a U-Net of two levels needs.
    """
    widths = [_WIDTHS[0]]
    for level in _WIDTHS[1:]:
        height, width = height / 2, width / 2
        if min(height, width) < 4 or height % 2 or width % 2:
            break
        widths.append(level)
    return widths


def resolve_autoencoder(
    arguments: AutoencoderArguments, data: ImageData, pretrained: TinyVAEPipeline | None = None
) -> dict[str, Any]:
    """Resolves the options of the network: a loaded one's, or the widths by resolution and the groups by the widths."""
    if pretrained is not None:
        return loaded_options(arguments, pretrained.vae.config)
    widths = arguments.block_out_channels or default_widths(*data.images.shape[2:])
    return {
        "block_out_channels": widths,
        "norm_num_groups": arguments.norm_num_groups or math.gcd(_GROUPS, *widths),
    }


def build_autoencoder(
    settings: AutoencoderArguments, data: ImageData, pretrained: TinyVAEPipeline | None = None
) -> AutoencoderKL:
    """
    Builds the network: a loaded pipeline's, or a new one by its options.

    Raises:
        UserError: If it does not fit the data, or cannot be built.
    """
    channels, height, width = data.images.shape[1:]
    if pretrained is not None:
        config = pretrained.vae.config
        check_images(settings, data, config.in_channels, config.sample_size, pretrained._value_range)
        return pretrained.vae
    options = network_options(settings)
    widths, groups = options["block_out_channels"], options["norm_num_groups"]
    factor = downsampling_factor(widths)
    if height % factor or width % factor:
        raise UserError(
            f"--block_out_channels {' '.join(map(str, widths))}: its {len(widths)} levels need sides that are a multiple of "
            f"{factor}, but the images of {data.name} have {height}x{width} pixels: give fewer widths, or another "
            "--resolution."
        )
    if any(each % groups for each in widths):
        raise UserError(
            f"--norm_num_groups {groups}: it must divide all of --block_out_channels {' '.join(map(str, widths))}."
        )
    torch.manual_seed(settings.seed)  # the initial weights depend on the seed alone
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        sample_size=sample_size(data),
        scaling_factor=1.0,  # the latents are standardized by `latents_mean` and `latents_std`
        **options,
    )


def load_perceptual(settings: AutoencoderArguments, device: torch.device) -> features.Extractor | None:
    """
    Loads the features of the perceptual distance; None if none are asked for.

    Raises:
        UserError: If they are unknown, not installed, or have no layers.
    """
    if settings.perceptual_features is None:
        return None
    extractor = features.load(settings.perceptual_features, device=device)
    if extractor.layers is None:
        raise UserError(
            f"--perceptual_features {settings.perceptual_features}: it has no layers, which the perceptual distance needs: "
            "give efficientnet-lite0."
        )
    return extractor
