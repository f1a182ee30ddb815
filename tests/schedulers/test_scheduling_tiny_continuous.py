"""What rectified flow and EDM share: solvers, fresh noise and the likelihood, on Gaussian data."""

import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from tiny_diffusers import TinyEDMScheduler, TinyFlowMatchScheduler, TinyPipeline
from tiny_diffusers.schedulers.scheduling_tiny_continuous import DEQUANTIZATION_STD


SCHEDULERS = [TinyFlowMatchScheduler, TinyEDMScheduler]
# images of 1x1x2 pixels
MEAN, COV = torch.tensor([0.3, -0.2]), torch.tensor([[0.09, 0.05], [0.05, 0.06]])


def sample(scheduler, network, num_images, steps, eta=0.0, shape=(1, 1, 2)):
    generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(steps)
    x = torch.randn(num_images, *shape, generator=generator) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t), t).sample
        x = scheduler.step(output, t, x, eta=eta, generator=generator).prev_sample
    return x


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
@pytest.mark.parametrize(("solver", "steps"), [("euler", 200), ("multistep", 60), ("heun", 30)])
@pytest.mark.parametrize("eta", [0.0, 1.0, 1.5])
def test_an_ideal_network_gives_mean_and_covariance_back(gaussian_flow, scheduler_class, solver, steps, eta):
    scheduler = scheduler_class(solver=solver)
    steps = 150 if solver == "heun" and eta else 2 * steps if eta > 1 else steps
    x = sample(scheduler, gaussian_flow(scheduler, MEAN, COV), 10_000, steps, eta).flatten(1)
    torch.testing.assert_close(x.mean(dim=0), MEAN, atol=0.02, rtol=0)
    torch.testing.assert_close(torch.cov(x.T), COV, atol=0.008, rtol=0)


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_heun_is_of_second_order_and_euler_of_first_and_multistep_better(gaussian_flow, scheduler_class):
    errors = {}
    for solver, counts in {"euler": (40, 80), "multistep": (40, 80), "heun": (20, 40)}.items():
        scheduler = scheduler_class(solver=solver)
        network = gaussian_flow(scheduler, MEAN, COV)
        fine = sample(scheduler_class(solver="heun"), network, 100, 300)
        errors[solver] = [(sample(scheduler, network, 100, n) - fine).abs().mean() for n in counts]
    assert 1.7 < errors["euler"][0] / errors["euler"][1] < 2.3
    assert errors["heun"][0] / errors["heun"][1] > 3
    assert errors["heun"][1] < errors["euler"][1]
    for euler, multistep in zip(errors["euler"], errors["multistep"], strict=True):
        assert multistep < 0.7 * euler


@pytest.mark.parametrize(("eta", "algorithm"), [(0.0, "dpmsolver++"), (1.0, "sde-dpmsolver++")])
def test_multistep_is_diffusers_dpm_solver(gaussian_flow, eta, algorithm):
    scheduler = TinyFlowMatchScheduler(solver="multistep")
    network = gaussian_flow(scheduler, MEAN, COV)
    found = sample(scheduler, network, 50, 8, eta)
    stock = DPMSolverMultistepScheduler.from_config(scheduler.config, algorithm_type=algorithm)
    stock.set_timesteps(8)
    stock.sigmas, stock.timesteps = scheduler.sigmas, scheduler.timesteps  # its own begin at 0.999
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 1, 1, 2, generator=generator)
    for t in stock.timesteps:
        x = stock.step(network(x, t).sample, t, x, generator=generator).prev_sample
    torch.testing.assert_close(found, x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
@pytest.mark.parametrize(("side", "probes"), [(2, 2), (20, 8)], ids=["exact", "hutchinson"])
def test_the_likelihood_of_a_gaussian_is_right_to_a_hundredth_of_a_bit(gaussian_flow, scheduler_class, side, probes):
    generator = torch.Generator().manual_seed(0)
    size = side**2
    # neighbors correlate, and the Jacobian isn't diagonal
    distance = (torch.arange(size)[:, None] - torch.arange(size)).abs()
    cov = 0.04 * 0.5 ** distance.double()
    normal = torch.distributions.MultivariateNormal(torch.full((size,), 0.1, dtype=torch.float64), cov)
    torch.manual_seed(0)
    images = normal.sample((8,)).reshape(8, 1, side, side)
    images = ((images + 1) * 127.5).round() / 127.5 - 1
    scheduler = scheduler_class()
    found = scheduler.ode_likelihood(
        gaussian_flow(scheduler, normal.mean, cov), images, generator=generator, num_probes=probes
    )
    # the density hardly changes within a gray level
    exact = -normal.log_prob(images.flatten(1)) / size / math.log(2) - math.log2(2 / 255)
    error = found.standard_error.square().mean().sqrt() / len(images) ** 0.5
    assert (error == 0) == (side == 2)
    assert abs(found.total.mean() - exact.mean()) < 0.01 + 3 * error and error < 0.02


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_the_likelihood_of_nearly_constant_pixels_is_right(gaussian_flow, scheduler_class):
    """As of MNIST's border: their density is narrower than sampling's last noise levels leave it."""
    scheduler, std = scheduler_class(), 0.01
    width = math.hypot(std, DEQUANTIZATION_STD)  # of the density that is evaluated
    images = torch.full((16, 1, 2, 2), 1 / 255)
    found = scheduler.ode_likelihood(
        gaussian_flow(scheduler, torch.zeros(4), std**2 * torch.eye(4)),
        images,
        generator=torch.Generator().manual_seed(0),
        num_steps=50,
    )
    normal = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    dequantized = images + (torch.special.ndtr(normal) - 0.5) * 2 / 255
    nats = 0.5 * (dequantized / width).square() + math.log(width * math.sqrt(2 * math.pi)) - math.log(2 / 255)
    assert abs(found.total.mean() - nats.mean() / math.log(2)) < 0.01


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_the_likelihood_of_an_image_that_the_network_knows_exactly(gaussian_flow, scheduler_class):
    """As of MNIST's border, which is black: a network has learned that the gray levels between are noise."""
    scheduler, images = scheduler_class(), torch.full((200, 1, 2, 2), -1.0)
    network = gaussian_flow(scheduler, torch.full((4,), -1.0), torch.zeros(4, 4))
    found = scheduler.ode_likelihood(network, images, generator=torch.Generator().manual_seed(0)).total.mean()
    # the cross-entropy of a uniform distribution and the Gaussian of its mean and variance, less the uniform's entropy
    expected = (0.5 + math.log(math.sqrt(2 * math.pi / 12))) / math.log(2)
    assert abs(found - expected) < 0.03


def test_the_likelihood_of_an_image_does_not_depend_on_its_batch(gaussian_flow):
    scheduler = TinyFlowMatchScheduler()
    network = gaussian_flow(scheduler, torch.zeros(400), 0.1 * torch.eye(400) + 0.01)
    images = torch.zeros(2, 1, 20, 20)

    def likelihood(images, seeds):
        generator = [torch.Generator().manual_seed(seed) for seed in seeds]
        return scheduler.ode_likelihood(network, images, generator=generator, num_steps=3).total

    both = likelihood(images, [0, 1])
    torch.testing.assert_close(both[1:], likelihood(images[1:], [1]), atol=1e-5, rtol=0)
    assert both[0] != both[1]
    for wrong in ({"num_steps": 0}, {"num_probes": 1}):
        with pytest.raises(ValueError, match="at least 1 and num_probes 2"):
            scheduler.ode_likelihood(network, images, **wrong)


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_a_step_with_fresh_noise_is_ddpms(scheduler_class):
    scheduler = scheduler_class()
    scheduler.set_timesteps(10)
    sigma = scheduler.sigmas.double()
    signal = 1 - sigma if scheduler_class is TinyFlowMatchScheduler else torch.ones_like(sigma)
    generator = torch.Generator().manual_seed(0)
    x, output = torch.randn(2, 1, 1, 4, 4, generator=generator)
    found = scheduler.step(output, scheduler.timesteps[4], x, eta=1.0, generator=torch.Generator().manual_seed(1))
    # equation 16 of DDIM, with abar = signal^2 / (signal^2 + sigma^2), on x scaled to the unit sphere
    abar, abar_prev = (signal[i] ** 2 / (signal[i] ** 2 + sigma[i] ** 2) for i in (4, 5))
    eta_sigma = ((1 - abar_prev) / (1 - abar)) ** 0.5 * (1 - abar / abar_prev) ** 0.5
    x_0 = found.pred_original_sample.double()
    epsilon = (x - signal[4] * x_0) / sigma[4]
    fresh = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    expected = abar_prev**0.5 * x_0 + (1 - abar_prev - eta_sigma**2) ** 0.5 * epsilon + eta_sigma * fresh
    torch.testing.assert_close(found.prev_sample.double(), expected * signal[5] / abar_prev**0.5, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_the_last_step_gives_the_predicted_image_whatever_eta(scheduler_class):
    scheduler = scheduler_class()
    scheduler.set_timesteps(3)
    x, output = torch.randn(2, 1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    prev_sample, x_0 = scheduler.step(output, scheduler.timesteps[-1], x, eta=1.0, return_dict=False)
    torch.testing.assert_close(prev_sample, x_0)


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
@pytest.mark.parametrize("config", [{"clip_sample": True}, {"thresholding": True, "sample_max_value": 1.0}])
def test_x_0_is_clipped_and_the_noise_taken_anew(scheduler_class, config):
    scheduler = scheduler_class(**config)
    scheduler.set_timesteps(5)
    x, output = 3 * torch.randn(2, 1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for t, level, next_level in zip(scheduler.timesteps, scheduler.sigmas, scheduler.sigmas[1:], strict=False):
        prev_sample, x_0 = scheduler.step(output, t, x, return_dict=False)
        assert x_0.abs().max() <= 1
        torch.testing.assert_close(prev_sample, x + (next_level - level) * (x - x_0) / level, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_steps_keep_float32_for_a_network_of_less(scheduler_class):
    scheduler = scheduler_class()
    scheduler.set_timesteps(2)
    x, output = torch.randn(2, 1, 1, 4, 4)
    assert scheduler.step(output.bfloat16(), scheduler.timesteps[0], x).prev_sample.dtype == torch.float32
    half = scheduler.step(output.bfloat16(), scheduler.timesteps[0], x.bfloat16())
    assert half.prev_sample.dtype == half.pred_original_sample.dtype == torch.bfloat16


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_custom_timesteps_and_those_of_heun(scheduler_class):
    scheduler = scheduler_class()
    scheduler.set_timesteps(4)
    levels, timesteps = scheduler.sigmas, scheduler.timesteps
    assert scheduler.order == 1 and len(levels) == 5 and levels[-1] == 0
    scheduler.set_timesteps(timesteps=timesteps.tolist())
    torch.testing.assert_close(scheduler.sigmas, levels)
    heun = scheduler_class(solver="heun")
    heun.set_timesteps(4)
    assert heun.order == 2 and torch.equal(heun.sigmas, levels)
    assert torch.equal(heun.timesteps, timesteps[[0, 1, 1, 2, 2, 3, 3]])


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"num_inference_steps": 3, "timesteps": [1.0]}, "exactly one"),
        ({"num_inference_steps": 0}, "from 1 to 1000"),
        ({"num_inference_steps": 1001}, "from 1 to 1000"),
        ({"timesteps": []}, "strictly decreasing"),
        ({"timesteps": [0.1, 0.2]}, "strictly decreasing"),
        ({"timesteps": [2000.0, 0.5]}, "of noise levels above 0"),
        ({"timesteps": [0.5, math.nan]}, "strictly decreasing"),
    ],
)
def test_wrong_steps_are_refused(scheduler_class, arguments, message):
    with pytest.raises(ValueError, match=message):
        scheduler_class().set_timesteps(**arguments)


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_wrong_arguments_of_a_step_are_refused(scheduler_class):
    scheduler, x = scheduler_class(), torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.step(x, 0.5, x)
    scheduler.set_timesteps(5)
    t = scheduler.timesteps[0]
    for arguments, message in (
        ((x, 3.3, x), "one of the scheduler's `timesteps`, got 3.3"),
        ((x, t, x, -1.0), "eta must be at least 0"),
        ((torch.zeros(1, 2, 4, 4), t, x), "as the sample"),
    ):
        with pytest.raises(ValueError, match=message):
            scheduler.step(*arguments)


def test_below_its_least_level_the_flows_loss_is_that_of_the_image_with_a_constant_weight():
    scheduler, x_0, noise = TinyFlowMatchScheduler(), *torch.randn(2, 3, 1, 4, 4)
    timesteps = torch.tensor([800.0, 50.0, 10.0])
    s = (timesteps / 1000)[:, None, None, None]
    x_t = scheduler.add_noise(x_0, noise, timesteps)
    predicted = x_0 + 0.1  # the velocity of a prediction that is off by 0.1
    loss = scheduler.training_loss((x_t - predicted) / s, x_0, noise, timesteps, reduction="none", min_level=0.05)
    assert torch.allclose(loss, 0.01 / torch.tensor([0.8, 0.05, 0.05]).square(), rtol=1e-3)


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_the_loss_takes_a_float_timestep_for_each_image(scheduler_class):
    scheduler, x = scheduler_class(), torch.zeros(3, 1, 4, 4)
    for timesteps in (torch.zeros(2), torch.zeros(3, dtype=torch.long)):
        with pytest.raises(ValueError, match="timesteps must be 3 floats"):
            scheduler.training_loss(x, x, x, timesteps)
    with pytest.raises(ValueError, match="Did you mean 'mean'"):
        scheduler.training_loss(x, x, x, torch.zeros(3), reduction="men")
    with pytest.raises(ValueError, match="noise must have the shape"):
        scheduler.training_loss(x, x, x[:, :, :2], torch.zeros(3))
    with pytest.raises(ValueError, match="as the sample"):
        scheduler.training_loss(x[:, :, :2], x, x, torch.zeros(3))


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"solver": "rk"}, "Unknown solver 'rk'"),
        ({"clip_sample_range": 0.0}, "above 0"),
        ({"dynamic_thresholding_ratio": 2.0}, r"\(0, 1\]"),
        ({"num_train_timesteps": 0}, "at least 1"),
    ],
)
def test_a_wrong_config_is_refused(scheduler_class, config, message):
    with pytest.raises(ValueError, match=message):
        scheduler_class(**config)


@pytest.mark.slow
def test_the_likelihood_of_a_trained_model_is_that_of_a_model():
    """Without a lowest noise level it was 27 bits/dim, of images that a uniform distribution gives 8."""
    pipe = TinyPipeline.from_pretrained("mnist-32").to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(2, generator=torch.Generator().manual_seed(0), output_type="pt").images
    images = (images * 255).round() / 127.5 - 1
    generator = torch.Generator().manual_seed(0)
    found = pipe.scheduler.ode_likelihood(pipe.unet, images, generator=generator, num_steps=10)
    assert 1 < found.total.mean() < 4
