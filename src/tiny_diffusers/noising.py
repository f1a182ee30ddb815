"""
Noise levels of any scheduler, x_t = a x_0 + s eps at t = 0, 1, ..., T - 1, from the image to the noise.

For beta schedules and rectified flow, t is the network's timestep. EDM has no last one: there t counts the T steps of its
sampling, from the image.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from diffusers import SchedulerMixin

from .pipelines.pipeline_tiny import objective_of
from .schedulers.scheduling_tiny_ddim import TinyDDIMScheduler
from .schedulers.scheduling_tiny_edm import TinyEDMScheduler
from .schedulers.scheduling_tiny_flow_match import TinyFlowMatchScheduler


BETA_SCHEDULES = ("linear", "cosine", "sigmoid", "quadratic")
SCHEDULES = (*BETA_SCHEDULES, "flow", "edm")


class NoiseLevels(NamedTuple):
    """Signal a and noise s of x_t at each of the timesteps, (T,), and the betas of a beta schedule."""

    signal: np.ndarray
    noise: np.ndarray
    betas: np.ndarray | None


def noise_levels(scheduler: SchedulerMixin) -> NoiseLevels:
    """Returns the noise levels of a scheduler, in float64."""
    objective, total = objective_of(scheduler), scheduler.config.num_train_timesteps
    if objective == "flow":
        noise = np.arange(total) / total
        return NoiseLevels(1 - noise, noise, None)
    if objective == "edm":
        edm = TinyEDMScheduler.from_config(scheduler.config)
        edm.set_timesteps(total)
        noise = edm.sigmas[:-1].flip(0).double().numpy()
        return NoiseLevels(np.ones(total), noise, None)
    betas = scheduler.betas.double()
    alphas_cumprod = torch.cumprod(1 - betas, dim=0).numpy()
    return NoiseLevels(alphas_cumprod**0.5, (1 - alphas_cumprod) ** 0.5, betas.numpy())


def build_schedule(
    name: str, num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> SchedulerMixin:
    """Builds the scheduler of one of `SCHEDULES`."""
    if name == "flow":
        return TinyFlowMatchScheduler(num_train_timesteps)
    if name == "edm":
        return TinyEDMScheduler(num_train_timesteps=num_train_timesteps)
    return TinyDDIMScheduler(num_train_timesteps, beta_start, beta_end, name)


def add_noise(image: torch.Tensor, noise: torch.Tensor, scheduler: SchedulerMixin, t: int) -> torch.Tensor:
    """
    Computes x_t of images (B, C, H, W) in [-1, 1]. That of EDM, whose noise has no bound, is divided by sqrt(1 + sigma^2):
    to be looked at, and as the latents that its sampling starts from.
    """
    levels = noise_levels(scheduler)
    signal, level = float(levels.signal[t]), float(levels.noise[t])
    scale = (1 + level**2) ** 0.5 if objective_of(scheduler) == "edm" else 1.0
    return (signal * image + level * noise) / scale


def displayed(sample: torch.Tensor, scheduler: SchedulerMixin, timestep: float) -> torch.Tensor:
    """Scales a state that was passed to the network as [`add_noise`] does: EDM's is x / sqrt(sigma^2 + sigma_data^2)."""
    if objective_of(scheduler) != "edm":
        return sample
    variance = np.exp(8 * timestep)
    return sample * float(((variance + scheduler.config.sigma_data**2) / (variance + 1)) ** 0.5)


def timesteps_from(scheduler: SchedulerMixin, t: int, num_steps: int) -> Sequence[float]:
    """Returns at most `num_steps` timesteps of the network, from t down to the last one before the image."""
    objective = objective_of(scheduler)
    if objective == "flow":
        return np.linspace(t, t / num_steps, num_steps).tolist()
    positions = np.unique(np.linspace(t, 0, num_steps).round().astype(int))[::-1]
    if objective == "edm":
        return (np.log(noise_levels(scheduler).noise[positions]) / 4).tolist()
    return positions.tolist()


def caption(scheduler: SchedulerMixin, timestep: float) -> str:
    """Returns a timestep of the network in words: for EDM, whose timestep is ln(sigma) / 4, the noise level."""
    if objective_of(scheduler) == "edm":
        return f"sigma {np.exp(4 * timestep):.3g}"
    return f"t = {timestep:.0f}"
