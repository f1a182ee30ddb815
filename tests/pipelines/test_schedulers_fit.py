"""A sample of tests/benchmarks/check_schedulers.py, which tries every scheduler, schedule and number of steps."""

import json
from pathlib import Path

import check_schedulers
import diffusers
import pytest
import torch

from tiny_diffusers import (
    TinyDDIMScheduler,
    TinyDDPMScheduler,
    TinyEDMScheduler,
    TinyFlowMatchScheduler,
    TinyPipeline,
)


ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

NUM_IMAGES = 400
FITTING = [
    *("DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler", "DEISMultistepScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler"),
    *("EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler"),
    *("LCMScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "SASolverScheduler", "TCDScheduler"),
    "UniPCMultistepScheduler",
]
FITTING_FLOW = [
    *("DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"),
    *("FlowMapEulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
    *("FlowMatchLCMScheduler", "SASolverScheduler", "UniPCMultistepScheduler"),
]
FITTING_EDM = ["EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"]
KARRAS = ["DEISMultistepScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler"]


@pytest.fixture(scope="module")
def cosine():
    pipe = check_schedulers.mixture_pipeline("cosine")
    return pipe, check_schedulers.draw(pipe, pipe.scheduler, 100, NUM_IMAGES)


@pytest.fixture(scope="module")
def digits():
    pipe = TinyPipeline.from_pretrained(ROOT / "model_cards/digits-8")
    pipe.set_progress_bar_config(disable=True)
    return pipe, check_schedulers.draw(pipe, pipe.scheduler, 50, 4)


@pytest.mark.parametrize("name", check_schedulers.SCHEDULERS)
def test_every_scheduler_samples_the_mixture_or_is_refused_in_a_sentence(name, cosine):
    pipe, fine = cosine
    ddim = check_schedulers.draw(pipe, pipe.scheduler, 10, NUM_IMAGES)
    found, _, _ = check_schedulers.verdict(name, pipe, 10, ddim, fine, check_schedulers.fits_mixture).partition(" ")
    if found == "uninstalled":
        pytest.skip("needs a package that is not installed")
    assert found == ("fits" if name in FITTING else "refused")


@pytest.mark.parametrize(
    ("scheduler", "fitting"), [(TinyFlowMatchScheduler, FITTING_FLOW), (TinyEDMScheduler, FITTING_EDM)]
)
def test_flow_and_edm_are_sampled_by_their_stock_schedulers_and_no_other(scheduler, fitting):
    pipe = check_schedulers.pipeline_of_levels(scheduler())
    own, fine = (check_schedulers.draw(pipe, pipe.scheduler, steps, NUM_IMAGES) for steps in (20, 200))
    heun = check_schedulers.draw(pipe, scheduler(solver="heun"), 20, NUM_IMAGES)
    assert (heun - fine).abs().mean() < 0.5 * (own - fine).abs().mean()
    for name in check_schedulers.SCHEDULERS:
        found = check_schedulers.verdict(name, pipe, 20, own, fine, check_schedulers.fits_mixture).partition(" ")[0]
        assert found in ("uninstalled", "fits" if name in fitting else "refused"), name


def test_a_scheduler_of_another_objective_is_refused_even_with_the_config_of_its_own(cosine):
    pipe, _ = cosine
    flow = check_schedulers.pipeline_of_levels(TinyFlowMatchScheduler())
    for objective, target, other, message in (
        ("flow", flow, TinyDDIMScheduler(), "rectified flow: use `"),
        ("flow", flow, diffusers.DPMSolverMultistepScheduler(), "`use_flow_sigmas` True"),
        ("betas", pipe, TinyFlowMatchScheduler(), "beta schedule: use `"),
        ("betas", pipe, TinyEDMScheduler(), "beta schedule: use `"),
    ):
        with pytest.raises(ValueError, match=message):
            check_schedulers.draw(target, other, 5, 1)
        assert target._objective == objective


@pytest.mark.parametrize("steps", [10, 20])
def test_heun_draws_the_images_of_the_trained_digits(steps, digits):
    pipe, fine = digits
    scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    found = check_schedulers.draw(pipe, scheduler, steps, len(fine))
    assert (found - fine).abs().mean() / 2 < 0.03  # in [0, 1]; 0.3 from the first sigma of 20,291


@pytest.mark.parametrize("name", KARRAS)
def test_karras_spacing_samples_the_mixture_here_and_in_stock_loops(name, cosine):
    pipe, fine = cosine
    scheduler = check_schedulers.build(name, pipe.scheduler.config, use_karras_sigmas=True)
    found = check_schedulers.draw(pipe, scheduler, 20, NUM_IMAGES)
    assert (found - fine).abs().mean() < 0.06

    scheduler.set_timesteps(20)
    assert scheduler.sigmas.max() == pytest.approx(80)
    sample = torch.randn(fine.shape, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        sample = scheduler.step(pipe.unet(scheduler.scale_model_input(sample, t), t).sample, t, sample).prev_sample
    assert (sample - fine).abs().mean() < 0.06


@pytest.mark.parametrize("steps", [61, 500, 1000])
@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "PNDMScheduler"])
def test_any_number_of_steps_gives_timesteps_of_the_network(name, steps, cosine):
    pipe, _ = cosine
    scheduler = pipe._set_timesteps(check_schedulers.build(name, pipe.scheduler.config), steps, None)
    assert 0 <= scheduler.timesteps.min() and scheduler.timesteps.max() <= 999
    assert 900 < scheduler.timesteps[0] and scheduler.num_inference_steps == min(
        steps, scheduler.config.num_train_timesteps
    )


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("cls", [TinyDDIMScheduler, TinyDDPMScheduler, diffusers.DDIMScheduler])
def test_ddim_and_ddpm_keep_the_timesteps_of_their_config(cls, spacing, cosine):
    pipe, _ = cosine
    scheduler = cls(beta_schedule="squaredcos_cap_v2", timestep_spacing=spacing)
    assert pipe._set_timesteps(scheduler, 10, None) is scheduler
    own = cls(beta_schedule="squaredcos_cap_v2", timestep_spacing=spacing)
    own.set_timesteps(10)
    assert torch.equal(scheduler.timesteps, own.timesteps)


def test_sampling_leaves_the_config_of_the_scheduler_alone(cosine):
    pipe, _ = cosine
    scheduler = check_schedulers.build("HeunDiscreteScheduler", pipe.scheduler.config)
    before = dict(scheduler.config), scheduler.betas
    check_schedulers.draw(pipe, scheduler, 5, 2)
    assert (dict(scheduler.config), scheduler.betas) == before


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler"),
        ("FlowMatchHeunDiscreteScheduler", "HeunDiscreteScheduler"),
        ("EDMEulerScheduler", "EulerDiscreteScheduler"),
        ("EDMDPMSolverMultistepScheduler", "DPMSolverMultistepScheduler"),
        ("IPNDMScheduler", "PNDMScheduler"),
        ("DDIMInverseScheduler", "DDIMScheduler"),
    ],
)
def test_a_refusal_names_the_nearest_scheduler_that_fits(name, nearest, cosine):
    pipe, _ = cosine
    with pytest.raises(ValueError, match=f"{name} is not for a network .* `{nearest}.from_config`"):
        check_schedulers.draw(pipe, getattr(diffusers, name)(), 5, 1)


@pytest.mark.parametrize("options", [{"use_flow_sigmas": True}, {"prediction_type": "flow_prediction"}])
def test_a_solver_set_to_flow_matching_is_refused(options, cosine):
    pipe, _ = cosine
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, **options)
    with pytest.raises(ValueError, match="beta schedule"):
        check_schedulers.draw(pipe, scheduler, 5, 1)


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_pndm_with_fewer_steps_than_runge_kutta_needs_is_refused(steps, cosine):
    pipe, _ = cosine
    with pytest.raises(ValueError, match="at least 8 with PNDMScheduler"):
        check_schedulers.draw(pipe, diffusers.PNDMScheduler.from_config(pipe.scheduler.config), steps, 1)


@pytest.mark.parametrize("cls", [TinyDDIMScheduler, TinyDDPMScheduler, diffusers.EulerDiscreteScheduler])
def test_epsilon_at_zero_snr_samples_or_is_refused(cls):
    pipe = check_schedulers.mixture_pipeline("linear", rescale_betas_zero_snr=True, timestep_spacing="leading")
    fine = check_schedulers.draw(pipe, pipe.scheduler, 100, NUM_IMAGES)
    assert check_schedulers.mixture_statistics(fine)[0] < 0.1
    trailing = cls.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    if cls is diffusers.EulerDiscreteScheduler:
        share_error, _ = check_schedulers.mixture_statistics(check_schedulers.draw(pipe, trailing, 20, NUM_IMAGES))
        assert share_error < 0.1
    else:
        with pytest.raises(ValueError, match="rescale_betas_zero_snr"):
            check_schedulers.draw(pipe, trailing, 20, 1)


def test_a_prediction_type_that_a_solver_does_not_know_is_refused():
    pipe = check_schedulers.mixture_pipeline("cosine", "sample")
    with pytest.raises(ValueError, match="KDPM2DiscreteScheduler can't use the network's `prediction_type` 'sample'"):
        check_schedulers.draw(pipe, diffusers.KDPM2DiscreteScheduler.from_config(pipe.scheduler.config), 5, 1)


def test_a_config_without_sigma_keys_gains_them(tmp_path):
    scheduler = TinyDDIMScheduler(beta_schedule="cosine")
    scheduler.save_pretrained(tmp_path)
    file = tmp_path / "scheduler_config.json"
    old = {k: v for k, v in json.loads(file.read_text()).items() if k not in ("sigma_min", "sigma_max")}
    file.write_text(json.dumps(old))
    loaded = TinyDDIMScheduler.from_pretrained(tmp_path)
    assert loaded.config.sigma_max == 80 and loaded.config.sigma_min == scheduler.config.sigma_min
    linear = TinyDDIMScheduler.from_config(scheduler.config, beta_schedule="linear")
    assert linear.config.sigma_min == pytest.approx(0.01, rel=1e-3)  # (1e-4 / (1 - 1e-4))^0.5
