"""
Consistency models, which draw an image in one or two passes of the network: by the trajectories of a checkpoint, or by easy
consistency tuning (ECT).
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from accelerate import Accelerator, PartialState
from torch import nn

from ..data import ImageData, cache_root
from ..data.augmentation import AUGMENTATIONS
from ..errors import UserError, say
from ..flags import flag
from ..pipelines.pipeline_tiny import CONSISTENCY_STEPS, TinyPipeline, objective_of
from ..schedulers.scheduling_tiny_flow_match import TinyFlowMatchScheduler
from ..training.family import Batch, load_pretrained
from ..training.settings import earlier_settings
from .conditional_diffusion import ConditionalArguments, ConditionalDiffusion
from .diffusion import MIN_LOSS_LEVEL, Diffusion, build_scheduler, resolve_diffusion
from .trajectories import Trajectories, draw_trajectories


# n(s) = 1 + k sigmoid(-b s) of ECT, by which pairs lie further apart near the image. There k = 8 and b = 1.
_K = 8.0
_FIRST_SHARE = 0.75  # of the images, with trajectories: those from pure noise are the hardest to learn
# c / sqrt(D) of the pseudo-Huber loss, from Song & Dhariwal 2023, arXiv 2310.14189, section 3.3
_HUBER = 0.00054


@dataclass(frozen=True)
class ConsistencyArguments(ConditionalArguments):
    """What the network learns to be consistent with."""

    TITLE: ClassVar[str] = "consistency tuning"
    SCRIPT: ClassVar[str] = "consistency"
    FAMILY: ClassVar[str] = "consistency"

    SMOKE: ClassVar[dict[str, Any]] = {**ConditionalArguments.SMOKE, "num_trajectories": 64}

    method: Literal["trajectories", "ect"] | None = flag(
        None,
        "trajectories: the first step jumps to where the trajectories of the checkpoint lead, which are drawn first; ect: "
        "easy consistency tuning with pairs of noise levels of the training images. If not given, ect from scratch and with "
        "conditions or a conditioning image, otherwise trajectories.",
    )
    num_trajectories: int = flag(
        12288, "Images of which trajectories are drawn, one for each sampling step.", within="[64, 1000000]"
    )
    num_stages: int = flag(
        8,
        "Of ect: stages of equal length; in each the two noise levels of a pair are half as far apart as in the one "
        "before.",
        within="[1, 12]",
    )
    ddpm_num_inference_steps: int | None = flag(
        None,
        f"Sampling steps, of the sample grids and, with trajectories, those that are trained; {CONSISTENCY_STEPS} if not "
        "given.",
        within="[1, inf)",
    )
    guidance_scales: list[float] | None = flag(
        [1.0], "Guidance scales of the sample grids.", within="(-inf, inf)", changes_run=False
    )

    @property
    def num_inference_steps(self) -> int:
        """Sampling steps of the sample grids, and with trajectories those that are trained."""
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
    arguments: ConsistencyArguments, data: ImageData, pipeline: TinyPipeline | None, state: PartialState
) -> dict[str, Any]:
    """
    Resolves the method and what [`resolve_diffusion`] does, and takes the timesteps and the conditioning image of the
    checkpoint.

    Raises:
        UserError: If flags ask for another objective, or for trajectories that can't be drawn.
    """
    options = resolve_diffusion(arguments, state)
    if options["prediction_type"] != "flow":
        raise UserError(
            f"Consistency tuning is for rectified flow, not for {options['prediction_type']}: leave out --prediction_type "
            "and the flags of beta schedules."
        )
    options["method"] = _resolve_method(arguments, data, pipeline)
    if pipeline is None:
        return options
    if "ddpm_num_steps" not in arguments.given:
        options["ddpm_num_steps"] = pipeline.scheduler.config.num_train_timesteps
    conditioning = getattr(pipeline, "_conditioning", None)
    if conditioning is not None and conditioning.is_made:
        options["conditioning"] = conditioning.kind
    return options


def _resolve_method(arguments: ConsistencyArguments, data: ImageData, pipeline: TinyPipeline | None) -> str:
    """Returns the method that is asked for, or a resumed run's, or trajectories where they can be drawn."""
    obstacle = None
    if pipeline is None:
        obstacle = "give --pretrained_model_name_or_path, of which they are"
    elif pipeline.scheduler.config.get("stochastic_sampling"):
        obstacle = f"{arguments.pretrained_model_name_or_path} is a consistency model already, which has none"
    elif arguments.has_conditioning or arguments.condition_columns or getattr(pipeline, "_conditioning", None):
        obstacle = "they are drawn with no other conditions than classes"
    method = arguments.method
    if method is None and (earlier := earlier_settings(arguments, data)):
        method = earlier.get("method", "ect")  # older runs know no other
    if method == "trajectories" and obstacle:
        raise UserError(f"--method trajectories: {obstacle}; or take --method ect.")
    method = method or ("ect" if obstacle else "trajectories")
    unused = [name for name in ("augment_prob", *AUGMENTATIONS) if getattr(arguments, name)]
    unused += arguments.asked_of(("num_stages", "timestep_distribution"))
    if method == "ect" and arguments.asked_of(("num_trajectories",)) and not arguments.smoke:
        raise UserError("--num_trajectories is for --method trajectories: leave it out.")
    if method == "trajectories" and unused:
        raise UserError(
            f"--{unused[0]} is for training images at many noise levels, which trajectories replace: leave it out, or take "
            "--method ect."
        )
    return method


def load_trajectories(
    settings: ConsistencyArguments,
    accelerator: Accelerator,
    data: ImageData,
    pipeline: TinyPipeline | None,
    num_classes: int | None,
) -> Trajectories | None:
    """
    Draws the trajectories of the checkpoint, or reads them from the cache of datasets; returns None for ECT.

    Args:
        settings ([`ConsistencyArguments`]): The settings.
        accelerator (`Accelerator`): The processes.
        data ([`ImageData`]): The images, for their size.
        pipeline ([`TinyPipeline`], *optional*): The checkpoint.
        num_classes (`int`, *optional*): Number of its classes, whose labels are drawn, and dropped as those of images are.
    """
    if settings.method != "trajectories":
        return None
    if accelerator.is_main_process:
        say(f"trajectories of the checkpoint for {settings.num_trajectories:,} images ...")
    return draw_trajectories(
        pipeline.unet,
        pipeline.scheduler,
        data.input_shape,
        settings.num_trajectories,
        cache_root(settings.cache_dir),
        accelerator.state,
        settings.num_inference_steps,
        settings.seed,
        num_classes,
        settings.class_dropout_prob,
    )


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
    Mixin for a family of diffusion that learns the consistency function f, which leads from any point of a trajectory of
    the ODE to its end ([Song et al. 2023](https://huggingface.co/papers/2303.01469)): f(x_t, t) = x_t - t v(x_t, t), which
    is x_0 at t = 0 whatever the network is. With networks that predict the image it is x_t - t^2 v / 0.05 below t = 0.05,
    to make it so; their samples are drawn at higher levels, in at most 20 steps.

    With trajectories it is learned from where they lead ([Luhman & Luhman
    2021](https://huggingface.co/papers/2101.02388)), at the levels where sampling steps begin. Without, the difference
    between f at two noise levels of an image is minimized ([Geng et al. 2024](https://huggingface.co/papers/2406.14548)),
    where of f at the lower level r no gradient is taken; in the first stage r is 0 for most pairs, which is diffusion.

    Args:
        num_stages (`int`): Stages of equal length, from each of which to the next the pairs' distance halves.
        trajectories ([`Trajectories`], *optional*): Trajectories of the checkpoint.
        held_out (`float`): Share of them that is kept for the validation loss.
    """

    def __init__(
        self,
        *args: Any,
        num_stages: int = 8,
        trajectories: Trajectories | None = None,
        held_out: float = 0.0,
        **options: Any,
    ):
        super().__init__(*args, **options)
        self.num_stages = num_stages
        self.trajectories = self.held_out = None
        if trajectories is not None:
            kept = max(1, math.floor((1 - held_out) * len(trajectories)))
            self.trajectories, self.held_out = trajectories[:kept], trajectories[kept:]

    def validation_loss(self, modules: dict[str, nn.Module], batch: Batch) -> torch.Tensor:
        if self.trajectories is None:
            return super().validation_loss(modules, batch)
        return self._trajectory_losses(modules["unet"], batch, self.held_out)

    def _image_losses(self, unet: nn.Module, batch: Batch) -> torch.Tensor:
        if self.trajectories is None:
            return self._pair_losses(unet, batch)
        return self._trajectory_losses(unet, batch, self.trajectories)

    def _trajectory_losses(self, unet: nn.Module, batch: Batch, trajectories: Trajectories) -> torch.Tensor:
        """Computes the distance of f from where a trajectory leads, at the level where it begins, `(B,)`."""
        draws, num_steps = batch.draws, trajectories.ends.shape[1]
        rows = draws.integers("trajectory", len(trajectories)).cpu()
        step = draws.integers("step", max(1, num_steps - 1)) + 1
        step = step.masked_fill((draws.uniform("is_first") < _FIRST_SHARE) | (num_steps == 1), 0)
        begin, end = trajectories.ends[rows, step.cpu()].to(batch.images).unbind(1)
        if trajectories.labels is not None:
            batch = dataclasses.replace(batch, labels=trajectories.labels[rows].to(batch.labels))
        timesteps = (1 - step / num_steps) * self.scheduler.config.num_train_timesteps
        return _distance(self._end(unet, batch, begin, timesteps), end)

    def _pair_losses(self, unet: nn.Module, batch: Batch) -> torch.Tensor:
        noise = batch.draws.normal("noise", *batch.images.shape[1:])
        total = self.scheduler.config.num_train_timesteps
        levels = self.scheduler.sample_timesteps(batch.draws.uniform("timesteps", 2)) / total
        stage = min(1 + int(batch.progress * self.num_stages), self.num_stages)
        gaps = level_gaps(levels, stage)
        devices = [batch.images.device] if batch.images.is_cuda else []
        with torch.no_grad(), torch.random.fork_rng(devices):  # so that dropout is the same in both passes
            target = self._original_sample(unet, batch, noise, levels - gaps)
        original = self._original_sample(unet, batch, noise, levels)
        return _distance(original, target) / gaps.clamp(min=1e-6)  # 0 at t = 0 alone

    def _original_sample(
        self, unet: nn.Module, batch: Batch, noise: torch.Tensor, levels: torch.Tensor
    ) -> torch.Tensor:
        """Computes f(x_t, t) of images, `(B, C, H, W)` float32."""
        timesteps = levels * self.scheduler.config.num_train_timesteps
        return self._end(unet, batch, self.scheduler.add_noise(batch.images, noise, timesteps), timesteps)

    def _end(self, unet: nn.Module, batch: Batch, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Computes f(x_t, t), `(B, C, H, W)` float32."""
        levels = timesteps / self.scheduler.config.num_train_timesteps
        velocity = self._predict(unet, batch, noisy, timesteps).float()
        if self.x_prediction:  # t v leads to the predicted image, however small t is
            levels = levels * (levels / MIN_LOSS_LEVEL).clamp(max=1)
        return noisy - levels[:, None, None, None] * velocity


def _distance(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Computes the pseudo-Huber distance of images, `(B,)`."""
    error = (predicted - target).square().mean(dim=(1, 2, 3))
    return (error + _HUBER**2).sqrt() - _HUBER


class Consistency(ConsistencyMixin, Diffusion):
    """Consistency model without conditions. See [`Diffusion`] for the arguments."""


class ConditionalConsistency(ConsistencyMixin, ConditionalDiffusion):
    """Consistency model with classes, conditions or an image. See [`ConditionalDiffusion`] for the arguments."""
