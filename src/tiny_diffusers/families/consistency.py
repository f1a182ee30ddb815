"""Consistency models by easy consistency tuning (ECT), which draw an image in one or two passes of the network."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from torch import nn

from ..errors import UserError
from ..flags import flag
from ..pipelines.pipeline_tiny import CONSISTENCY_STEPS, TinyPipeline, objective_of
from ..schedulers.scheduling_tiny_flow_match import TinyFlowMatchScheduler
from ..training.family import Batch, load_pretrained
from .conditional_diffusion import ConditionalArguments, ConditionalDiffusion
from .diffusion import MIN_LOSS_LEVEL, Diffusion, build_scheduler, resolve_diffusion


# n(s) = 1 + k sigmoid(-b s) of ECT, by which pairs lie further apart near the image. There k = 8 and b = 1.
_K = 8.0
# c / sqrt(D) of the pseudo-Huber loss, from Song & Dhariwal 2023, arXiv 2310.14189, section 3.3
_HUBER = 0.00054


@dataclass(frozen=True)
class ConsistencyArguments(ConditionalArguments):
    """How near the pairs of noise levels are brought to each other."""

    TITLE: ClassVar[str] = "consistency tuning"
    SCRIPT: ClassVar[str] = "consistency"
    FAMILY: ClassVar[str] = "consistency"

    num_stages: int = flag(
        8,
        "Stages of equal length; in each the two noise levels of a pair are half as far apart as in the one before.",
        within="[1, 12]",
    )
    ddpm_num_inference_steps: int | None = flag(
        None,
        f"Sampling steps of the sample grids; {CONSISTENCY_STEPS} if not given.",
        within="[1, inf)",
        changes_run=False,
    )
    guidance_scales: list[float] | None = flag(
        [1.0], "Guidance scales of the sample grids.", within="(-inf, inf)", changes_run=False
    )

    @property
    def num_inference_steps(self) -> int:
        """Sampling steps of the sample grids."""
        return self.ddpm_num_inference_steps or min(CONSISTENCY_STEPS, self.ddpm_num_steps)


def load_tuned(arguments: ConsistencyArguments) -> TinyPipeline | None:
    """
    Loads the checkpoint to tune; None from scratch.

    Raises:
        UserError: If it is none of rectified flow.
    """
    pipeline = load_pretrained(arguments, TinyPipeline)
    if pipeline is None:
        return None
    name = arguments.pretrained_model_name_or_path
    if "unet" not in pipeline.components or objective_of(pipeline.scheduler) != "flow":
        kind = type(pipeline).__name__
        if "unet" in pipeline.components:
            kind = pipeline.scheduler.config.get("prediction_type") or objective_of(pipeline.scheduler)
        raise UserError(
            f"--pretrained_model_name_or_path: {name} ({kind}) is no checkpoint of rectified flow, which consistency tuning "
            "needs: train one by --prediction_type flow, the default."
        )
    return pipeline


def resolve_consistency(
    arguments: ConsistencyArguments, pipeline: TinyPipeline | None, state: PartialState
) -> dict[str, Any]:
    """
    Resolves what [`resolve_diffusion`] does, and takes the timesteps and the conditioning image of the checkpoint.

    Raises:
        UserError: If flags ask for another objective.
    """
    options = resolve_diffusion(arguments, state)
    if options["prediction_type"] != "flow":
        raise UserError(
            f"Consistency tuning is for rectified flow, not for {options['prediction_type']}: leave out --prediction_type "
            "and the flags of beta schedules."
        )
    if pipeline is None:
        return options
    if "ddpm_num_steps" not in arguments.given:
        options["ddpm_num_steps"] = pipeline.scheduler.config.num_train_timesteps
    conditioning = getattr(pipeline, "_conditioning", None)
    if conditioning is not None and conditioning.is_made:
        options["conditioning"] = conditioning.kind
    return options


def build_consistency_scheduler(settings: ConsistencyArguments) -> TinyFlowMatchScheduler:
    """Builds the scheduler of a consistency model, which draws all noise anew in each step."""
    config = build_scheduler(settings).config
    return TinyFlowMatchScheduler.from_config(config, solver="euler", stochastic_sampling=True)


def level_gaps(levels: torch.Tensor, stage: int) -> torch.Tensor:
    """
    Computes the distance of the lower noise level of each pair, t - r = t n(s) / 2^stage with s = t / (1 - t), at most t:
    [ECT](https://huggingface.co/papers/2406.14548) with the levels of rectified flow.

    Args:
        levels (`torch.Tensor` of shape `(B,)`): The higher level t of each image, in [0, 1].
        stage (`int`): The stage, from 1.

    Returns:
        `torch.Tensor` of shape `(B,)`: t - r, from 0 to t.
    """
    n = 1 + _K * torch.sigmoid(-levels / (1 - levels))  # s is infinite at pure noise, and n 1
    return torch.minimum(levels, levels * n / 2**stage)


class ConsistencyMixin:
    """
    Mixin for a family of diffusion that minimizes the difference between the images that the network sees at two noise
    levels of one trajectory ([Geng et al. 2024](https://huggingface.co/papers/2406.14548)).

    The consistency function is f(x_t, t) = x_t - t v(x_t, t), which is x_0 at t = 0 whatever the network is. With networks
    that predict the image it is x_t - t^2 v / 0.05 below t = 0.05, to make it so; their samples are drawn at higher levels,
    in at most 20 steps. Of f at the lower level r no gradient is taken. In the first stage r is 0 for most pairs, which is
    diffusion.

    Args:
        num_stages (`int`): Stages of equal length, from each of which to the next the pairs' distance halves.
    """

    def __init__(self, *args: Any, num_stages: int = 8, **options: Any):
        super().__init__(*args, **options)
        self.num_stages = num_stages

    def _image_losses(self, unet: nn.Module, batch: Batch) -> torch.Tensor:
        noise = batch.draws.normal("noise", *batch.images.shape[1:])
        total = self.scheduler.config.num_train_timesteps
        levels = self.scheduler.sample_timesteps(batch.draws.uniform("timesteps", 2)) / total
        stage = min(1 + int(batch.progress * self.num_stages), self.num_stages)
        gaps = level_gaps(levels, stage)
        devices = [batch.images.device] if batch.images.is_cuda else []
        with torch.no_grad(), torch.random.fork_rng(devices):  # so that dropout is the same in both passes
            target = self._original_sample(unet, batch, noise, levels - gaps)
        original = self._original_sample(unet, batch, noise, levels)
        error = (original - target).square().mean(dim=(1, 2, 3))
        distance = (error + _HUBER**2).sqrt() - _HUBER
        return distance / gaps.clamp(min=1e-6)  # 0 at t = 0 alone

    def _original_sample(
        self, unet: nn.Module, batch: Batch, noise: torch.Tensor, levels: torch.Tensor
    ) -> torch.Tensor:
        """Computes f(x_t, t), `(B, C, H, W)` float32."""
        timesteps = levels * self.scheduler.config.num_train_timesteps
        noisy = self.scheduler.add_noise(batch.images, noise, timesteps)
        velocity = self._predict(unet, batch, noisy, timesteps).float()
        if self.x_prediction:  # t v leads to the predicted image, however small t is
            levels = levels * (levels / MIN_LOSS_LEVEL).clamp(max=1)
        return noisy - levels[:, None, None, None] * velocity


class Consistency(ConsistencyMixin, Diffusion):
    """Consistency model without conditions. See [`Diffusion`] for the arguments."""


class ConditionalConsistency(ConsistencyMixin, ConditionalDiffusion):
    """Consistency model with classes, conditions or an image. See [`ConditionalDiffusion`] for the arguments."""
