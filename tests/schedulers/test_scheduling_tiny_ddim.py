import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler

from tiny_diffusers import TinyDDIMScheduler, TinyDDPMScheduler


SCHEDULES = ["linear", "cosine", "sigmoid", "quadratic"]
PREDICTION_TYPES = ["epsilon", "sample", "v_prediction"]


def random_step(channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 2, channels, 8, 8, generator=generator, dtype=torch.float64).unbind()  # output, x_t


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("t", "prev"), [(1, 0), (2, 1), (2, 0), (500, 499), (500, 321), (999, 998), (999, 0)])
def test_one_step_matches_the_paper(schedule, eta, t, prev, chain):
    """Song et al. 2021, equations 12 and 16."""
    scheduler = TinyDDIMScheduler(beta_schedule=schedule, clip_sample=False)
    scheduler.set_timesteps(timesteps=[t, prev])
    epsilon, x_t = random_step()
    now, before = chain(scheduler).alpha_bar[t], chain(scheduler).alpha_bar[prev]
    sigma = eta * ((1 - before) / (1 - now)).sqrt() * (1 - now / before).sqrt()
    x_0 = (x_t - (1 - now).sqrt() * epsilon) / now.sqrt()
    noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(1), dtype=x_t.dtype)
    expected = before.sqrt() * x_0 + (1 - before - sigma**2).sqrt() * epsilon + sigma * noise

    step = scheduler.step(epsilon, t, x_t, eta=eta, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(step.prev_sample, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(step.pred_original_sample, x_0, rtol=1e-4, atol=1e-5)
    given = scheduler.step(epsilon, t, x_t, eta=eta, variance_noise=noise).prev_sample
    torch.testing.assert_close(given, step.prev_sample)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("use_clipped_model_output", [False, True])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_sampling_equals_stock_to_the_bit_where_stock_is_right(
    eta, use_clipped_model_output, prediction_type, set_alpha_to_one
):
    """Stock's t - T // N is right for `leading` with a number of steps that divides T."""
    options = {"prediction_type": prediction_type, "set_alpha_to_one": set_alpha_to_one, "num_train_timesteps": 100}
    finals = []
    for scheduler in (TinyDDIMScheduler(**options), DDIMScheduler(**options)):
        generator = torch.Generator().manual_seed(0)
        scheduler.set_timesteps(20)
        x_t = torch.randn(2, 3, 8, 8, generator=generator)
        for t in scheduler.timesteps:
            output = torch.tanh(x_t) * (t + 1) / 100
            x_t = scheduler.step(output, t, x_t, eta, use_clipped_model_output, generator).prev_sample
        finals.append(x_t)
    assert torch.equal(*finals)


def test_eta_1_is_ddpm_with_the_smallest_variance():
    epsilon, x_t = random_step()
    ddim, ddpm = TinyDDIMScheduler(clip_sample=False), TinyDDPMScheduler(clip_sample=False)
    for scheduler in (ddim, ddpm):
        scheduler.set_timesteps(timesteps=[900, 555, 7])
    for t in (900, 555, 7):
        one = ddim.step(epsilon, t, x_t, eta=1.0, generator=torch.Generator().manual_seed(1)).prev_sample
        other = ddpm.step(epsilon, t, x_t, generator=torch.Generator().manual_seed(1)).prev_sample
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def sampling_error(N, spacing, data):
    """Computes the error against the flow that DDIM discretizes, which is an affine map between Gaussians."""
    scheduler = TinyDDIMScheduler(timestep_spacing=spacing, clip_sample=False)
    scheduler.set_timesteps(N)
    x_t = torch.linspace(-2, 2, 64, dtype=torch.float64).reshape(1, 1, 8, 8)
    alpha_bar = scheduler.alphas_cumprod[scheduler.timesteps[0]].item()
    start_std = math.sqrt(alpha_bar * data.std**2 + 1 - alpha_bar)
    exact = data.mean + data.std * (x_t - alpha_bar**0.5 * data.mean) / start_std
    for t in scheduler.timesteps:
        output = data.predict(x_t, scheduler.alphas_cumprod[t].item(), "epsilon")
        x_t = scheduler.step(output, t, x_t).prev_sample
    return (x_t - exact).abs().max().item()


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_the_error_is_of_first_order_in_the_steps(spacing, gaussian):
    data = gaussian(mean=0.2, std=0.5)
    steps = [17, 34, 68, 136]  # none divides T
    errors = [sampling_error(N, spacing, data) for N in steps]
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert all(0.8 < order < 1.25 for order in orders), orders
    assert sampling_error(1000, spacing, data) < 0.01


def test_steps_are_deterministic_only_without_noise(gaussian):
    """Equal latents give equal images with eta = 0, but not with eta > 0."""
    scheduler = TinyDDIMScheduler()
    scheduler.set_timesteps(10)
    epsilon, x_t = random_step()
    assert torch.equal(scheduler.step(epsilon, 500, x_t).prev_sample, scheduler.step(epsilon, 500, x_t).prev_sample)
    noisy = [scheduler.step(epsilon, 500, x_t, eta=0.5).prev_sample for _ in range(2)]
    assert not torch.equal(*noisy)


def test_a_predicted_variance_is_dropped():
    epsilon, x_t = random_step()
    learned, fixed = TinyDDIMScheduler(variance_type="learned_range"), TinyDDIMScheduler()
    for scheduler in (learned, fixed):
        scheduler.set_timesteps(10)
    output = torch.cat([epsilon, torch.randn_like(epsilon)], dim=1)
    assert torch.equal(learned.step(output, 500, x_t).prev_sample, fixed.step(epsilon, 500, x_t).prev_sample)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_eta_outside_its_range_is_refused(eta):
    scheduler = TinyDDIMScheduler()
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="eta"):
        scheduler.step(torch.zeros(1, 3, 8, 8), 500, torch.zeros(1, 3, 8, 8), eta=eta)


def test_two_sources_of_noise_and_a_step_before_set_timesteps_are_refused():
    scheduler, zeros = TinyDDIMScheduler(), torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(zeros, 500, zeros)
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="not both"):
        scheduler.step(zeros, 500, zeros, eta=1.0, generator=torch.Generator(), variance_noise=zeros)
