"""
Train a variational autoencoder on small images.

    accelerate launch train_scripts/train_vae.py                                            # the embedded 8x8 digits
    accelerate launch train_scripts/train_vae.py --dataset_name ylecun/mnist --resolution 32 --max_train_minutes 10
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from tiny_diffusers.data import ImageData
from tiny_diffusers.errors import UserError
from tiny_diffusers.models.vae_tiny import TinyVAEModel, TinyVAEOutput
from tiny_diffusers.pipelines.pipeline_tiny_vae import TinyVAEPipeline
from tiny_diffusers.training.arguments import TrainingArguments, flag, parse_arguments
from tiny_diffusers.training.baselines import check_given, halving_widths, load_pretrained
from tiny_diffusers.training.trainer import Batch, Family, Trainer, launch, load_data, start


@dataclass
class VAEArguments(TrainingArguments):
    """The network and its loss."""

    SMOKE: ClassVar[dict[str, Any]] = {**TrainingArguments.SMOKE, "latent_dim": 4, "block_out_channels": [8]}

    latent_dim: int = flag(64, "Size of the latent vector.")
    block_out_channels: list[int] | None = flag(
        None, "Widths of the levels, finest first; by resolution if not given."
    )
    layers_per_block: int = flag(1, "Residual blocks a level.")
    reconstruction: str = flag("logistic", "logistic, gaussian (both have a likelihood), bernoulli or mse.")
    num_levels: int = flag(256, "Levels that pixels are rounded to; 2 makes them binary, for bernoulli.")
    kl_weight: float = flag(1.0, "Beta: the weight of the KL divergence; 1 for the evidence lower bound.")
    kl_warmup_steps: int = flag(500, "Steps over which that weight rises from 0.")

    def __post_init__(self):
        if not 0 <= self.kl_weight < math.inf:
            raise UserError(
                f"--kl_weight {self.kl_weight}: it must be a finite number of at least 0; 1 is the bound's."
            )
        if self.kl_warmup_steps < 0:
            raise UserError(f"--kl_warmup_steps {self.kl_warmup_steps}: it must be at least 0.")


class VAE(Family):
    """
    Variational autoencoder: minimises the reconstruction loss + beta KL(q(z | x) || N(0, I)), in bits a dimension
    (Kingma & Welling 2014, arXiv 1312.6114; beta: Higgins et al. 2017).

    The validation loss is the negative evidence lower bound, whatever beta is; of a network without a likelihood, the
    training loss at the end of the warm-up.

    Args:
        vae ([`TinyVAEModel`]): The network.
        kl_weight (`float`): Beta.
        kl_warmup_steps (`int`): Steps over which beta rises linearly from 0 (Bowman et al. 2016, arXiv 1511.06349).
    """

    name = "vae"

    def __init__(self, vae: TinyVAEModel, kl_weight: float = 1.0, kl_warmup_steps: int = 0):
        self.modules = {"vae": vae}
        self.kl_weight, self.kl_warmup_steps = kl_weight, kl_warmup_steps
        self.phases = {"kl_warmup_steps": kl_warmup_steps} if kl_weight else {}
        self.validation_kl_weight = 1.0 if vae.has_likelihood else kl_weight

    def losses(self, modules: dict[str, nn.Module], batch: Batch) -> Iterator[tuple]:
        risen = min(1.0, batch.draws.step / self.kl_warmup_steps) if self.kl_warmup_steps else 1.0
        reconstruction_loss, kl = self._terms(modules["vae"], batch)
        loss = reconstruction_loss + risen * self.kl_weight * kl
        yield "vae", loss.mean(), {"reconstruction": reconstruction_loss.mean(), "kl": kl.mean()}

    def validation_loss(self, modules: dict[str, nn.Module], batch: Batch) -> torch.Tensor:
        reconstruction_loss, kl = self._terms(modules["vae"], batch)
        return reconstruction_loss + self.validation_kl_weight * kl

    def _terms(self, vae: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Both terms of each image, (B,), in bits a dimension."""
        noise = batch.draws.normal("latents", self.modules["vae"].config.latent_dim)
        output: TinyVAEOutput = vae(batch.images, noise)
        nats = batch.images[0].numel() * math.log(2)
        return output.reconstruction_loss / nats, output.kl / nats

    def pipeline(self, modules: dict[str, nn.Module]) -> TinyVAEPipeline:
        return TinyVAEPipeline(vae=modules["vae"])

    def sample(self, pipeline: TinyVAEPipeline, num_images: int, seed: int) -> tuple[list, dict]:
        generators = [torch.Generator().manual_seed(seed + i) for i in range(num_images)]
        return pipeline(batch_size=num_images, generator=generators).images, {}


def build_vae(arguments: VAEArguments, data: ImageData) -> TinyVAEModel:
    """
    The network: a checkpoint's, or a new one by the arguments.

    Raises:
        UserError: If it does not fit the data, or cannot be built.
    """
    channels, resolution = data.images.shape[1], data.images.shape[-1]
    if arguments.pretrained_model_name_or_path:
        vae = load_pretrained(arguments, TinyVAEPipeline).vae
        if (vae.config.in_channels, vae.config.sample_size) != (channels, resolution):
            raise UserError(
                f"--pretrained_model_name_or_path: its images have {vae.config.in_channels} channels and "
                f"{vae.config.sample_size} pixels a side, but those of {data.name} have {channels} and {resolution}."
            )
        names = ("latent_dim", "block_out_channels", "layers_per_block", "reconstruction", "num_levels")
        check_given(arguments, {name: vae.config[name] for name in names})
        return vae
    torch.manual_seed(arguments.seed)  # the initial weights are the seed's alone
    try:
        return TinyVAEModel(
            sample_size=resolution,
            in_channels=channels,
            latent_dim=arguments.latent_dim,
            block_out_channels=arguments.block_out_channels or halving_widths(resolution),
            layers_per_block=arguments.layers_per_block,
            reconstruction=arguments.reconstruction,
            num_levels=arguments.num_levels,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(VAEArguments, argv)
    accelerator = start(arguments)
    data = load_data(arguments, accelerator)

    vae = build_vae(arguments, data)
    family = VAE(vae, arguments.kl_weight, arguments.kl_warmup_steps)

    Trainer(arguments, accelerator, data, family).run()


if __name__ == "__main__":
    sys.exit(launch(main))
