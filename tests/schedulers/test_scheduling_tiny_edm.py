import diffusers
import pytest
import torch
from diffusers import EDMEulerScheduler

from tiny_diffusers import TinyEDMScheduler


def test_preconditioning_and_loss_are_table_1():
    generator = torch.Generator().manual_seed(0)
    x_0, noise, output = torch.randn(3, 4, 1, 4, 4, generator=generator).double()
    sigma = torch.tensor([0.01, 0.3, 1.0, 20.0]).double()
    t, scheduler = sigma.log() / 4, TinyEDMScheduler(sigma_data=0.6)
    s = sigma.view(-1, 1, 1, 1)
    x = scheduler.add_noise(x_0, noise, t)
    torch.testing.assert_close(x, x_0 + s * noise, atol=1e-4, rtol=1e-5)
    total = (s**2 + 0.36) ** 0.5
    torch.testing.assert_close(scheduler.scale_model_input(x, t), x / total, atol=1e-4, rtol=1e-5)
    denoised = 0.36 / total**2 * x + 0.6 * s / total * output
    weight = (s**2 + 0.36) / (0.6 * s) ** 2
    expected = (weight * (denoised - x_0).square()).mean(dim=(1, 2, 3))
    found = scheduler.training_loss(output, x_0, noise, t, reduction="none")
    torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=1e-3)
    scheduler.set_timesteps(timesteps=[t[2].item()])
    x_1 = scheduler.step(output[2:3], t[2], x[2:3]).pred_original_sample
    torch.testing.assert_close(x_1, denoised[2:3], atol=1e-4, rtol=0)


def test_noise_levels_are_log_normal():
    grid = (torch.arange(10_000) + 0.5) / 10_000
    draws = torch.stack([grid, grid], dim=1)
    for config in ({}, {"p_mean": -0.4, "p_std": 1.0}):
        scheduler = TinyEDMScheduler(**config)
        log_sigma = 4 * scheduler.sample_timesteps(draws)
        assert log_sigma.mean() == pytest.approx(config.get("p_mean", -1.2), abs=1e-3)
        assert log_sigma.std() == pytest.approx(config.get("p_std", 1.2), abs=1e-3)
    assert scheduler.sample_timesteps(torch.zeros(1, 2)).isfinite().all()


@pytest.mark.parametrize(
    "config", [{}, {"prediction_type": "v_prediction", "sigma_data": 1.0}, {"sigma_schedule": "exponential"}]
)
def test_euler_is_the_stock_classes(config):
    ours, stock = TinyEDMScheduler(**config), EDMEulerScheduler(**config)
    ours.set_timesteps(7)
    stock.set_timesteps(7)
    torch.testing.assert_close(ours.sigmas, stock.sigmas)
    torch.testing.assert_close(ours.timesteps, stock.timesteps)
    assert ours.init_noise_sigma == pytest.approx(stock.init_noise_sigma)
    generator = torch.Generator().manual_seed(0)
    x = y = torch.randn(2, 1, 4, 4, generator=generator) * stock.init_noise_sigma
    for t, stock_t in zip(ours.timesteps, stock.timesteps, strict=True):
        inputs = ours.scale_model_input(x, t), stock.scale_model_input(y, stock_t)
        torch.testing.assert_close(*inputs, atol=1e-5, rtol=1e-4)
        output = torch.randn(x.shape, generator=generator)
        x, y = ours.step(output, t, x), stock.step(output, stock_t, y)
        torch.testing.assert_close(x.pred_original_sample, y.pred_original_sample, atol=1e-4, rtol=1e-4)
        x, y = x.prev_sample, y.prev_sample
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


def test_a_single_step_starts_at_the_noise():
    for sigma_schedule in ("karras", "exponential"):
        scheduler = TinyEDMScheduler(sigma_schedule=sigma_schedule)
        scheduler.set_timesteps(1)
        torch.testing.assert_close(scheduler.sigmas, torch.tensor([80.0, 0.0]))


def test_heun_is_algorithm_1(gaussian_flow):
    scheduler = TinyEDMScheduler(solver="heun")
    network = gaussian_flow(scheduler, torch.zeros(4), 0.1 * torch.eye(4))
    scheduler.set_timesteps(6)
    x = y = 80 * torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t).sample, t, x).prev_sample

    def slope(y, sigma):
        return (y - 0.1 / (0.1 + sigma**2) * y) / sigma

    sigmas = scheduler.sigmas
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        d = slope(y, sigma)
        euler = y + (sigma_next - sigma) * d
        y = euler if sigma_next == 0 else y + (sigma_next - sigma) * (d + slope(euler, sigma_next)) / 2
    torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


def test_stock_solvers_read_the_config_and_sample_the_gaussian(gaussian_flow, tmp_path):
    scheduler = TinyEDMScheduler(sigma_data=0.7)
    scheduler.save_pretrained(tmp_path)
    cls = diffusers.EDMDPMSolverMultistepScheduler
    mean, cov = torch.tensor([0.3, -0.2]), torch.tensor([[0.09, 0.05], [0.05, 0.06]])
    network = gaussian_flow(scheduler, mean, cov)
    found = []
    for solver in (cls.from_config(scheduler.config), cls.from_pretrained(tmp_path)):
        solver.set_timesteps(30)
        x = solver.init_noise_sigma * torch.randn(4000, 1, 1, 2, generator=torch.Generator().manual_seed(0))
        for t in solver.timesteps:
            x = solver.step(network(solver.scale_model_input(x, t), t).sample, t, x).prev_sample
        found.append(x)
    assert torch.equal(*found)
    torch.testing.assert_close(x.flatten(1).mean(dim=0), mean, atol=0.02, rtol=0)
    torch.testing.assert_close(torch.cov(x.flatten(1).T), cov, atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sigma_schedule": "karas"}, "Did you mean 'karras'"),
        ({"prediction_type": "sample"}, "Unknown prediction_type 'sample'"),
        ({"sigma_min": 0.0}, "sigma_min must be above 0"),
        ({"sigma_max": 0.001}, "below sigma_max"),
        ({"sigma_data": 0.0}, "sigma_data must be above 0"),
        ({"p_std": -1.0}, "p_std must be above 0"),
    ],
)
def test_a_wrong_config_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        TinyEDMScheduler(**config)
