"""The latents that a diffusion model is trained on in place of images, with `--vae`."""

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL

from ..data import ImageData, cache_root, normalize
from ..errors import UserError, refusals
from ..evaluation.features import digest as weights_digest
from ..evaluation.images import digest, fill
from ..pipelines.pipeline_tiny import TinyPipeline, check_config, config_errors
from ..pipelines.pipeline_tiny_autoencoder import encode_images, latent_shape
from ..pipelines.pipeline_tiny_latent import TinyLatentPipeline
from ..training.family import check_images, load_pretrained, measured_rows
from .autoencoder import measure_latents
from .diffusion import DiffusionArguments


logger = logging.getLogger(__name__)

_BATCH_SIZE = 64  # images encoded at a time


def load_latents(
    arguments: DiffusionArguments, accelerator: Accelerator, data: ImageData
) -> tuple[DiffusionArguments, ImageData, AutoencoderKL | None]:
    """
    Encodes the images by the autoencoder of `--vae`, or without it by that of the latent pipeline to start from, and their
    mirror images as well with `--random_flip`. The cache of datasets keeps the latents.

    Args:
        arguments ([`DiffusionArguments`]): The settings as asked for.
        accelerator (`Accelerator`): The processes, which share the work.
        data ([`ImageData`]): The images.

    Returns:
        `tuple[DiffusionArguments, ImageData, AutoencoderKL]`: The settings, with `vae` resolved; the images with their
        latents; the autoencoder. Of a run on pixels the settings and images as they are, and None.

    Raises:
        UserError: If there is no such autoencoder, or it is for other images.
    """
    pretrained = load_pretrained(arguments, TinyPipeline)
    own = pretrained.vae if isinstance(pretrained, TinyLatentPipeline) else None
    if arguments.vae is not None:
        vae = _load_vae(arguments, data)
    elif own is not None:
        vae, name = own, arguments.pretrained_model_name_or_path
        check_images(arguments, data, vae.config.in_channels, vae.config.sample_size, pretrained._value_range)
        arguments = dataclasses.replace(arguments, vae=name, resolved=[*arguments.resolved, "vae"])
    else:
        return arguments, data, None
    vae_sha256 = weights_digest(vae)
    if own is not None and weights_digest(own) != vae_sha256:
        logger.warning(
            f"{arguments.pretrained_model_name_or_path} was trained on the latents of its own autoencoder and would have to "
            f"learn those of --vae {arguments.vae} from scratch; without --vae it continues from what it knows."
        )
    vae = vae.to(accelerator.device).eval().requires_grad_(False)
    if vae.config.get("latents_mean") is None:
        vae.register_to_config(**measure_latents(_encode_some(vae, data)))

    num_views = 2 if arguments.random_flip else 1

    def encode(start: int, stop: int) -> np.ndarray:
        images = _load(data, slice(start, stop), vae.device)
        views = (images, images.flip(3))[:num_views]
        return torch.stack([encode_images(vae, view).mean for view in views], dim=1).cpu().numpy()

    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    key = digest("latents", vae_sha256, config, data.fingerprint, num_views, vae.device.type)
    with torch.no_grad():
        latents = fill(
            cache_root(arguments.cache_dir) / "latents" / key,
            (len(data), num_views, *latent_shape(vae)),
            np.float32,
            encode,
            batch_size=_BATCH_SIZE,
            state=accelerator.state,
            desc="Encoding",
        )
    return arguments, dataclasses.replace(data, latents=torch.from_numpy(latents), vae_sha256=vae_sha256), vae


def _load_vae(arguments: DiffusionArguments, data: ImageData) -> AutoencoderKL:
    """Loads the autoencoder from a checkpoint that has one, or from the folder of a network alone."""
    name, folder = arguments.vae, Path(arguments.vae).expanduser()
    value_range = data.value_range
    try:
        with refusals("--vae: "):
            if (folder / AutoencoderKL.config_name).is_file():
                with config_errors(name):
                    config = AutoencoderKL.load_config(folder)
                    check_config(config, AutoencoderKL, name)
                    is_autoencoder = config.get("_class_name") == AutoencoderKL.__name__
                    vae = AutoencoderKL.from_pretrained(folder, use_safetensors=True) if is_autoencoder else None
            else:
                pipeline = TinyPipeline.from_pretrained(name, cache_dir=arguments.cache_dir)
                vae, value_range = pipeline.components.get("vae"), pipeline._value_range
    except OSError as error:
        raise UserError(f"--vae: {error}") from error
    if not isinstance(vae, AutoencoderKL):
        raise UserError(
            f"--vae: {name} has no AutoencoderKL: give a checkpoint of `tiny-diffusers train autoencoder`."
        )
    check_images(arguments, data, vae.config.in_channels, vae.config.sample_size, value_range, "vae")
    return vae


def _load(data: ImageData, rows: slice | torch.Tensor, device: torch.device) -> torch.Tensor:
    return normalize(data.images[rows].to(device), data.value_range)


@torch.no_grad()
def _encode_some(vae: AutoencoderKL, data: ImageData) -> Iterator[torch.Tensor]:
    """Yields the latents, as they are, of images that stand for the dataset."""
    for rows in measured_rows(len(data)).split(_BATCH_SIZE):
        yield vae.encode(_load(data, rows, vae.device)).latent_dist.mean
