"""Every draw is a function of (seed, step, index of the image), whoever draws it."""

import torch

from tiny_diffusers.training.draws import DataOrder, Draws


def test_two_processes_draw_what_one_draws():
    whole = Draws(0, 5, range(0, 100))
    parts = [Draws(0, 5, range(0, 50)), Draws(0, 5, range(50, 100))]
    for draw in (
        lambda d: d.normal("noise", 3, 4, 4),
        lambda d: d.uniform("flip"),
        lambda d: d.integers("timesteps", 1000),
    ):
        assert torch.equal(draw(whole), torch.cat([draw(part) for part in parts]))


def test_rows_that_do_not_meet_the_blocks_borders():
    whole = Draws(0, 5, range(0, 200)).normal("noise", 2)
    assert torch.equal(Draws(0, 5, range(37, 141)).normal("noise", 2), whole[37:141])


def test_seed_step_and_purpose_each_change_the_draw():
    reference = Draws(0, 1, range(8)).normal("noise", 4)
    for other in (Draws(1, 1, range(8)).normal("noise", 4), Draws(0, 2, range(8)).normal("noise", 4)):
        assert not torch.equal(reference, other)
    assert not torch.equal(reference, Draws(0, 1, range(8)).normal("other", 4))


def test_moments():
    draws = Draws(3, 0, range(4096))
    normal = draws.normal("noise", 64)
    assert abs(normal.mean()) < 0.01 and abs(normal.var() - 1) < 0.01
    timesteps = draws.integers("timesteps", 10)
    assert set(timesteps.tolist()) == set(range(10))
    assert torch.bincount(timesteps).float().div(4096).sub(0.1).abs().max() < 0.025
    # images of one step are independent of each other, also across blocks
    assert torch.corrcoef(normal[:256]).triu(1).abs().max() < 0.7


def test_each_epoch_sees_every_image_once_whatever_the_batch_size():
    order = DataOrder(0, 10)
    stream = torch.cat([order(range(start, start + 4)) for start in range(0, 40, 4)])
    for epoch in stream.view(4, 10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert not torch.equal(stream[:10], stream[10:20])


def test_order_does_not_depend_on_where_it_is_asked_from():
    assert torch.equal(DataOrder(0, 7)(range(3, 40)), DataOrder(0, 7)(range(0, 40))[3:])


def test_batch_larger_than_the_data():
    assert DataOrder(0, 3)(range(0, 64)).shape == (64,)
