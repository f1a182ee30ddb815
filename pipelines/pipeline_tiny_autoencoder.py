"""The latents of diffusers' `AutoencoderKL`, standardized channel by channel."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL


class LatentDistribution(NamedTuple):
    """
    Distribution q(z | x) of the standardized latents of images.

    Args:
        mean (`torch.Tensor` of shape `(B, C, h, w)`): The means.
        stddev (`torch.Tensor` of shape `(B, C, h, w)`): The standard deviations.
    """

    mean: torch.Tensor
    stddev: torch.Tensor


def latent_shape(vae: AutoencoderKL) -> tuple[int, int, int]:
    """Returns the shape (C, h, w) of the latents of one image."""
    size = vae.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    factor = downsampling_factor(vae.config.block_out_channels)
    return vae.config.latent_channels, height // factor, width // factor


def downsampling_factor(block_out_channels: Sequence[int]) -> int:
    """Returns how many pixels a latent has on a side: each level but the last halves the resolution."""
    return 2 ** (len(block_out_channels) - 1)


def latent_statistics(vae: AutoencoderKL, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """
    Returns the mean and the standard deviation of each channel of the latents, (C, 1, 1): its config's `latents_mean` and
    `latents_std`, or else `shift_factor` and 1, both with the `scaling_factor`.

    Raises:
        `ValueError`: If they are not a number for each channel, or a deviation is not positive.
    """
    config = vae.config
    mean = config.get("latents_mean") or [config.get("shift_factor") or 0.0] * config.latent_channels
    std = config.get("latents_std") or [1.0] * config.latent_channels
    if not len(mean) == len(std) == config.latent_channels or min(std) <= 0:
        raise ValueError(
            f"`latents_mean` and `latents_std` of the autoencoder must be numbers, one for each of {config.latent_channels} "
            f"channels, and the latter positive, got {list(mean)} and {list(std)}."
        )
    mean, std = (torch.tensor(values, dtype=torch.float32, device=device)[:, None, None] for values in (mean, std))
    return mean, std / config.scaling_factor


def encode_images(vae: AutoencoderKL, sample: torch.Tensor) -> LatentDistribution:
    """Encodes images (B, C, H, W) in [-1, 1], in the network's dtype: their latents have the dtype of the images."""
    posterior = vae.encode(sample.to(vae.dtype)).latent_dist
    mean, std = latent_statistics(vae, sample.device)
    return LatentDistribution((posterior.mean.to(sample.dtype) - mean) / std, posterior.std.to(sample.dtype) / std)


def decode_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Decodes standardized latents (B, C, h, w) to images (B, C, H, W), about [-1, 1], in the dtype of the latents."""
    mean, std = latent_statistics(vae, latents.device)
    return vae.decode((mean + std * latents).to(vae.dtype)).sample.to(latents.dtype)
