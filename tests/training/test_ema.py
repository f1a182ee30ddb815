"""The average follows theta_ema <- d theta_ema + (1 - d) theta, with diffusers' warm-up of d."""

import pytest
import torch
from torch import nn

from tiny_diffusers.training.ema import EMA


def test_recurrence():
    module = nn.Linear(3, 2)
    ema = EMA(module)
    expected = module.weight.detach().clone()
    for step in range(1, 6):
        nn.init.normal_(module.weight)
        ema.update(module, step)
        decay = ema.decay(step)
        expected = decay * expected + (1 - decay) * module.weight.detach()
    torch.testing.assert_close(ema.module.weight, expected)


@pytest.mark.parametrize("step", [1, 2, 10, 1000, 10**7])
def test_decay_is_that_of_diffusers(step):
    from diffusers.training_utils import EMAModel

    theirs = EMAModel([nn.Parameter(torch.zeros(1))], decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    assert EMA(nn.Linear(1, 1)).decay(step) == pytest.approx(theirs.get_decay(step), abs=1e-12)


def test_it_is_a_copy_until_it_starts():
    module = nn.Linear(3, 2)
    ema = EMA(module, start_step=3, power=0.0, max_decay=0.9)
    for step in range(1, 5):
        nn.init.normal_(module.weight)
        ema.update(module, step)
        assert torch.equal(ema.module.weight, module.weight)
    before = ema.module.weight.clone()
    nn.init.normal_(module.weight)
    ema.update(module, 5)
    torch.testing.assert_close(ema.module.weight, 0.9 * before + 0.1 * module.weight)


def test_the_statistics_of_a_batch_norm_are_averaged_and_its_counter_copied():
    module = nn.BatchNorm2d(2)
    ema = EMA(module, power=0.0, max_decay=0.9)
    for step in (1, 2):  # the first update copies
        before = ema.module.running_mean.clone()
        module(torch.randn(4, 2, 3, 3))
        ema.update(module, step)
    torch.testing.assert_close(ema.module.running_mean, 0.9 * before + 0.1 * module.running_mean)
    assert ema.module.num_batches_tracked == 2


def test_what_is_constant_stays_to_the_bit():
    module = nn.Linear(2, 2)
    module.register_buffer("frequencies", torch.rand(50))
    module.register_buffer("mask", torch.tensor([True, False]))
    ema = EMA(module)
    for step in range(1, 20):
        ema.update(module, step)
    assert torch.equal(ema.module.frequencies, module.frequencies) and torch.equal(ema.module.mask, module.mask)


def test_the_average_is_not_trained():
    assert not any(p.requires_grad for p in EMA(nn.Linear(1, 1)).module.parameters())
