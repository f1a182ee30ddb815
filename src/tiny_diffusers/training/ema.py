"""The exponential moving average (EMA) of the weights, which is what a run saves."""

import copy

import torch
from torch import nn

from .checkpoints import gather_full


class EMA:
    """
    A copy of `module` whose weights follow the trained ones: theta_ema <- d theta_ema + (1 - d) theta.

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
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.max_decay, self.inv_gamma, self.power, self.start_step = max_decay, inv_gamma, power, start_step

    def decay(self, step: int) -> float:
        """Returns the decay of the update after optimizer step `step` (the first is 1)."""
        updates = step - self.start_step - 1
        if updates <= 0:
            return 0.0
        if self.power == 0:
            return self.max_decay
        return min(self.max_decay, 1 - (1 + updates / self.inv_gamma) ** -self.power)

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Moves the EMA towards the weights of `module` after optimizer step `step`."""
        averages, weights = list(self.module.parameters()), [gather_full(weight) for weight in module.parameters()]
        torch._foreach_lerp_(averages, weights, 1 - self.decay(step))
        for average, buffer in zip(self.module.buffers(), module.buffers(), strict=True):
            average.copy_(buffer)
