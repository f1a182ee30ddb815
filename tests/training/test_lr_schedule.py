"""Step n has the rate of the schedule at n: no step of a run has a rate of 0."""

from typing import get_args

import pytest
import torch
from diffusers.optimization import get_scheduler

from tiny_diffusers.training.arguments import LRScheduler
from tiny_diffusers.training.lr_schedule import build_lr_scheduler


def _rates(name, warmup_steps, num_steps):
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)], "lr": 20.0}], lr=2.0)
    scheduler, rates = build_lr_scheduler(name, optimizer, warmup_steps, num_steps), []
    for _ in range(num_steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert all(other == pytest.approx(10 * rate) for rate, other in rates)
    return [rate / 2.0 for rate, _ in rates]


@pytest.mark.parametrize("warmup_steps", [0, 1, 5])
@pytest.mark.parametrize("name", get_args(LRScheduler))
def test_no_step_has_a_rate_of_zero_and_the_warm_up_ends_at_the_peak(name, warmup_steps):
    rates = _rates(name, warmup_steps, 50)
    assert min(rates) > 0 and max(rates) <= 1
    if name != "constant":
        assert rates[:warmup_steps] == pytest.approx([(n + 1) / warmup_steps for n in range(warmup_steps)])
    if warmup_steps:
        assert rates[warmup_steps - 1] == pytest.approx(1)


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup"])
def test_step_n_has_the_rate_of_diffusers_schedule_at_n(name):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    stock = get_scheduler(name, optimizer, num_warmup_steps=5, num_training_steps=51)
    assert _rates(name, 5, 50) == pytest.approx([stock.lr_lambdas[0](n) for n in range(1, 51)])


def test_warmup_stable_decay_is_a_trapezoid():
    rates = _rates("warmup_stable_decay", 10, 100)
    assert rates[9:80] == [1.0] * 71
    assert rates[80:] == pytest.approx([(101 - n) / 21 for n in range(81, 101)])
