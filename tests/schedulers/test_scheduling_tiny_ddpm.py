import pytest
import torch
from diffusers import DDPMScheduler

from tiny_diffusers import TinyDDPMScheduler


SCHEDULES = ["linear", "cosine", "sigmoid", "quadratic"]
PREDICTION_TYPES = ["epsilon", "sample", "v_prediction"]


def random_step(channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 2, channels, 8, 8, generator=generator, dtype=torch.float64).unbind()  # output, x_t


def noise_of(x_t, seed):
    return torch.randn(x_t.shape, generator=torch.Generator().manual_seed(seed), dtype=x_t.dtype)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "fixed_large_log"])
@pytest.mark.parametrize("t", [1, 2, 500, 999])
def test_one_step_matches_the_paper(schedule, variance_type, t, chain):
    """Ho et al. 2020, equation 11 (epsilon), with sigma^2 = tilde beta or beta."""
    scheduler = TinyDDPMScheduler(beta_schedule=schedule, variance_type=variance_type, clip_sample=False)
    epsilon, x_t = random_step()
    c = chain(scheduler)
    mean = (x_t - c.beta[t] / (1 - c.alpha_bar[t]).sqrt() * epsilon) / (1 - c.beta[t]).sqrt()
    variance = c.posterior_variance[t] if variance_type == "fixed_small" else c.beta[t]
    expected = mean + variance.sqrt() * noise_of(x_t, seed=1)

    step = scheduler.step(epsilon, t, x_t, generator=torch.Generator().manual_seed(1))
    # Stock's float32 has an error of up to 2e-4 at the first timesteps.
    torch.testing.assert_close(step.prev_sample, expected, rtol=1e-4, atol=5e-4 if t < 10 else 1e-5)
    x_0 = (x_t - (1 - c.alpha_bar[t]).sqrt() * epsilon) / c.alpha_bar[t].sqrt()
    torch.testing.assert_close(step.pred_original_sample, x_0, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("t", [1, 2, 500, 999])
def test_posterior_variance_is_tilde_beta(schedule, t, chain):
    scheduler = TinyDDPMScheduler(beta_schedule=schedule)
    expected = chain(scheduler).posterior_variance[t]
    torch.testing.assert_close(scheduler._get_variance(t).double(), expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_all_prediction_types_take_the_same_step(prediction_type, gaussian):
    """The three predictions of the ideal network are equivalent."""
    data, (_, x_t) = gaussian(mean=0.1, std=0.5), random_step()
    results = []
    for kind in ("epsilon", prediction_type):
        scheduler = TinyDDPMScheduler(prediction_type=kind)
        output = data.predict(x_t, scheduler.alphas_cumprod[300].double(), kind)
        results.append(scheduler.step(output, 300, x_t, generator=torch.Generator().manual_seed(1)).prev_sample)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_sampling_equals_stock_to_the_bit_where_stock_is_right(prediction_type, variance_type):
    """`leading` ends at timestep 0, so stock adds no noise at its last step either."""
    options = {"prediction_type": prediction_type, "variance_type": variance_type, "num_train_timesteps": 100}
    finals = []
    for scheduler in (TinyDDPMScheduler(**options), DDPMScheduler(**options)):
        generator = torch.Generator().manual_seed(0)
        scheduler.set_timesteps(20)
        x_t = torch.randn(2, 3, 8, 8, generator=generator)
        for t in scheduler.timesteps:
            output = torch.tanh(x_t) * (t + 1) / 100
            if variance_type == "learned_range":
                output = torch.cat([output, torch.cos(x_t)], dim=1)
            x_t = scheduler.step(output, t, x_t, generator=generator).prev_sample
        finals.append(x_t)
    assert torch.equal(*finals)


@pytest.mark.parametrize("v", [-1.0, -0.3, 0.4, 1.0])
def test_a_learned_variance_lies_between_tilde_beta_and_beta(v, chain):
    """Nichol & Dhariwal 2021, equation 15, with v in [-1, 1] for their [0, 1]."""
    scheduler = TinyDDPMScheduler(variance_type="learned_range")
    (epsilon, x_t), c, t = random_step(), chain(scheduler), 200
    output = torch.cat([epsilon, torch.full_like(epsilon, v)], dim=1)
    share = (v + 1) / 2
    variance = torch.exp(share * c.beta[t].log() + (1 - share) * c.posterior_variance[t].log())

    with_noise = scheduler.step(output, t, x_t, generator=torch.Generator().manual_seed(1)).prev_sample
    fixed = TinyDDPMScheduler().step(epsilon, t, x_t, generator=torch.Generator().manual_seed(1)).prev_sample
    expected = fixed + (variance.sqrt() - c.posterior_variance[t].sqrt()) * noise_of(x_t, seed=1)
    torch.testing.assert_close(with_noise, expected, rtol=1e-4, atol=1e-4)


def test_a_learned_variance_needs_twice_the_channels():
    epsilon, x_t = random_step()
    with pytest.raises(ValueError, match="twice the channels"):
        TinyDDPMScheduler(variance_type="learned_range").step(epsilon, 200, x_t)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("N", [1, 3, 7])
def test_the_last_step_adds_no_noise(variance_type, spacing, N):
    scheduler = TinyDDPMScheduler(num_train_timesteps=10, variance_type=variance_type, timestep_spacing=spacing)
    scheduler.set_timesteps(N)
    epsilon, x_t = random_step()
    step = scheduler.step(epsilon, scheduler.timesteps[-1], x_t)
    torch.testing.assert_close(step.prev_sample, step.pred_original_sample)


def sampled(scheduler, data, chain, pixels=16384):
    """Samples with the ideal mean. Also returns the samples' expected mean and variance, from a chain of Gaussians."""
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(1, 1, 128, pixels // 128, generator=generator)
    mean, variance, timesteps = 0.0, 1.0, scheduler.timesteps.tolist()
    alpha_bars = [*chain(scheduler).alpha_bar.tolist(), 1.0]  # index -1 is the image
    for t, prev in zip(timesteps, [*timesteps[1:], -1], strict=True):
        alpha_bar, alpha_bar_prev = alpha_bars[t], alpha_bars[prev]
        beta = 1 - alpha_bar / alpha_bar_prev
        tilde_beta = (1 - alpha_bar_prev) / (1 - alpha_bar) * beta
        slope, offset = linear_step(data, alpha_bar, alpha_bar_prev, beta)
        noise = 0.0 if prev < 0 else {"fixed_small": tilde_beta, "fixed_large": beta}[scheduler.config.variance_type]
        mean, variance = slope * mean + offset, slope**2 * variance + noise

        output = data.predict(x_t, alpha_bar, "epsilon")
        x_t = scheduler.step(output, t, x_t, generator=generator).prev_sample
    return x_t, mean, variance


def linear_step(data, alpha_bar, alpha_bar_prev, beta):
    """Returns slope and offset of the ideal network's reverse mean, slope * x_t + offset."""

    def mean(x_t):
        x_0, _ = data.posterior_of_original(x_t, alpha_bar)
        alpha = alpha_bar / alpha_bar_prev
        return (alpha_bar_prev**0.5 * beta * x_0 + alpha**0.5 * (1 - alpha_bar_prev) * x_t) / (1 - alpha_bar)

    return mean(1.0) - mean(0.0), mean(0.0)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize(("spacing", "N"), [("leading", 15), ("trailing", 15), ("linspace", 33), ("leading", 200)])
def test_samples_have_the_analytic_mean_and_variance_in_any_number_of_steps(
    variance_type, spacing, N, gaussian, chain
):
    options = {"num_train_timesteps": 200, "beta_start": 5e-4, "beta_end": 0.1, "clip_sample": False}
    scheduler = TinyDDPMScheduler(variance_type=variance_type, timestep_spacing=spacing, **options)
    scheduler.set_timesteps(N)
    x_0, mean, variance = sampled(scheduler, gaussian(mean=0.3, std=0.5), chain)
    # four standard errors over 16384 pixels
    assert x_0.mean().item() == pytest.approx(mean, abs=4 * variance**0.5 / 128)
    assert x_0.var().item() == pytest.approx(variance, rel=4 * 2**0.5 / 128)


def test_beta_is_the_ideal_variance_on_standard_normal_data(gaussian, chain):
    scheduler = TinyDDPMScheduler(num_train_timesteps=200, variance_type="fixed_large", clip_sample=False)
    scheduler.set_timesteps(200)
    x_0, _, _ = sampled(scheduler, gaussian(mean=0.0, std=1.0), chain)
    assert x_0.mean().item() == pytest.approx(0, abs=4 / 128)
    assert x_0.var().item() == pytest.approx(1, rel=4 * 2**0.5 / 128)


def test_the_ideal_learned_variance_reproduces_the_data(gaussian):
    scheduler = TinyDDPMScheduler(variance_type="learned_range", clip_sample=False)
    data = gaussian(mean=0.3, std=0.5)
    network = data.network(scheduler)
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(1, 1, 128, 128, generator=generator)
    for t in scheduler.timesteps:
        x_t = scheduler.step(network(x_t, t).sample, t, x_t, generator=generator).prev_sample
    assert x_t.mean().item() == pytest.approx(0.3, abs=4 * 0.5 / 128)
    assert x_t.var().item() == pytest.approx(0.25, rel=4 * 2**0.5 / 128)
