"""
Averages of the weights during training: the exponential moving average (EMA), which is what a run saves, and those of
power functions, from which averages of any length are rebuilt afterwards (`posthoc_ema.py`).
"""

import copy

import numpy as np
import torch
from torch import nn

from .checkpoints import gather_full


class WeightAverage:
    """
    A copy of `module` whose weights follow the trained ones: theta_avg <- d theta_avg + (1 - d) theta. So do the running
    statistics of a batch norm: those of the trained weights do not fit their average, whose features vary less.
    """

    def __init__(self, module: nn.Module):
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    def decay(self, step: int) -> float:
        """Returns the decay d of the update after optimizer step `step` (the first is 1)."""
        raise NotImplementedError

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Moves the average toward the weights of `module` after optimizer step `step`."""
        averages, weights = list(self.module.parameters()), [gather_full(weight) for weight in module.parameters()]
        for average, buffer in zip(self.module.buffers(), module.buffers(), strict=True):
            if buffer.is_floating_point():
                averages.append(average)
                weights.append(buffer)
            else:
                average.copy_(buffer)
        torch._foreach_lerp_(averages, weights, 1 - self.decay(step))


class EMA(WeightAverage):
    """
    The average that a run saves.

    The decay rises as diffusers' inverse-gamma warm-up does, d = 1 - (1 + n / inv_gamma)^-power, capped at
    `max_decay`, n being the updates since `start_step`. Until `start_step` the copy equals the weights.

    Args:
        module (`nn.Module`): The network that is trained.
        max_decay (`float`): Upper limit of the decay.
        inv_gamma (`float`), power (`float`): Shape of the warm-up; `power=0` holds the decay at `max_decay`.
        start_step (`int`): Optimizer step after which averaging starts.
    """

    def __init__(
        self,
        module: nn.Module,
        max_decay: float = 0.9999,
        inv_gamma: float = 1.0,
        power: float = 0.75,
        start_step: int = 0,
    ):
        super().__init__(module)
        self.max_decay, self.inv_gamma, self.power, self.start_step = max_decay, inv_gamma, power, start_step

    def decay(self, step: int) -> float:
        updates = step - self.start_step - 1
        if updates <= 0:
            return 0.0
        if self.power == 0:
            return self.max_decay
        return min(self.max_decay, 1 - (1 + updates / self.inv_gamma) ** -self.power)


class PowerEMA(WeightAverage):
    """
    The average whose profile is a power function (arXiv 2312.02696, section 3.1): after step t the weights of step s
    count in proportion to s^gamma, by d = (1 - 1/t)^(gamma + 1). The first step replaces the initial weights.

    Args:
        module (`nn.Module`): The network that is trained.
        sigma_rel (`float`): Length of the average: the standard deviation of its profile, as a share of t.
    """

    def __init__(self, module: nn.Module, sigma_rel: float):
        super().__init__(module)
        self.gamma = gamma_of(sigma_rel)

    def decay(self, step: int) -> float:
        return (1 - 1 / max(step, 1)) ** (self.gamma + 1)


def gamma_of(sigma_rel: float) -> float:
    """
    Returns the exponent of the power function of relative standard deviation `sigma_rel` (arXiv 2312.02696, algorithm
    2): the largest root of sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).
    """
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())
