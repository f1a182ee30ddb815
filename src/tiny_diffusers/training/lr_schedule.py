"""The schedule of the learning rate: diffusers' own, and `warmup_stable_decay`."""

from collections.abc import Callable

from diffusers.optimization import get_scheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


_DECAY_SHARE = 0.2  # of the steps, over which `warmup_stable_decay` ends (arXiv 2405.18392)


def build_lr_scheduler(name: str, optimizer: Optimizer, warmup_steps: int, num_steps: int) -> LambdaLR:
    """
    Builds the schedule of the learning rate.

    Step n (the first is 1) has the rate that the schedule gives for n: diffusers' training scripts take n - 1, which
    wastes the first step of a warm-up on a rate of 0. Schedules that decay to 0 reach it one step after the last.

    Args:
        name (`str`): `warmup_stable_decay`, or one of diffusers' schedules.
        optimizer (`torch.optim.Optimizer`): Its learning rates are the peak rates.
        warmup_steps (`int`): Steps over which the rate rises linearly to its peak.
        num_steps (`int`): Steps of the run.
    """
    if name == "warmup_stable_decay":
        rate = _warmup_stable_decay(warmup_steps, num_steps)
    else:
        stock = get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=num_steps + 1)
        rate = stock.lr_lambdas[0]
    return LambdaLR(optimizer, lambda steps_taken: rate(steps_taken + 1))


def _warmup_stable_decay(warmup_steps: int, num_steps: int) -> Callable[[int], float]:
    """Returns the share of the peak rate at step n: a linear rise, the peak, a linear fall over the last steps."""
    decay_steps = int(_DECAY_SHARE * num_steps)
    return lambda n: max(0.0, min(n / max(1, warmup_steps), 1.0, (num_steps + 1 - n) / (decay_steps + 1)))
