"""The trajectories of a checkpoint: where the solver of its ODE leads each noise."""

import copy
from dataclasses import dataclass

import torch
from torch import nn

from ..progress import progress_bar
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


@torch.no_grad()
def draw_trajectories(
    unet: nn.Module,
    scheduler: TinyFlowMatchScheduler,
    shape: tuple[int, int, int],
    rows: range,
    seed: int = 0,
    labels: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    show_progress: bool = True,
) -> Trajectories:
    """
    Draws trajectories by the deterministic multistep solver, in [`NUM_STEPS`] steps, or T if these are fewer.

    Args:
        unet (`nn.Module`): Called as `unet(sample, timestep, class_labels=None).sample`, the velocity.
        scheduler ([`TinyFlowMatchScheduler`]): The checkpoint's.
        shape (`tuple[int, int, int]`): Channels, height and width of what the network denoises.
        rows (`range`): Numbers of the trajectories. The noise of each depends on its number and the seed alone.
        seed (`int`): The seed of the noise.
        labels (`torch.Tensor` of shape `(N,)`, *optional*): The class of each.
        dtype (`torch.dtype`): That of the network meanwhile.
        show_progress (`bool`): Whether to show a progress bar.
    """
    device = next(unet.parameters()).device
    network = nn.Module.to(copy.deepcopy(unet), dtype=dtype, memory_format=torch.channels_last).eval()
    solver = TinyFlowMatchScheduler.from_config(scheduler.config, solver="multistep", stochastic_sampling=False)
    noise, images = [], []
    size = max(1, _BATCH_POSITIONS // (shape[1] * shape[2]))
    with progress_bar(total=len(rows), desc="Trajectories", unit="image", disable=not show_progress) as bar:
        for first in range(0, len(rows), size):
            batch = rows[first : first + size]
            given = {} if labels is None else {"class_labels": labels[first : first + size]}
            sample = Draws(seed, "trajectories", batch, device).normal("noise", *shape)
            noise.append(sample.half())
            solver.set_timesteps(min(NUM_STEPS, solver.config.num_train_timesteps), device=device)
            for timestep in solver.timesteps:
                velocity = network(sample.to(dtype), timestep.expand(len(batch)), **given).sample.float()
                sample = solver.step(velocity, timestep, sample, eta=0.0).prev_sample
            images.append(sample.half())
            bar.update(len(batch))
    return Trajectories(torch.cat(noise), torch.cat(images), labels)
