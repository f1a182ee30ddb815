"""The diffusion family: its arguments, its network and scheduler, its loss. Both diffusion scripts share it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import ImageData
from ..errors import UserError, unknown
from ..schedulers.scheduling_tiny_ddim import TinyDDIMScheduler
from ..schedulers.scheduling_tiny_ddpm import TinyDDPMScheduler
from .arguments import TrainingArguments, flag
from .trainer import Batch, Family


@dataclass
class DiffusionArguments(TrainingArguments):
    """The forward process, the loss and the network."""

    ddpm_num_steps: int = flag(1000, "Timesteps T of the forward process.")
    ddpm_num_inference_steps: int = flag(50, "Steps that the sample grids take.")
    ddpm_beta_schedule: str = flag("cosine", "linear, cosine, sigmoid or quadratic.")
    beta_start: float = flag(1e-4, "First beta (not of cosine).")
    beta_end: float = flag(0.02, "Last beta (not of cosine).")
    prediction_type: str = flag("v_prediction", "epsilon, sample or v_prediction.")
    variance_type: str = flag("fixed_small", "The reverse variance: fixed_small, fixed_large, or learned_range.")
    loss_type: str = flag("l2", "l2, l1, huber or pseudo_huber.")
    huber_delta: float | None = flag(None, "Delta of the Huber losses.")
    huber_schedule: str = flag("constant", "Delta over the timesteps: constant, exponential or snr.")
    snr_gamma: float | None = flag(None, "Min-SNR weighting with this gamma; 5 is usual.")

    model_config_name_or_path: str | None = flag(
        None, "JSON file or folder of a network's configuration, with its class in it."
    )
    block_out_channels: list[int] | None = flag(None, "Widths of the levels; by resolution when not given.")
    layers_per_block: int | None = flag(None, "Residual blocks a level.")
    norm_num_groups: int | None = flag(None, "Groups of the group norms.")
    attention: list[str] | None = flag(None, "none, linear or full for each level, or one for all.")
    mid_attention: str | None = flag(None, "none, linear or full in the middle.")
    attention_head_dim: int | None = flag(None, "Width of an attention head.")
    patch_size: int | None = flag(None, "1, 2 or 4: the network works on patches of so many pixels a side.")
    dropout: float | None = flag(None, "Dropout in the residual blocks.")
    weight_standardization: bool | None = flag(None, "Standardise the convolutions' weights.")
    skip_rescale: bool | None = flag(None, "Divide the residual sums by sqrt 2.")
    time_embedding: str | None = flag(None, "sinusoidal, fourier or learned.")
    time_embedding_dim: int | None = flag(None, "Width of the time embedding.")
    act_fn: str | None = flag(None, "silu or gelu.")
    downsample: str | None = flag(None, "conv or maxpool.")
    upsample: str | None = flag(None, "nearest, bilinear or transposed.")


# Arguments that are the network's own, handed over where they are given.
_NETWORK_ARGUMENTS = (
    "block_out_channels",
    "layers_per_block",
    "norm_num_groups",
    "attention",
    "mid_attention",
    "attention_head_dim",
    "patch_size",
    "dropout",
    "weight_standardization",
    "skip_rescale",
    "time_embedding",
    "time_embedding_dim",
    "act_fn",
    "downsample",
    "upsample",
)


def default_network(resolution: int) -> dict[str, Any]:
    """
    The network's defaults by resolution. From 24 pixels on it works on patches, which is what a small budget buys most
    with: the costly first level runs on a quarter (or a sixteenth) of the places.
    """
    if resolution < 24:
        return {"block_out_channels": [64, 128], "attention": ["none", "full"], "patch_size": 1}
    if resolution < 48:
        return {"block_out_channels": [64, 128], "attention": ["none", "full"], "patch_size": 2}
    return {"block_out_channels": [64, 128, 128], "attention": ["none", "none", "full"], "patch_size": 2}


def build_scheduler(arguments: DiffusionArguments) -> TinyDDIMScheduler:
    """
    The scheduler that training computes its loss with and that is saved with the network.

    Raises:
        UserError: On an unknown name, or values that do not go together.
    """
    try:
        scheduler = TinyDDIMScheduler(
            num_train_timesteps=arguments.ddpm_num_steps,
            beta_schedule=arguments.ddpm_beta_schedule,
            beta_start=arguments.beta_start,
            beta_end=arguments.beta_end,
            prediction_type=arguments.prediction_type,
            variance_type=arguments.variance_type,
            loss_type=arguments.loss_type,
            huber_delta=arguments.huber_delta,
            huber_schedule=arguments.huber_schedule,
            snr_gamma=arguments.snr_gamma,
            timestep_spacing="trailing",
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    last_signal = float(scheduler.alphas_cumprod[-1].sqrt())
    if last_signal > 0.05:
        scale = 1000 / arguments.ddpm_num_steps
        print(
            f"warning: the last timestep keeps {last_signal:.2f} of the image (sqrt of its alpha_cumprod), but sampling "
            f"starts from pure noise; use --beta_start {arguments.beta_start * scale:.2g} --beta_end "
            f"{min(arguments.beta_end * scale, 0.999):.2g}, or --ddpm_beta_schedule cosine."
        )
    return scheduler


def build_unet(arguments: DiffusionArguments, data: ImageData, num_class_embeds: int | None = None) -> nn.Module:
    """
    The network: a checkpoint's, a configuration's, or [`TinyUNet2DModel`] by the arguments.

    Raises:
        UserError: If it does not fit the data, or cannot be built.
    """
    channels, resolution = data.images.shape[1], data.images.shape[-1]
    try:
        if arguments.pretrained_model_name_or_path:
            unet = _pretrained_unet(arguments)
        elif arguments.model_config_name_or_path:
            unet = _configured_unet(arguments, channels, resolution, num_class_embeds)
        else:
            from ..models.unet_tiny import TinyUNet2DModel

            given = {name: getattr(arguments, name) for name in _NETWORK_ARGUMENTS}
            given = {name: value for name, value in given.items() if value is not None}
            if "attention" in given and len(given["attention"]) == 1:
                given["attention"] = given["attention"][0]  # one name for all levels
            elif "block_out_channels" in given and "attention" not in given:
                given["attention"] = ["none"] * (len(given["block_out_channels"]) - 1) + ["full"]
            torch.manual_seed(arguments.seed)  # the initial weights are the seed's alone
            unet = TinyUNet2DModel(
                sample_size=resolution,
                in_channels=channels,
                out_channels=channels * (2 if arguments.variance_type == "learned_range" else 1),
                num_class_embeds=num_class_embeds,
                num_train_timesteps=arguments.ddpm_num_steps,
                **{**default_network(resolution), **given},
            )
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    expected = unet.config.in_channels
    if expected != channels:
        raise UserError(f"the network takes images of {expected} channels, but those of {data.name} have {channels}.")
    return unet


def _pretrained_unet(arguments: DiffusionArguments) -> nn.Module:
    from ..pipelines.pipeline_tiny import TinyPipeline

    pipeline = TinyPipeline.from_pretrained(arguments.pretrained_model_name_or_path, cache_dir=arguments.cache_dir)
    unet = getattr(pipeline, "unet", None)
    if unet is None:
        raise UserError(
            f"--pretrained_model_name_or_path: {arguments.pretrained_model_name_or_path} is a "
            f"{type(pipeline).__name__}, which has no unet to start from."
        )
    return unet.float()


def _configured_unet(
    arguments: DiffusionArguments, channels: int, resolution: int, num_class_embeds: int | None
) -> nn.Module:
    path = Path(arguments.model_config_name_or_path)
    if path.is_dir():
        path = next((p for p in (path / "config.json", path / "unet" / "config.json") if p.is_file()), path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--model_config_name_or_path: {path} is not a network's config.json ({error}).") from error
    class_name = config.get("_class_name")
    if class_name == "TinyUNet2DModel":
        from ..models.unet_tiny import TinyUNet2DModel as unet_class
    elif class_name == "UNet2DModel":
        from diffusers import UNet2DModel as unet_class
    else:
        raise unknown(f"_class_name in {path}", class_name, ["TinyUNet2DModel", "UNet2DModel"])
    # The file describes the architecture; what the data settle is settled here.
    config |= {"sample_size": resolution, "in_channels": channels}
    config["out_channels"] = channels * (2 if arguments.variance_type == "learned_range" else 1)
    if num_class_embeds is not None:  # a stock network has no null class of its own
        config["num_class_embeds"] = num_class_embeds + (1 if class_name == "UNet2DModel" else 0)
    torch.manual_seed(arguments.seed)
    return unet_class.from_config(config)


class Diffusion(Family):
    """
    Denoising diffusion: a U-Net and a scheduler.

    Args:
        unet (`nn.Module`): Called as `unet(sample, timestep, class_labels=None).sample`.
        scheduler ([`TinyDDIMScheduler`] or [`TinyDDPMScheduler`]): Its `training_loss` is minimised.
        num_inference_steps (`int`): Steps that the sample grids take.
    """

    name = "ddpm"

    def __init__(
        self, unet: nn.Module, scheduler: TinyDDIMScheduler | TinyDDPMScheduler, num_inference_steps: int = 50
    ):
        self.modules = {"unet": unet}
        self.scheduler = scheduler
        self.num_inference_steps = num_inference_steps

    def losses(self, modules: dict[str, nn.Module], batch: Batch) -> Iterator[tuple[str, torch.Tensor]]:
        yield "unet", self._image_losses(modules["unet"], batch).mean()

    def validation_loss(self, modules: dict[str, nn.Module], batch: Batch) -> torch.Tensor:
        return self._image_losses(modules["unet"], batch)

    def _image_losses(self, unet: nn.Module, batch: Batch) -> torch.Tensor:
        noise = batch.draws.normal("noise", *batch.images.shape[1:])
        timesteps = batch.draws.integers("timesteps", self.scheduler.config.num_train_timesteps)  # one for each image
        noisy = self.scheduler.add_noise(batch.images, noise, timesteps)
        labels = {} if batch.labels is None else {"class_labels": batch.labels}
        output = unet(noisy, timesteps, **labels).sample
        return self.scheduler.training_loss(output, batch.images, noise, timesteps, reduction="none")

    def pipeline(self, modules: dict[str, nn.Module]) -> Any:
        from ..pipelines.pipeline_tiny import TinyPipeline

        return TinyPipeline(unet=modules["unet"], scheduler=self.scheduler)

    def sample(self, pipeline: Any, num_images: int, seed: int) -> tuple[list, dict]:
        generators = [torch.Generator().manual_seed(seed + i) for i in range(num_images)]
        images = pipeline(
            batch_size=num_images, generator=generators, num_inference_steps=self.num_inference_steps
        ).images
        return images, {}
