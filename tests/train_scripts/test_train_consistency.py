"""Consistency models: trajectories, pairs of noise levels, what either converges to, and what a run leaves."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate import PartialState
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler

import tiny
from tiny_diffusers import TinyFlowMatchScheduler, TinyImg2ImgPipeline, TinyPipeline, TinyUNet2DModel
from tiny_diffusers.families.consistency import Consistency, level_gaps
from tiny_diffusers.families.diffusion import Diffusion
from tiny_diffusers.families.trajectories import draw_trajectories
from tiny_diffusers.train_scripts import train_conditional, train_consistency, train_unconditional
from tiny_diffusers.training.draws import Draws
from tiny_diffusers.training.family import Batch


SCRIPT = train_consistency
NETWORK = ["--ddpm_num_inference_steps", "2"]  # that of the checkpoint
FEW = ("--num_trajectories", "64")
MEAN, COVARIANCE = torch.tensor([0.3, -0.5]), torch.tensor([[0.5, 0.3], [0.3, 0.4]])


def test_the_levels_of_a_pair_approach_each_other():
    levels = torch.tensor([0.0, 0.001, 0.25, 0.5, 0.9, 1.0])
    gaps = [level_gaps(levels, stage) for stage in range(1, 13)]
    assert torch.equal(gaps[0][1:4], levels[1:4])  # the first stage is diffusion, but near pure noise
    torch.testing.assert_close(gaps[0][5], torch.tensor(0.5))  # n = 1 where s is infinite
    n = 1 + 8 * torch.sigmoid(torch.tensor(-1.0))  # t = 1/2 is s = 1
    torch.testing.assert_close(gaps[9][3], 0.5 * n / 2**10)
    for wider, gap in zip(gaps, gaps[1:], strict=False):
        assert (gap <= wider).all() and (gap[1:] > 0).all()


@pytest.mark.parametrize("x_prediction", [False, True])
def test_near_the_image_the_consistency_function_is_the_identity(x_prediction):
    unet = TinyUNet2DModel(8, 1, 1, (8, 8), 1, attention="none", mid_attention="none", x_prediction=x_prediction)
    family = Consistency(unet, TinyFlowMatchScheduler())
    images, noise = torch.randn(2, 4, 1, 8, 8)
    levels = torch.tensor([0.0, 1e-4, 0.05, 0.5])
    found = family._original_sample(unet, Batch(images, None, None), noise, levels)
    noisy = (1 - levels)[:, None, None, None] * images + levels[:, None, None, None] * noise
    assert torch.equal(found[0], images[0])
    assert torch.allclose(found[1], noisy[1], atol=0.01)
    # a new network predicts zero: the velocity, or the image
    assert torch.allclose(found[2:], torch.zeros(2, 1, 8, 8) if x_prediction else noisy[2:], atol=1e-5)


class Linear(torch.nn.Module):
    """Network whose velocity is linear in each two neighboring pixels, by cosines of t."""

    def __init__(self):
        super().__init__()
        self.coefficients = torch.nn.Parameter(torch.zeros(6, 6))

    def forward(self, sample, timestep):
        powers = torch.cos(torch.pi * torch.arange(6) * timestep[:, None] / 1000)
        matrix, vector = (powers @ self.coefficients).split([4, 2], dim=1)
        pairs = sample.reshape(len(sample), -1, 2)
        velocity = pairs @ matrix.reshape(-1, 2, 2) + vector[:, None]
        return SimpleNamespace(sample=velocity.reshape(sample.shape))


def fit(network, family, learning_rate, num_steps):
    """Trains on images of which each two neighboring pixels are a draw of the Gaussian."""
    optimizer = torch.optim.Adam(network.parameters())
    factor = torch.linalg.cholesky(COVARIANCE)
    for step in range(num_steps):
        draws = Draws(0, step, range(128))
        images = (MEAN + draws.normal("images", 32, 2) @ factor.T).reshape(-1, 1, 8, 8)
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / num_steps)
        optimizer.zero_grad()
        family._image_losses(network, Batch(images, None, draws, progress=step / num_steps)).mean().backward()
        optimizer.step()


class Exact(torch.nn.Module):
    """The velocity of the flow from noise to the Gaussian of each two neighboring pixels, from its mean and covariance."""

    config = {"name": "exact"}

    def forward(self, sample, timestep, class_labels=None):
        t = float(timestep[0]) / 1000
        pixels = sample.reshape(-1, 2) - (1 - t) * MEAN
        to_image = torch.linalg.solve((1 - t) ** 2 * COVARIANCE + t**2 * torch.eye(2), torch.eye(2))
        pixels = pixels.float()
        velocity = pixels @ (to_image @ (t * torch.eye(2) - (1 - t) * COVARIANCE)) - MEAN
        return SimpleNamespace(sample=velocity.reshape(sample.shape))


def flow_of(noise):
    """Returns where the exact flow leads noise: along each axis of the Gaussian it scales by the standard deviation."""
    eigenvalues, vectors = torch.linalg.eigh(COVARIANCE)
    return (MEAN + noise.reshape(-1, 2) @ (vectors * eigenvalues.sqrt()) @ vectors.T).reshape(noise.shape)


def draw(count, cache, **options):
    return draw_trajectories(Exact(), TinyFlowMatchScheduler(), (1, 8, 8), count, cache, PartialState(), **options)


def test_trajectories_lead_from_the_noise_to_where_the_exact_flow_does(tmp_path):
    drawn = draw(200, tmp_path)
    noise = Draws(0, "trajectories", range(200)).normal("noise", 1, 8, 8)
    begin, end = drawn.ends[:, 0].unbind(1)
    assert torch.equal(begin, noise.half()) and drawn.labels is None
    torch.testing.assert_close(end.float(), flow_of(noise), atol=0.05, rtol=0)
    fewer = draw(100, tmp_path)  # each depends on its number alone
    assert torch.equal(fewer.ends[:, :, 0], drawn.ends[:100, :, 0])
    torch.testing.assert_close(fewer.ends, drawn.ends[:100], atol=2e-3, rtol=0)


def test_a_second_trajectory_leads_from_the_image_that_is_noised_again_to_where_the_exact_flow_does(tmp_path):
    begin, end = draw(2000, tmp_path, num_inference_steps=2).ends.float().unbind(2)
    torch.testing.assert_close(end[:, 0], flow_of(begin[:, 0]), atol=0.05, rtol=0)
    noise = 2 * (begin[:, 1] - end[:, 0] / 2)  # at t = 1/2
    torch.testing.assert_close(torch.cov(noise.reshape(-1, 2).T), torch.eye(2), atol=0.02, rtol=0)
    assert torch.corrcoef(torch.stack([noise.flatten(), begin[:, 0].flatten()]))[0, 1].abs() < 0.01  # it is new
    # along the axes of the Gaussian, x_t has the variance (1 - t)^2 e + t^2, and x_0 the variance e
    eigenvalues, vectors = torch.linalg.eigh(COVARIANCE)
    along = (begin[:, 1].reshape(-1, 2) - MEAN / 2) @ vectors / ((eigenvalues + 1) / 4).sqrt()
    exact = MEAN + (along * eigenvalues.sqrt()) @ vectors.T
    torch.testing.assert_close(end[:, 1].reshape(-1, 2), exact, atol=0.05, rtol=0)


def test_trajectories_are_kept_in_the_cache(tmp_path, monkeypatch):
    drawn = draw(64, tmp_path, num_classes=3, class_dropout_prob=0.2)
    counts = torch.bincount(drawn.labels, minlength=4)
    assert counts[:3].min() > 10 and 0 < counts[3] < 25
    other = draw(64, tmp_path, seed=1, num_classes=3, class_dropout_prob=0.2)
    assert not torch.equal(other.ends, drawn.ends)
    monkeypatch.setattr(Exact, "forward", None)
    assert torch.equal(draw(64, tmp_path, num_classes=3, class_dropout_prob=0.2).ends, drawn.ends)


@pytest.mark.slow
def test_a_network_that_learned_the_ends_of_trajectories_draws_a_gaussian_in_one_step(tmp_path):
    network, scheduler = Linear(), TinyFlowMatchScheduler(stochastic_sampling=True)
    trajectories = draw(2000, tmp_path)
    fit(network, Consistency(network, scheduler, 1, trajectories=trajectories), 2e-2, 600)
    noise = torch.randn(64_000, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        images = noise - network(noise, torch.full((len(noise),), 1000.0)).sample
    torch.testing.assert_close(images, flow_of(noise), atol=0.05, rtol=0.05)
    pixels = images.reshape(-1, 2)
    torch.testing.assert_close(pixels.mean(dim=0), MEAN, atol=0.01, rtol=0)
    torch.testing.assert_close(torch.cov(pixels.T), COVARIANCE, atol=0.02, rtol=0)  # by pairs of levels it is 0.1


def spread(predict):
    """Returns the standard deviation, over the levels, of the x_0 that is predicted along exact trajectories."""
    eigenvalues, vectors = torch.linalg.eigh(COVARIANCE)
    start = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    predicted = []
    for t in torch.linspace(0.05, 1, 20):
        deviations = ((1 - t) ** 2 * eigenvalues + t**2).sqrt()
        x = (start * deviations) @ vectors.T + (1 - t) * MEAN
        with torch.no_grad():
            predicted.append(predict(x, t))
    return float(torch.stack(predicted).std(dim=0).mean())


@pytest.mark.slow
def test_a_tuned_linear_network_draws_a_gaussian_in_one_step():
    network, scheduler = Linear(), TinyFlowMatchScheduler(stochastic_sampling=True)

    def predict(x, t):
        return x - t * network(x, 1000 * t.expand(len(x))).sample

    fit(network, Diffusion(network, scheduler), 3e-2, 300)
    before = spread(predict)
    family = Consistency(network, scheduler, num_stages=6)
    fit(network, family, 2e-3, 1000)
    assert spread(predict) < 0.2 * before

    noise = torch.randn(64_000, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pixels = predict(noise, torch.tensor(1.0))
    torch.testing.assert_close(pixels.mean(dim=0), MEAN, atol=0.03, rtol=0)
    torch.testing.assert_close(torch.cov(pixels.T), COVARIANCE, atol=0.1, rtol=0)  # by diffusion it is 0.002


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A run of rectified flow."""
    return tiny.train(tmp_path_factory.mktemp("flow") / "run", script=train_unconditional, steps=2)


@pytest.mark.parametrize("method", ["trajectories", "ect"])
def test_a_run_leaves_a_model_of_two_steps_that_stock_diffusers_draws(train, train_in_two, checkpoint, method):
    flags = ("--pretrained_model_name_or_path", str(checkpoint), "--method", method)
    flags += FEW if method == "trajectories" else ()
    folder = train(*flags, steps=2)
    resumed = train_in_two(*flags, stopped_at=1, steps=2)
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (resumed / weights).read_bytes() == (folder / weights).read_bytes() != (checkpoint / weights).read_bytes()

    ours = TinyPipeline.from_pretrained(folder)
    stock = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    images = []
    for pipe in (ours, stock):
        pipe.set_progress_bar_config(disable=True)
        images.append(pipe(2, generator=torch.Generator().manual_seed(0), output_type="np").images)
        assert pipe.scheduler.config.stochastic_sampling and pipe.num_timesteps == 2
    assert np.array_equal(*images)


def test_classes_stay(train, tmp_path):
    classes = train(*tiny.TINY_NETWORK, script=train_conditional, name="classes", steps=2)
    folder = train("--pretrained_model_name_or_path", str(classes), *FEW, name="tuned", steps=2)
    pipe = TinyPipeline.from_pretrained(folder)
    assert pipe.unet.config.num_class_embeds == 10 and len(pipe(["3", "4"], num_inference_steps=1).images) == 2


def test_the_method_is_trajectories_where_they_can_be_drawn(train, checkpoint, check_mistake):
    def method_of(folder):
        return yaml.safe_load((folder / "config.yaml").read_text())["method"]

    tuned = ["--pretrained_model_name_or_path", str(checkpoint), *FEW]
    folder = train(*tuned, steps=1)
    assert method_of(folder) == "trajectories"
    assert method_of(train(*tiny.TINY_NETWORK, name="new", steps=1, network=False)) == "ect"
    check_mistake([*tuned, "--method", "ect"], ["--num_trajectories is for --method trajectories"])
    told = train(*tuned[:2], "--method", "ect", "--augment_prob", "0.1", name="told", steps=1)
    assert TinyPipeline.from_pretrained(told).unet.config.num_augment_labels

    asked = ["--method", "trajectories"]
    check_mistake(asked, ["--method trajectories: give --pretrained_model_name_or_path", "--method ect"])
    for unused in (["--augment_prob", "0.1"], ["--random_flip"], ["--num_stages", "3"]):
        check_mistake([*tuned, *unused], [f"{unused[0]} is for training images", "--method ect"])
    check_mistake([*asked, "--pretrained_model_name_or_path", str(folder)], ["is a consistency model already"])

    settings = (folder / "config.yaml").read_text()  # of a run that knew one method
    (folder / "config.yaml").write_text("".join(line for line in settings.splitlines(True) if "method" not in line))
    assert method_of(train(*tuned[:2], "--resume_from_checkpoint", "latest", steps=2)) == "ect"


def test_few_timesteps_and_a_large_share_that_is_held_out(train, tmp_path):
    base = train("--ddpm_num_steps", "5", script=train_unconditional, name="base", steps=1)
    folder = train("--pretrained_model_name_or_path", str(base), "--validation_split", "0.9", *FEW, steps=1)
    assert TinyPipeline.from_pretrained(folder).scheduler.config.num_train_timesteps == 5
    family = Consistency(Linear(), TinyFlowMatchScheduler(), trajectories=draw(4, tmp_path), held_out=0.99)
    assert (len(family.trajectories), len(family.held_out)) == (1, 3)


def test_what_is_not_of_rectified_flow_is_refused(check_mistake, train):
    betas = train(
        *tiny.TINY_NETWORK, "--prediction_type", "epsilon", script=train_unconditional, name="betas", steps=1
    )
    words = [f"{betas} (epsilon) is no checkpoint of rectified flow", "--prediction_type flow"]
    check_mistake(["--pretrained_model_name_or_path", str(betas)], words)
    check_mistake(["--pretrained_model_name_or_path", str(betas), "--prediction_type", "flow"], words)
    check_mistake(["--prediction_type", "edm"], ["Consistency tuning is for rectified flow, not for edm", "leave out"])


def test_what_solves_an_ode_refuses_a_consistency_model(checkpoint):
    pipe = TinyPipeline.from_pretrained(checkpoint)
    config = pipe.scheduler.config | {"stochastic_sampling": True, "solver": "euler"}
    pipe.scheduler = TinyFlowMatchScheduler.from_config(config)
    with pytest.raises(ValueError, match="is sampled by `solver='euler'`"):
        TinyFlowMatchScheduler.from_config(config, solver="heun")
    with pytest.raises(ValueError, match="has no likelihood"):
        pipe.scheduler.ode_likelihood(pipe.unet, torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="can't be inverted by a consistency model"):
        TinyImg2ImgPipeline.from_pipe(pipe)(torch.zeros(1, 1, 8, 8), inversion=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(config)
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler solves an ODE"):
        pipe()
