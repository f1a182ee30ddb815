"""The trajectories of a checkpoint: where the solver of its ODE leads each noise."""

import copy
import math
from dataclasses import dataclass

import torch
from torch import nn

from ..progress import progress_bar
from ..schedulers.scheduling_tiny_flow_match import TinyFlowMatchScheduler
from ..training.draws import Draws


NUM_STEPS = 10  # of the solver, at least
_BATCH_POSITIONS = 64 * 32 * 32  # pixels, of all images that are drawn at a time


@dataclass(frozen=True)
class Trajectories:
    """
    Points of trajectories, and their ends.

    Attributes:
        timesteps (`torch.Tensor` of shape `(L,)`): The timesteps of the points, float32, from pure noise down.
        points (`torch.Tensor` of shape `(N, L, C, H, W)`): float16, beginning with the noise.
        ends (`torch.Tensor` of shape `(N, C, H, W)`): The images that they lead to, float16.
        labels (`torch.Tensor` of shape `(N,)`, *optional*): The classes that they were drawn with, int64.
    """

    timesteps: torch.Tensor
    points: torch.Tensor
    ends: torch.Tensor
    labels: torch.Tensor | None

    def __len__(self) -> int:
        return len(self.ends)

    def split(self, held_out: int) -> tuple["Trajectories", "Trajectories"]:
        """Splits off the last trajectories."""
        count = len(self) - held_out
        parts = (slice(None, count), slice(count, None))
        return tuple(
            Trajectories(
                self.timesteps, self.points[rows], self.ends[rows], None if self.labels is None else self.labels[rows]
            )
            for rows in parts
        )


@torch.no_grad()
def draw_trajectories(
    unet: nn.Module,
    scheduler: TinyFlowMatchScheduler,
    shape: tuple[int, int, int],
    rows: range,
    num_levels: int = 2,
    seed: int = 0,
    labels: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    show_progress: bool = True,
) -> Trajectories:
    """
    Draws trajectories by the deterministic multistep solver, in [`NUM_STEPS`] steps or a few more.

    Args:
        unet (`nn.Module`): Called as `unet(sample, timestep, class_labels=None).sample`, the velocity.
        scheduler ([`TinyFlowMatchScheduler`]): The checkpoint's.
        shape (`tuple[int, int, int]`): Channels, height and width of what the network denoises.
        rows (`range`): Numbers of the trajectories. The noise of each depends on its number and the seed alone.
        num_levels (`int`): L, the points of each that are kept, at equal distances of t from pure noise on.
        seed (`int`): The seed of the noise.
        labels (`torch.Tensor` of shape `(N,)`, *optional*): The class of each.
        dtype (`torch.dtype`): That of the network meanwhile.
        show_progress (`bool`): Whether to show a progress bar.
    """
    device = next(unet.parameters()).device
    network = copy.deepcopy(unet).to(dtype=dtype, memory_format=torch.channels_last).eval()
    solver = TinyFlowMatchScheduler.from_config(scheduler.config, solver="multistep", stochastic_sampling=False)
    steps_a_level = math.ceil(NUM_STEPS / num_levels)
    points, ends = [], []
    size = max(1, _BATCH_POSITIONS // (shape[1] * shape[2]))
    with progress_bar(total=len(rows), desc="Trajectories", unit="image", disable=not show_progress) as bar:
        for first in range(0, len(rows), size):
            batch = rows[first : first + size]
            given = {} if labels is None else {"class_labels": labels[first : first + size]}
            sample = Draws(seed, "trajectories", batch, device).normal("noise", *shape)
            solver.set_timesteps(steps_a_level * num_levels, device=device)
            kept = []
            for step, timestep in enumerate(solver.timesteps):
                if step % steps_a_level == 0:
                    kept.append(sample.half())
                velocity = network(sample.to(dtype), timestep.expand(len(batch)), **given).sample.float()
                sample = solver.step(velocity, timestep, sample, eta=0.0).prev_sample
            points.append(torch.stack(kept, dim=1))
            ends.append(sample.half())
            bar.update(len(batch))
    return Trajectories(solver.timesteps[::steps_a_level].float(), torch.cat(points), torch.cat(ends), labels)
