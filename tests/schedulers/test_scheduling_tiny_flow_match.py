import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

from tiny_diffusers import TinyFlowMatchScheduler


def noised(batch=3):
    generator = torch.Generator().manual_seed(0)
    x_0, noise, output = torch.randn(3, batch, 1, 4, 4, generator=generator)
    return x_0, noise, output, 1000 * torch.rand(batch, generator=generator)


def test_noising_loss_and_x_0_are_the_papers():
    x_0, noise, output, t = noised()
    scheduler = TinyFlowMatchScheduler()
    s = (t / 1000).view(-1, 1, 1, 1)
    x_t = scheduler.add_noise(x_0, noise, t)
    torch.testing.assert_close(x_t, (1 - s) * x_0 + s * noise)
    torch.testing.assert_close(scheduler.scale_model_input(x_t, t), x_t)
    expected = (output - (noise - x_0)).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(scheduler.training_loss(output, x_0, noise, t, reduction="none"), expected)
    torch.testing.assert_close(scheduler.training_loss(output, x_0, noise, t), expected.mean())
    torch.testing.assert_close(scheduler.training_loss(output, x_0, noise, t, reduction="sum"), expected.sum())
    assert scheduler.training_loss(noise - x_0, x_0, noise, t) == 0
    scheduler.set_timesteps(timesteps=[400.0])
    found = scheduler.step(noise - x_0, 400.0, 0.6 * x_0 + 0.4 * noise)
    torch.testing.assert_close(found.pred_original_sample, x_0, atol=1e-5, rtol=0)


def test_steps_end_evenly_at_the_image():
    scheduler = TinyFlowMatchScheduler()
    scheduler.set_timesteps(4)
    torch.testing.assert_close(scheduler.timesteps, torch.tensor([1000.0, 750.0, 500.0, 250.0]))
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([1, 0.75, 0.5, 0.25, 0]))
    assert scheduler.init_noise_sigma == 1
    scheduler = TinyFlowMatchScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    torch.testing.assert_close(scheduler.sigmas[1], torch.tensor(3 * 0.75 / (1 + 2 * 0.75)))


@pytest.mark.parametrize(
    ("solver", "stock", "options"),
    [
        ("euler", FlowMatchEulerDiscreteScheduler, {}),
        ("euler", FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}),
        ("heun", FlowMatchHeunDiscreteScheduler, {}),
    ],
)
def test_steps_are_the_stock_classes_at_equal_noise_levels(solver, stock, options):
    stock, ours = stock(**options), TinyFlowMatchScheduler(solver=solver, **options)
    stock.set_timesteps(6)
    ours.set_timesteps(timesteps=stock.timesteps.unique().flip(0).tolist())
    assert torch.equal(ours.timesteps, stock.timesteps)
    generator = torch.Generator().manual_seed(0)
    x = y = torch.randn(2, 1, 4, 4, generator=generator)
    for t in stock.timesteps:
        output = torch.randn(x.shape, generator=generator)
        torch.manual_seed(0)
        x = ours.step(output, t, x).prev_sample
        torch.manual_seed(0)
        y = stock.step(output, t, y).prev_sample
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)


def test_timesteps_follow_their_distribution():
    grid = (torch.arange(10_000) + 0.5) / 10_000
    draws = torch.stack([grid, grid[torch.randperm(10_000, generator=torch.Generator().manual_seed(0))]], dim=1)
    uniform = TinyFlowMatchScheduler(timestep_distribution="uniform").sample_timesteps(draws)
    torch.testing.assert_close(uniform, 1000 * grid)
    logits = torch.distributions.Normal(0.5, 0.8).icdf(grid)
    options = {"timestep_distribution": "logit_normal", "logit_mean": 0.5, "logit_std": 0.8}
    logit_normal = TinyFlowMatchScheduler(**options).sample_timesteps(draws)
    torch.testing.assert_close(logit_normal, 1000 * logits.sigmoid(), atol=0.1, rtol=0)
    mixed = TinyFlowMatchScheduler(**options | {"timestep_distribution": "mixed"}).sample_timesteps(draws)
    is_uniform = mixed == uniform
    assert is_uniform.float().mean() == pytest.approx(0.3, abs=1e-3) and TinyFlowMatchScheduler().config[
        "timestep_distribution"
    ] == ("mixed")
    assert torch.equal(mixed[~is_uniform], logit_normal[~is_uniform])
    ends = TinyFlowMatchScheduler().sample_timesteps(torch.tensor([[0.0, 0.0], [1 - 2**-24, 0.0], [0.0, 0.9]]))
    assert ends.isfinite().all() and (ends >= 0).all() and (ends <= 1000).all()


@pytest.mark.parametrize(
    "name",
    ["DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep", "FlowMatchHeunDiscrete"],
)
def test_stock_solvers_read_the_config_and_sample_the_gaussian(gaussian_flow, tmp_path, name):
    scheduler = TinyFlowMatchScheduler()
    scheduler.save_pretrained(tmp_path)
    cls = getattr(diffusers, f"{name}Scheduler")
    mean, cov = torch.tensor([0.3, -0.2]), torch.tensor([[0.09, 0.05], [0.05, 0.06]])
    network = gaussian_flow(scheduler, mean, cov)
    found = []
    for solver in (cls.from_config(scheduler.config), cls.from_pretrained(tmp_path)):
        solver.set_timesteps(30)
        x = torch.randn(4000, 1, 1, 2, generator=torch.Generator().manual_seed(0))
        for t in solver.timesteps:
            x = solver.step(network(x, t).sample, t, x).prev_sample
        found.append(x)
    assert torch.equal(*found)
    torch.testing.assert_close(x.flatten(1).mean(dim=0), mean, atol=0.02, rtol=0)
    torch.testing.assert_close(torch.cov(x.flatten(1).T), cov, atol=0.01, rtol=0)


def test_a_config_survives_saving_and_other_solvers(tmp_path):
    config = {"timestep_distribution": "uniform", "shift": 2.0, "solver": "heun", "clip_sample": True}
    scheduler = TinyFlowMatchScheduler(**config)
    scheduler.save_pretrained(tmp_path)
    loaded = TinyFlowMatchScheduler.from_pretrained(tmp_path)
    solver = diffusers.UniPCMultistepScheduler.from_config(scheduler.config)
    assert solver.config.flow_shift == 2 and solver.config.use_flow_sigmas
    for again in (loaded, TinyFlowMatchScheduler.from_config(solver.config)):
        assert {name: again.config[name] for name in config} == config
    assert TinyFlowMatchScheduler.from_config(scheduler.config, shift=3.0).config.flow_shift == 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"timestep_distribution": "logitnormal"}, "Did you mean 'logit_normal'"),
        ({"logit_std": 0.0}, "logit_std must be above 0"),
        ({"shift": 0.0}, "shift above 0"),
    ],
)
def test_a_wrong_config_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        TinyFlowMatchScheduler(**config)
