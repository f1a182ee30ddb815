"""The trajectories of a checkpoint: where the solver of its ODE leads noise, and images that are noised again."""

import copy
import functools
import math
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


_NUM_STEPS = 10  # of the solver from noise to an image, at least
_BATCH_POSITIONS = 64 * 32 * 32  # pixels, of all images that are drawn at a time


@dataclass(frozen=True)
class Trajectories:
    """
    The two ends of trajectories, a chain of S for each of N images: the first begins with noise, and each other one with
    the image to which the one before leads, noised again.

    Attributes:
        ends (`torch.Tensor` of shape `(N, S, 2, C, H, W)`): Where each begins, and where it leads, float16.
        labels (`torch.Tensor` of shape `(N,)`, *optional*): The classes that they were drawn with, int64.
    """

    ends: torch.Tensor
    labels: torch.Tensor | None

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, rows: slice) -> "Trajectories":
        return Trajectories(self.ends[rows], None if self.labels is None else self.labels[rows])


def draw_trajectories(
    unet: nn.Module,
    scheduler: TinyFlowMatchScheduler,
    shape: tuple[int, int, int],
    count: int,
    cache: Path,
    state: PartialState,
    num_inference_steps: int = 1,
    seed: int = 0,
    num_classes: int | None = None,
    class_dropout_prob: float = 0.0,
) -> Trajectories:
    """
    Draws trajectories by the deterministic multistep solver, in 10 or a few more steps from noise and fewer from where there
    is less of it, in the dtype of sampling.

    Args:
        unet (`nn.Module`): Called as `unet(sample, timestep, class_labels=None).sample`, the velocity.
        scheduler ([`TinyFlowMatchScheduler`]): The checkpoint's.
        shape (`tuple[int, int, int]`): Channels, height and width of what the network denoises.
        count (`int`): N. The noise of each image depends on its number and the seed alone.
        cache (`Path`): Folder that keeps them, so that a resumed run has them at once.
        state (`PartialState`): The processes, which share the work.
        num_inference_steps (`int`): S. They begin at the levels of so many sampling steps, 1 - s/S.
        seed (`int`): The seed of noise and labels.
        num_classes (`int`, *optional*): Number of classes, of which each image has one.
        class_dropout_prob (`float`): Share that has the null class.
    """
    dtype, labels = default_dtype(state.device), None
    draws = Draws(seed, "trajectories", range(count))
    if num_classes is not None:
        is_dropped = draws.uniform("label_dropout") < class_dropout_prob
        labels = draws.integers("labels", num_classes).masked_fill(is_dropped, num_classes)
    solver = TinyFlowMatchScheduler.from_config(scheduler.config, solver="multistep", stochastic_sampling=False)
    steps_between = math.ceil(_NUM_STEPS / num_inference_steps)  # the levels at which trajectories begin
    steps_between = max(1, min(steps_between, solver.config.num_train_timesteps // num_inference_steps))

    @functools.cache  # if any are missing
    def network() -> nn.Module:
        return nn.Module.to(copy.deepcopy(unet), state.device, dtype, memory_format=torch.channels_last).eval()

    @torch.no_grad()
    def draw(start: int, stop: int) -> np.ndarray:
        draws, chain = Draws(seed, "trajectories", range(start, stop), state.device), []
        given = {} if labels is None else {"class_labels": labels[start:stop].to(state.device)}
        sample = None
        for number in range(num_inference_steps):
            solver.set_timesteps(num_inference_steps * steps_between, device=state.device)
            timesteps = solver.timesteps[number * steps_between :]
            noise = draws.normal(f"noise {number}" if number else "noise", *shape)
            sample = noise if sample is None else solver.add_noise(sample, noise, timesteps[:1])
            begin = sample = sample.half().float()  # as it is kept
            for timestep in timesteps:
                velocity = network()(sample.to(dtype), timestep.expand(len(sample)), **given).sample.float()
                sample = solver.step(velocity, timestep, sample, eta=0.0).prev_sample
            chain.append(torch.stack([begin, sample], dim=1))
        return torch.stack(chain, dim=1).half().cpu().numpy()

    key = (
        weights_digest(unet),
        dict(unet.config),
        dict(solver.config),
        shape,
        count,
        num_inference_steps,
        steps_between,
    )
    entry = cache / "trajectories" / digest(*key, seed, num_classes, class_dropout_prob, dtype, state.device.type)
    ends = fill(
        entry,
        (count, num_inference_steps, 2, *shape),
        np.float16,
        draw,
        batch_size=max(1, _BATCH_POSITIONS // (shape[1] * shape[2])),
        state=state,
        desc="Trajectories",
    )
    return Trajectories(torch.from_numpy(ends), labels)
