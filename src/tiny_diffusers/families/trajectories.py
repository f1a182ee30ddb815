"""The trajectories of a checkpoint: where the solver of its ODE leads each noise."""

import copy
import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import nn

from ..evaluation.features import digest as weights_digest
from ..evaluation.images import digest, fill
from ..hardware import default_dtype
from ..schedulers.scheduling_tiny_flow_match import TinyFlowMatchScheduler
from ..training.draws import Draws


NUM_STEPS = 10  # of the solver
_BATCH_POSITIONS = 64 * 32 * 32  # pixels, of all images that are drawn at a time


@dataclass(frozen=True)
class Trajectories:
    """
    The two ends of trajectories.

    Attributes:
        noise (`torch.Tensor` of shape `(N, C, H, W)`): Where they begin, float16.
        images (`torch.Tensor` of shape `(N, C, H, W)`): Where they lead, float16.
        labels (`torch.Tensor` of shape `(N,)`, *optional*): The classes that they were drawn with, int64.
    """

    noise: torch.Tensor
    images: torch.Tensor
    labels: torch.Tensor | None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: slice | torch.Tensor) -> "Trajectories":
        labels = None if self.labels is None else self.labels[rows]
        return Trajectories(self.noise[rows], self.images[rows], labels)


def draw_trajectories(
    unet: nn.Module,
    scheduler: TinyFlowMatchScheduler,
    shape: tuple[int, int, int],
    count: int,
    cache: Path,
    state: PartialState,
    seed: int = 0,
    num_classes: int | None = None,
    class_dropout_prob: float = 0.0,
) -> Trajectories:
    """
    Draws trajectories by the deterministic multistep solver, in [`NUM_STEPS`] steps, or T if these are fewer, in the dtype
    of sampling.

    Args:
        unet (`nn.Module`): Called as `unet(sample, timestep, class_labels=None).sample`, the velocity.
        scheduler ([`TinyFlowMatchScheduler`]): The checkpoint's.
        shape (`tuple[int, int, int]`): Channels, height and width of what the network denoises.
        count (`int`): Number of trajectories. The noise of each depends on its number and the seed alone.
        cache (`Path`): Folder that keeps them, so that a resumed run has them at once.
        state (`PartialState`): The processes, which share the work.
        seed (`int`): The seed of noise and labels.
        num_classes (`int`, *optional*): Number of classes, of which each trajectory has one.
        class_dropout_prob (`float`): Share that has the null class.
    """
    dtype, labels = default_dtype(state.device), None
    draws = Draws(seed, "trajectories", range(count))
    if num_classes is not None:
        is_dropped = draws.uniform("label_dropout") < class_dropout_prob
        labels = draws.integers("labels", num_classes).masked_fill(is_dropped, num_classes)
    solver = TinyFlowMatchScheduler.from_config(scheduler.config, solver="multistep", stochastic_sampling=False)
    num_steps = min(NUM_STEPS, solver.config.num_train_timesteps)

    @functools.cache  # if any are missing
    def network() -> nn.Module:
        return nn.Module.to(copy.deepcopy(unet), state.device, dtype, memory_format=torch.channels_last).eval()

    @torch.no_grad()
    def draw(start: int, stop: int) -> np.ndarray:
        noise = Draws(seed, "trajectories", range(start, stop)).normal("noise", *shape).half()
        sample = noise.to(state.device).float()
        given = {} if labels is None else {"class_labels": labels[start:stop].to(state.device)}
        solver.set_timesteps(num_steps, device=state.device)
        for timestep in solver.timesteps:
            velocity = network()(sample.to(dtype), timestep.expand(len(sample)), **given).sample.float()
            sample = solver.step(velocity, timestep, sample, eta=0.0).prev_sample
        return torch.stack([noise, sample.half().cpu()], dim=1).numpy()

    key = (weights_digest(unet), dict(unet.config), dict(solver.config), shape, count, num_steps)
    entry = cache / "trajectories" / digest(*key, seed, num_classes, class_dropout_prob, dtype, state.device.type)
    ends = fill(
        entry,
        (count, 2, *shape),
        np.float16,
        draw,
        batch_size=max(1, _BATCH_POSITIONS // (shape[1] * shape[2])),
        state=state,
        desc="Trajectories",
    )
    noise, images = torch.from_numpy(ends).unbind(1)
    return Trajectories(noise, images, labels)
