import inspect
import itertools
import json
import math
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tiny_diffusers import TinyDDIMScheduler, TinyDDPMScheduler


# NumPy warns about the code of diffusers' solvers.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

BOTH = pytest.mark.parametrize("cls", [TinyDDPMScheduler, TinyDDIMScheduler])
SCHEDULES = ["linear", "cosine", "sigmoid", "quadratic"]
PREDICTION_TYPES = ["epsilon", "sample", "v_prediction"]

# EDM has no betas, and the SDE solver needs torchsde.
ALL_COMPATIBLE = sorted(TinyDDPMScheduler().compatibles, key=lambda cls: cls.__name__)
COMPATIBLE = [
    cls for cls in ALL_COMPATIBLE if cls.__name__ != "EDMEulerScheduler" and not getattr(cls, "_backends", None)
]


def betas_from_formula(schedule, T=1000, b0=1e-4, b1=0.02):
    """Computes the four schedules in float64 (Nichol & Dhariwal 2021, equation 17, for cosine)."""
    if schedule == "linear":
        return np.linspace(b0, b1, T)
    if schedule == "quadratic":
        return np.linspace(b0**0.5, b1**0.5, T) ** 2
    if schedule == "sigmoid":
        return 1 / (1 + np.exp(-np.linspace(-6, 6, T))) * (b1 - b0) + b0
    f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - f[1:] / f[:-1], 0.999)


def random_batch(channels=3, batch=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sample = torch.rand(batch, channels, 8, 8, generator=generator) * 2 - 1
    noise = torch.randn(batch, channels, 8, 8, generator=generator)
    output = torch.randn(batch, channels, 8, 8, generator=generator)
    return output, sample, noise


# Noise schedules


@BOTH
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("T", [10, 1000])
def test_betas_match_the_formulas(cls, schedule, T):
    scheduler = cls(num_train_timesteps=T, beta_schedule=schedule)
    betas = betas_from_formula(schedule, T)
    torch.testing.assert_close(scheduler.betas.double(), torch.from_numpy(betas), rtol=2e-5, atol=1e-9)
    alphas_cumprod = torch.from_numpy(np.cumprod(1 - betas))
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), alphas_cumprod, rtol=1e-4, atol=1e-7)


@BOTH
@pytest.mark.parametrize(
    ("alias", "stock"), [("cosine", "squaredcos_cap_v2"), ("quadratic", "scaled_linear"), ("linear", "linear")]
)
def test_a_schedule_has_two_names(cls, alias, stock):
    assert torch.equal(cls(beta_schedule=alias).betas, cls(beta_schedule=stock).betas)
    assert cls(beta_schedule=alias).config.beta_schedule == stock


@BOTH
def test_sigmoid_is_stock_ddpms(cls):
    assert torch.equal(cls(beta_schedule="sigmoid").betas, diffusers.DDPMScheduler(beta_schedule="sigmoid").betas)


@BOTH
def test_trained_betas_determine_the_number_of_timesteps(cls, tmp_path):
    betas = np.array([0.1, 0.2, 0.3])
    scheduler = cls(num_train_timesteps=1000, trained_betas=betas)
    assert scheduler.config.num_train_timesteps == len(scheduler) == len(scheduler.timesteps) == 3
    scheduler.save_pretrained(tmp_path)
    torch.testing.assert_close(cls.from_pretrained(tmp_path).betas, torch.tensor(betas, dtype=torch.float32))


# Config, here and in stock diffusers


@BOTH
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("other", COMPATIBLE, ids=lambda cls: cls.__name__)
def test_every_stock_scheduler_has_the_same_alphas_and_keeps_the_config(cls, schedule, other, tmp_path):
    options = {"num_train_timesteps": 100, "beta_end": 0.15, "prediction_type": "v_prediction", "loss_type": "huber"}
    scheduler = cls(beta_schedule=schedule, huber_schedule="snr", snr_gamma=5.0, **options)
    in_process = other.from_config(scheduler.config)
    assert torch.equal(in_process.alphas_cumprod, scheduler.alphas_cumprod)

    scheduler.save_pretrained(tmp_path / "tiny")
    loaded = other.from_pretrained(tmp_path / "tiny")
    assert torch.equal(loaded.alphas_cumprod, scheduler.alphas_cumprod)

    loaded.save_pretrained(tmp_path / "stock")
    arguments = inspect.signature(cls.__init__).parameters.keys() - {"self"}
    for back in (cls.from_config(in_process.config), cls.from_pretrained(tmp_path / "stock")):
        assert {name: back.config[name] for name in arguments} == {name: scheduler.config[name] for name in arguments}
        if schedule == "cosine":
            assert back.config["lambda_min_clipped"] == -5.1
        assert torch.equal(back.alphas_cumprod, scheduler.alphas_cumprod)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("other", COMPATIBLE, ids=lambda cls: cls.__name__)
def test_every_stock_solver_samples_the_data(schedule, other, gaussian):
    T = 200
    tiny = TinyDDIMScheduler(T, beta_start=5e-4, beta_end=0.1, beta_schedule=schedule, clip_sample=False)
    data = gaussian(mean=0.2, std=0.5)
    scheduler = other.from_config(tiny.config)
    scheduler.set_timesteps(25)

    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(64, 1, 8, 8, generator=generator) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        # Some solvers use values between the training timesteps.
        alpha_bar = np.interp(float(t), np.arange(T), tiny.alphas_cumprod.numpy())
        output = data.predict(scheduler.scale_model_input(x_t, t), alpha_bar, "epsilon")
        seeded = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        x_t = scheduler.step(output, t, x_t, **seeded).prev_sample
    assert x_t.mean().item() == pytest.approx(0.2, abs=0.05)
    assert x_t.std().item() == pytest.approx(0.5, rel=0.2)


@BOTH
def test_only_cosine_asks_solvers_to_clip_the_first_noise_levels(cls):
    cosine = cls(beta_schedule="cosine")
    assert cosine.config.lambda_min_clipped == -5.1
    assert diffusers.DPMSolverMultistepScheduler.from_config(cosine.config).config.lambda_min_clipped == -5.1
    linear = cls.from_config(cosine.config, beta_schedule="linear")
    assert "lambda_min_clipped" not in linear.config
    assert cls.from_config(linear.config, beta_schedule="cosine").config.lambda_min_clipped == -5.1
    assert "lambda_min_clipped" not in cls.from_config(cosine.config, trained_betas=[0.1, 0.2]).config


@BOTH
def test_schedule_arguments_override_stored_betas(cls, tmp_path):
    cls(beta_schedule="sigmoid").save_pretrained(tmp_path)
    for asked in (
        {"beta_schedule": "linear"},
        {"beta_schedule": "sigmoid", "beta_end": 0.03},
        {"beta_schedule": "sigmoid", "beta_start": 1e-3},
        {"beta_schedule": "sigmoid", "num_train_timesteps": 50},
    ):
        expected = cls(**asked).betas
        assert torch.equal(cls.from_pretrained(tmp_path, **asked).betas, expected)
        assert torch.equal(cls.from_config(cls(beta_schedule="sigmoid").config, **asked).betas, expected)
    betas = cls.from_pretrained(tmp_path, trained_betas=[0.1, 0.2]).betas
    assert torch.equal(betas, torch.tensor([0.1, 0.2]))


@BOTH
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_config_is_complete_before_and_after_saving(cls, schedule, tmp_path):
    scheduler = cls(beta_schedule=schedule, huber_schedule="exponential")
    scheduler.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    # As in diffusers' own test: only `_use_default_values` is not saved.
    assert {name: value for name, value in scheduler.config.items() if name != "_use_default_values"} == loaded.config
    for again in (cls.from_config(scheduler.config), cls.from_config(loaded.config)):
        assert {name: again.config[name] for name in loaded.config if not name.startswith("_")} == {
            name: value for name, value in loaded.config.items() if not name.startswith("_")
        }
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["huber_delta"] == 0.1


@BOTH
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), T=st.integers(2, 60), schedule=st.sampled_from([*SCHEDULES, None]))
def test_any_config_survives_saving_and_a_stock_solver(cls, data, T, schedule, tmp_path):
    """A schedule of `None` stands for `trained_betas`."""
    choices = {
        "prediction_type": PREDICTION_TYPES,
        "variance_type": ["fixed_small", "fixed_large", "learned_range"],
        "loss_type": ["l2", "l1", "huber", "pseudo_huber"],
        "huber_schedule": ["constant", "exponential", "snr"],
        "huber_delta": [None, 0.3],
        "snr_gamma": [None, 5.0],
        "thresholding": [False, True],
        "dynamic_thresholding_ratio": [0.9, 0.995],
        "clip_sample": [False, True],
        "timestep_spacing": ["leading", "trailing", "linspace"],
        "beta_end": [0.02, 0.3],
    }
    config = {name: data.draw(st.sampled_from(values), label=name) for name, values in choices.items()}
    if schedule is None:
        config["trained_betas"] = data.draw(st.lists(st.floats(2**-13, 0.875, width=32), min_size=2, max_size=9))
    else:
        config |= {"num_train_timesteps": T, "beta_schedule": schedule}
    scheduler = cls(**config)
    scheduler.save_pretrained(tmp_path)
    solver = diffusers.DPMSolverMultistepScheduler.from_pretrained(tmp_path)
    for again in (cls.from_pretrained(tmp_path), cls.from_config(scheduler.config), cls.from_config(solver.config)):
        assert torch.equal(again.alphas_cumprod, scheduler.alphas_cumprod)
        assert {name: again.config[name] for name in config} == {name: scheduler.config[name] for name in config}
    assert torch.equal(solver.alphas_cumprod, scheduler.alphas_cumprod)


@BOTH
@pytest.mark.parametrize("other", ALL_COMPATIBLE, ids=lambda cls: cls.__name__)
def test_a_default_config_survives_any_compatible_scheduler(cls, other):
    if getattr(other, "_backends", None):
        pytest.skip("needs a package that is not installed")
    given = {"num_train_timesteps": 100, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    scheduler = cls(**given, clip_sample=True)
    back = cls.from_config(other.from_config(scheduler.config).config)
    assert {name: value for name, value in back.config.items() if name in scheduler.config} == dict(scheduler.config)


def test_the_two_schedulers_take_each_others_config():
    ddpm = TinyDDPMScheduler(beta_schedule="cosine", variance_type="learned_range", snr_gamma=5.0)
    ddim = TinyDDIMScheduler.from_config(ddpm.config)
    assert ddim.config.variance_type == "learned_range" and ddim.config.snr_gamma == 5.0
    assert TinyDDPMScheduler.from_config(ddim.config).config.variance_type == "learned_range"


@BOTH
def test_the_variance_type_of_stock_solvers_may_be_none(cls, tmp_path):
    diffusers.DPMSolverMultistepScheduler().save_pretrained(tmp_path)
    assert cls.from_pretrained(tmp_path).config.variance_type == "fixed_small"


# Timesteps


@BOTH
@settings(max_examples=60, deadline=None)
@given(data=st.data(), T=st.integers(1, 400), spacing=st.sampled_from(["leading", "trailing", "linspace"]))
def test_any_number_of_steps_is_a_decreasing_subsequence(cls, data, T, spacing):
    N = data.draw(st.integers(1, T))
    scheduler = cls(num_train_timesteps=T, timestep_spacing=spacing)
    scheduler.set_timesteps(N)
    timesteps = scheduler.timesteps.tolist()
    assert len(timesteps) == scheduler.num_inference_steps == N
    assert T > timesteps[0] and timesteps[-1] >= 0
    assert all(a > b for a, b in itertools.pairwise(timesteps))
    # Each step leads to the next entry, and the last step to the image.
    assert [int(scheduler.previous_timestep(t)) for t in scheduler.timesteps] == [*timesteps[1:], -1]
    if N == T:
        assert timesteps == list(range(T))[::-1]
    if spacing != "leading":
        assert timesteps[0] == T - 1

    stock = diffusers.DDPMScheduler(num_train_timesteps=T, timestep_spacing=spacing)
    stock.set_timesteps(N)
    # Stock's `trailing` may include -1, and its `linspace` of one step is at 0, where there is no noise.
    if stock.timesteps[-1] >= 0 and N > 1:
        assert torch.equal(scheduler.timesteps, stock.timesteps)


@BOTH
@pytest.mark.parametrize("give", [list, np.array, torch.tensor])
def test_custom_timesteps_are_used(cls, give):
    scheduler = cls()
    scheduler.set_timesteps(timesteps=give([901, 400, 7]))
    assert scheduler.timesteps.tolist() == [901, 400, 7] and scheduler.num_inference_steps == 3
    assert scheduler.previous_timestep(torch.tensor(901)) == 400
    assert scheduler.previous_timestep(400) == 7
    assert scheduler.previous_timestep(7) == -1
    scheduler.set_timesteps(10)
    assert len(scheduler.timesteps) == 10


@BOTH
@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"num_inference_steps": 5, "timesteps": [3, 2, 1]},
        {"num_inference_steps": 0},
        {"num_inference_steps": -1},
        {"num_inference_steps": 101},
        {"num_inference_steps": 2.5},
        {"timesteps": []},
        {"timesteps": [1, 2, 3]},
        {"timesteps": [5, 5, 1]},
        {"timesteps": [100, 1]},
        {"timesteps": [5, -1]},
        {"timesteps": [5.5, 1.0]},
    ],
    ids=str,
)
def test_invalid_timesteps_are_refused(cls, asked):
    with pytest.raises(ValueError, match="timesteps|num_inference_steps"):
        cls(num_train_timesteps=100).set_timesteps(**asked)


@BOTH
def test_an_offset_beyond_the_last_timestep_is_refused(cls):
    scheduler = cls(num_train_timesteps=10, steps_offset=1)
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == [9, 7, 5, 3, 1]
    with pytest.raises(ValueError, match="steps_offset"):
        scheduler.set_timesteps(10)


# Conventions of diffusers


@BOTH
@pytest.mark.parametrize("timestep", [0, 1, torch.tensor(1)])
def test_a_step_keeps_the_shape_and_its_tuple_equals_its_output(cls, timestep):
    scheduler = cls()
    scheduler.set_timesteps(50)
    output, sample, _ = random_batch()
    step = scheduler.step(output, timestep, sample, generator=torch.manual_seed(0))
    values = scheduler.step(output, timestep, sample, generator=torch.manual_seed(0), return_dict=False)
    assert step.prev_sample.shape == step.pred_original_sample.shape == sample.shape
    assert torch.equal(values[0], step.prev_sample) and torch.equal(values[1], step.pred_original_sample)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_half_precision_steps_are_float32_steps_rounded_once(cls, dtype, prediction_type):
    scheduler = cls(prediction_type=prediction_type)
    scheduler.set_timesteps(10)
    output, sample, _ = (x.to(dtype) for x in random_batch())
    step = scheduler.step(output, 500, sample, generator=torch.manual_seed(0))
    assert step.prev_sample.dtype == step.pred_original_sample.dtype == dtype
    if dtype != torch.float64:
        exact = scheduler.step(output.float(), 500, sample.float(), generator=torch.manual_seed(0))
        assert torch.equal(step.prev_sample, exact.prev_sample.to(dtype))


@BOTH
def test_a_list_of_generators_makes_an_image_independent_of_its_batch(cls):
    scheduler = cls()
    scheduler.set_timesteps(10)
    output, sample, _ = random_batch()
    eta = {"eta": 1.0} if cls is TinyDDIMScheduler else {}

    def generators():
        return [torch.Generator().manual_seed(i) for i in range(4)]

    batch = scheduler.step(output, 500, sample, generator=generators(), **eta).prev_sample
    alone = scheduler.step(output[2:3], 500, sample[2:3], generator=generators()[2:3], **eta).prev_sample
    torch.testing.assert_close(batch[2:3], alone)


@BOTH
@pytest.mark.parametrize("channels", [2, 6, 9])
def test_a_model_output_of_another_shape_is_refused(cls, channels):
    scheduler = cls()
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="variance_type"):
        scheduler.step(torch.zeros(1, channels, 8, 8), 500, torch.zeros(1, 3, 8, 8))


# Clipping and dynamic thresholding


@BOTH
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ratio", [0.9, 0.995, 1.0])
def test_dynamic_thresholding_is_that_of_saharia_et_al(cls, prediction_type, dtype, ratio):
    scheduler = cls(prediction_type=prediction_type, thresholding=True, dynamic_thresholding_ratio=ratio)
    unclipped = cls(prediction_type=prediction_type, clip_sample=False)
    for each in (scheduler, unclipped):
        each.set_timesteps(10)
    _, sample, noise = random_batch()
    # The prediction of the second image is within [-1, 1], the others are far outside.
    output = {"epsilon": noise, "sample": 4 * sample, "v_prediction": 5 * noise}[prediction_type].clone()
    if prediction_type == "sample":
        output[1] = sample[1]
    output, x_t = output.to(dtype), noise.to(dtype)

    x_0 = unclipped.step(output.float(), 500, x_t.float()).pred_original_sample
    s = torch.quantile(x_0.abs().flatten(1), ratio, dim=1).clamp(min=1).reshape(-1, 1, 1, 1)
    expected = x_0.clamp(-s, s) / s
    torch.testing.assert_close(
        scheduler.step(output, 500, x_t).pred_original_sample, expected.to(dtype), rtol=1e-3, atol=1e-3
    )
    assert expected.abs().max() <= 1


@BOTH
def test_x_0_is_clipped_by_the_config(cls):
    _, sample, noise = random_batch()
    for options, limit in (({}, 1), ({"clip_sample_range": 2.0}, 2), ({"clip_sample": False}, 5)):
        scheduler = cls(prediction_type="sample", **options)
        scheduler.set_timesteps(10)
        x_0 = scheduler.step(5 * sample, 500, noise).pred_original_sample
        torch.testing.assert_close(x_0, (5 * sample).clamp(-limit, limit))


# Training loss


def target_of(scheduler, prediction_type, sample, noise, timesteps):
    if prediction_type == "epsilon":
        return noise
    return sample if prediction_type == "sample" else scheduler.get_velocity(sample, noise, timesteps)


@BOTH
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("loss_type", ["l2", "l1", "huber", "pseudo_huber"])
def test_losses_match_torch_and_the_formulas(cls, prediction_type, loss_type):
    delta = 0.7
    scheduler = cls(prediction_type=prediction_type, loss_type=loss_type, huber_delta=delta)
    output, sample, noise = random_batch()
    timesteps = torch.tensor([0, 1, 500, 999])
    target = target_of(scheduler, prediction_type, sample, noise, timesteps)
    d = (output - target).double()
    expected = {
        "l2": torch.nn.functional.mse_loss(output, target, reduction="none").double(),
        "l1": torch.nn.functional.l1_loss(output, target, reduction="none").double(),
        "huber": torch.nn.functional.huber_loss(output, target, delta=delta, reduction="none").double(),
        "pseudo_huber": delta**2 * ((1 + (d / delta) ** 2).sqrt() - 1),
    }[loss_type].mean(dim=(1, 2, 3))
    loss = scheduler.training_loss(output, sample, noise, timesteps, reduction="none")
    torch.testing.assert_close(loss, expected.float())
    torch.testing.assert_close(scheduler.training_loss(output, sample, noise, timesteps), loss.mean())
    torch.testing.assert_close(scheduler.training_loss(output, sample, noise, timesteps, reduction="sum"), loss.sum())
    torch.testing.assert_close(
        scheduler.training_loss(target, sample, noise, timesteps), torch.tensor(0.0), atol=1e-9, rtol=0
    )


@BOTH
@pytest.mark.parametrize("loss_type", ["huber", "pseudo_huber"])
@pytest.mark.parametrize("schedule", ["exponential", "snr"])
def test_delta_follows_its_schedule(cls, loss_type, schedule, chain):
    delta, t = 0.05, torch.tensor([0, 250, 999])
    alpha_bar = chain(cls()).alpha_bar[t]
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
    deltas = {"exponential": delta ** (t.double() / 1000), "snr": (1 - delta) / (1 + sigma) ** 2 + delta}[schedule]
    scheduled = cls(loss_type=loss_type, huber_schedule=schedule, huber_delta=delta)
    output, sample, noise = random_batch(batch=3)
    loss = scheduled.training_loss(output, sample, noise, t, reduction="none")
    for i in range(3):
        constant = cls(loss_type=loss_type, huber_delta=deltas[i].item())
        alone = constant.training_loss(output[i : i + 1], sample[i : i + 1], noise[i : i + 1], t[i : i + 1])
        torch.testing.assert_close(loss[i], alone)


@BOTH
def test_pseudo_huber_is_l2_below_delta_and_l1_above(cls):
    _, sample, noise = random_batch()
    t = torch.full((4,), 10)
    small, large = noise + 1e-4, noise + 1e4
    pseudo = cls(loss_type="pseudo_huber", huber_delta=1.0)
    assert pseudo.training_loss(small, sample, noise, t).item() == pytest.approx(0.5e-8, rel=1e-2)
    assert pseudo.training_loss(large, sample, noise, t).item() == pytest.approx(1e4, rel=1e-3)


@BOTH
def test_huber_delta_is_resolved_and_saved(cls):
    assert cls().config.huber_delta == 1.0
    assert cls(huber_schedule="snr").config.huber_delta == 0.1
    assert cls(huber_schedule="snr", huber_delta=0.3).config.huber_delta == 0.3
    assert cls.from_config(cls(huber_delta=2.0).config, huber_schedule="snr").config.huber_delta == 0.1


@BOTH
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_make_one_loss_of_all_prediction_types(cls, gamma, chain):
    """The weighted l2 loss of any prediction is min(SNR, gamma) |x_0 - predicted x_0|^2 (equations 4 to 6)."""
    output, sample, noise = random_batch()
    timesteps = torch.tensor([1, 100, 500, 900])
    alpha_bar = chain(cls()).alpha_bar[timesteps].float()
    weight = (alpha_bar / (1 - alpha_bar)).clamp(max=gamma)
    for prediction_type in PREDICTION_TYPES:
        scheduler = cls(prediction_type=prediction_type, snr_gamma=gamma, clip_sample=False)
        x_t = scheduler.add_noise(sample, noise, timesteps)
        x_0 = torch.cat(
            [
                TinyDDPMScheduler(prediction_type=prediction_type, clip_sample=False)
                .step(output[i : i + 1], t, x_t[i : i + 1])
                .pred_original_sample
                for i, t in enumerate(timesteps)
            ]
        )
        expected = weight * (sample - x_0).square().mean(dim=(1, 2, 3))
        loss = scheduler.training_loss(output, sample, noise, timesteps, reduction="none")
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-6)


@BOTH
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_terminal_snr_of_0_gives_no_nan(cls, prediction_type):
    scheduler = cls(prediction_type=prediction_type, rescale_betas_zero_snr=True, snr_gamma=5.0, huber_schedule="snr")
    assert 0 < scheduler.alphas_cumprod[-1] < 2**-23
    output, sample, noise = random_batch()
    loss = scheduler.training_loss(output, sample, noise, torch.full((4,), 999), reduction="none")
    unweighted = cls(prediction_type=prediction_type).training_loss(output, sample, noise, torch.full((4,), 999))
    assert torch.isfinite(loss).all()
    if prediction_type == "epsilon":
        torch.testing.assert_close(loss.mean(), unweighted)


@BOTH
def test_betas_of_a_terminal_snr_of_0_are_written_out_for_every_solver(cls, tmp_path):
    """Single-step DPM-Solver, Heun, KDPM2, LMS, DEIS, PNDM and SA drop `rescale_betas_zero_snr`."""
    scheduler = cls(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    signals = cls().alphas_cumprod.double().sqrt()
    expected = (signals - signals[-1]) * signals[0] / (signals[0] - signals[-1])  # Lin et al. 2023, algorithm 1
    torch.testing.assert_close(scheduler.alphas_cumprod.double().sqrt()[:-1], expected[:-1], atol=1e-5, rtol=0)
    scheduler.save_pretrained(tmp_path)
    for other in (cls, *ALL_COMPATIBLE):
        if "trained_betas" in inspect.signature(other).parameters:
            loaded = other.from_config(
                scheduler.config
            )  # those that know the flag rescale once more, by 2^-12 at most
            torch.testing.assert_close(loaded.alphas_cumprod**0.5, scheduler.alphas_cumprod**0.5, atol=2**-12, rtol=0)
    assert torch.equal(cls.from_pretrained(tmp_path).alphas_cumprod, scheduler.alphas_cumprod)


@BOTH
def test_the_loss_is_in_float32_and_differentiable(cls):
    scheduler = cls(variance_type="learned_range")
    _, sample, noise = random_batch()
    output = torch.randn(4, 6, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    loss = scheduler.training_loss(output, sample, noise, torch.tensor([0, 1, 500, 999]))
    assert loss.dtype == torch.float32
    loss.backward()
    assert torch.isfinite(output.grad).all()


@BOTH
@pytest.mark.parametrize("t", [0, 1, 700])
def test_the_bound_trains_the_variance_alone_and_the_simple_loss_the_mean_alone(cls, t):
    _, sample, noise = random_batch()
    timesteps = torch.full((4,), t)
    output = torch.randn(4, 6, 8, 8, generator=torch.manual_seed(0), requires_grad=True)
    cls(variance_type="learned_range").training_loss(output, sample, noise, timesteps).backward()
    mean = output.detach()[:, :3].requires_grad_()
    cls().training_loss(mean, sample, noise, timesteps).backward()
    torch.testing.assert_close(output.grad[:, :3], mean.grad)
    assert output.grad[:, 3:].abs().max() > 0


@BOTH
def test_the_hybrid_loss_is_least_at_the_ideal_variance(cls, gaussian):
    """Nichol & Dhariwal: L_t, unlike L_simple, depends on the variance. Its gradient is 0 at the ideal variance."""
    scheduler = cls(variance_type="learned_range", clip_sample=False, num_train_timesteps=100)
    data = gaussian(mean=0.1, std=0.4)
    generator = torch.Generator().manual_seed(0)
    sample = 0.1 + 0.4 * torch.randn(4096, 1, 4, 4, generator=generator)
    noise = torch.randn(sample.shape, generator=generator)
    timesteps = torch.full((4096,), 40)
    output = data.network(scheduler)(scheduler.add_noise(sample, noise, timesteps), timesteps).sample
    losses = []
    for shift in (-0.2, 0.0, 0.2):
        shifted = torch.cat([output[:, :1], output[:, 1:] + shift], dim=1)
        losses.append(scheduler.training_loss(shifted, sample, noise, timesteps).item())
    assert losses[1] < losses[0] and losses[1] < losses[2]


@BOTH
@pytest.mark.parametrize(
    ("options", "change", "words"),
    [
        ({}, {"output": torch.zeros(2, 1, 8, 8)}, "must be"),
        ({}, {"output": torch.zeros(2, 6, 8, 8)}, "variance_type"),
        ({}, {"noise": torch.zeros(2, 3, 8, 9)}, "noise"),
        ({}, {"timesteps": torch.tensor([5])}, "timesteps"),
        ({}, {"timesteps": torch.tensor(5)}, "timesteps"),
        ({}, {"timesteps": torch.tensor([5.0, 6.0])}, "timesteps"),
        ({}, {"reduction": "average"}, "reduction"),
        ({"variance_type": "learned_range"}, {}, "twice the channels"),
        ({"variance_type": "learned"}, {}, "learned_range"),
    ],
)
def test_invalid_training_inputs_are_refused(cls, options, change, words):
    given = {
        "output": torch.zeros(2, 3, 8, 8),
        "sample": torch.zeros(2, 3, 8, 8),
        "noise": torch.zeros(2, 3, 8, 8),
        "timesteps": torch.tensor([5, 6]),
        "reduction": "mean",
    } | change
    with pytest.raises(ValueError, match=words):
        cls(**options).training_loss(*given.values())


# Variational bound


def kl_bits(variance, posterior_variance, mean_error_variance):
    """Computes E KL(q || p) in bits for a reverse step, from its variance and the variance of its mean's error."""
    ratio = posterior_variance / variance
    return 0.5 * (ratio - 1 - ratio.log() + mean_error_variance / variance) / math.log(2)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_every_term_of_the_bound_is_analytic(variance_type, prediction_type, gaussian, chain):
    options = {"num_train_timesteps": 100, "beta_end": 0.15, "clip_sample": False}
    scheduler = TinyDDPMScheduler(variance_type=variance_type, prediction_type=prediction_type, **options)
    data, c = gaussian(mean=0.1, std=0.25), chain(scheduler)
    generator = torch.Generator().manual_seed(0)
    sample = 0.1 + 0.25 * torch.randn(512, 1, 8, 8, generator=generator)
    bound = scheduler.variational_bound(data.network(scheduler), sample, generator=generator)
    assert bound.terms.shape == (512, 100) and bound.prior.shape == bound.total.shape == (512,)
    torch.testing.assert_close(bound.total, bound.prior + bound.terms.sum(dim=1))

    _, x_0_variance = data.posterior_of_original(0.0, c.alpha_bar)
    variance = {
        "fixed_small": c.posterior_variance,
        "fixed_large": c.beta,
        "learned_range": data.ideal_variances(scheduler),
    }[variance_type]
    expected = kl_bits(variance, c.posterior_variance, c.original_coeff**2 * x_0_variance)
    torch.testing.assert_close(bound.terms.mean(dim=0)[1:].double(), expected[1:], rtol=0.04, atol=1e-5)
    alpha_bar = c.alpha_bar[-1]
    prior = 0.5 * (alpha_bar * (0.1**2 + 0.25**2) - alpha_bar - torch.log1p(-alpha_bar)) / math.log(2)
    torch.testing.assert_close(bound.prior.mean().double(), prior, rtol=0.05, atol=1e-8)


def test_the_ideal_variance_reaches_the_entropy_and_tilde_beta_does_not(gaussian, chain, bits_of_levels):
    """
    Tilde beta is the variance of x_{t-1} given x_t *and x_0*. Without x_0, the ideal variance is r times larger. A
    step then costs (r - 1) / 2 nats with tilde beta and log(r) / 2 with the ideal variance. The difference is more
    than half a bit over all steps.
    """
    data, bounds = gaussian(mean=0.1, std=0.25), {}
    sample = 0.1 + 0.25 * torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    sample = ((sample.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    for variance_type in ("learned_range", "fixed_small"):
        scheduler = TinyDDPMScheduler(variance_type=variance_type, clip_sample=False)
        generator = torch.Generator().manual_seed(1)
        bounds[variance_type] = scheduler.variational_bound(data.network(scheduler), sample, generator=generator)

    # The entropy of these samples, which removes their sampling noise from the comparison.
    entropy = bits_of_levels(sample, 0.1, 0.25).mean().item()
    assert bounds["learned_range"].total.mean().item() == pytest.approx(entropy, abs=0.02)

    r = (data.ideal_variances(scheduler) / chain(scheduler).posterior_variance)[1:]
    gap = ((r - 1 - r.log()) / 2 / math.log(2)).sum().item()
    assert gap > 0.5
    missed = (bounds["fixed_small"].terms - bounds["learned_range"].terms)[:, 1:].mean(dim=0).sum().item()
    assert missed == pytest.approx(gap, abs=0.02)


def test_the_decoders_probabilities_of_256_levels_sum_to_1():
    from tiny_diffusers.schedulers.scheduling_tiny_common import discretized_gaussian_nll

    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, std in ((0.0, 0.3), (0.9, 0.05), (-1.5, 1.0)):
        nll = discretized_gaussian_nll(levels, torch.tensor(mean), torch.tensor(std**2).log())
        assert torch.exp(-nll).sum().item() == pytest.approx(1, abs=1e-6)


@BOTH
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_mean_of_the_loss_vlb_over_t_is_the_bound_of_the_same_noise(cls, variance_type, prediction_type, tmp_path):
    T, (_, sample, _) = 20, random_batch(batch=2)
    options = {"variance_type": variance_type, "prediction_type": prediction_type, "clip_sample": False}
    cls(T, beta_schedule="cosine", loss_type="vlb", **options).save_pretrained(tmp_path)
    scheduler = cls.from_pretrained(tmp_path)
    assert scheduler.config.loss_type == "vlb"
    out_channels = 6 if variance_type == "learned_range" else 3
    convolution = torch.nn.Conv2d(3, out_channels, 3, padding=1).requires_grad_(False)

    def network(x, timesteps):
        return SimpleNamespace(sample=convolution(x))

    bound = scheduler.variational_bound(network, sample, generator=torch.manual_seed(1))
    generator, losses = torch.manual_seed(1), []
    for t in range(T):
        noise = torch.randn(sample.shape, generator=generator)
        timesteps = torch.full((2,), t)
        output = network(scheduler.add_noise(sample, noise, timesteps), timesteps).sample
        losses.append(scheduler.training_loss(output, sample, noise, timesteps, reduction="none"))
    torch.testing.assert_close(torch.stack(losses).mean(dim=0), bound.total - bound.prior, rtol=1e-4, atol=0)


@BOTH
def test_the_loss_vlb_weights_each_timestep_by_the_papers_factor(cls, chain, bits_of_levels):
    """Ho et al. 2020, equation 12 with sigma_t^2 = tilde beta_t, and equation 13 at t = 0."""
    scheduler = cls(loss_type="vlb")
    c, (output, sample, noise) = chain(scheduler), random_batch()
    timesteps = torch.tensor([0, 1, 500, 999])
    loss = scheduler.training_loss(output, sample, noise, timesteps, reduction="none")
    assert torch.equal(scheduler.training_loss(output, sample, noise, timesteps), loss.mean())
    for i, t in enumerate(timesteps[1:].tolist(), start=1):
        factor = c.beta[t] ** 2 / (2 * c.posterior_variance[t] * (1 - c.beta[t]) * (1 - c.alpha_bar[t]))
        expected = 1000 * factor * (noise[i] - output[i]).square().mean() / math.log(2)
        torch.testing.assert_close(loss[i].double(), expected, rtol=1e-3, atol=0)
    x_0 = sample[0] + ((1 - c.alpha_bar[0]) / c.alpha_bar[0]).sqrt() * (noise[0] - output[0])
    decoder = bits_of_levels(sample[0], x_0.double(), c.decoder_posterior_variance[0].sqrt())
    assert loss[0].item() == pytest.approx(1000 * decoder.clamp(max=-math.log2(1e-12)).mean().item(), rel=1e-2)


@BOTH
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_loss_vlb_trains_the_mean_and_the_variance(cls, prediction_type):
    scheduler = cls(loss_type="vlb", variance_type="learned_range", prediction_type=prediction_type)
    _, sample, noise = random_batch()
    output = torch.randn(4, 6, 8, 8, generator=torch.manual_seed(0), requires_grad=True)
    scheduler.training_loss(output, sample, noise, torch.tensor([1, 50, 500, 999])).backward()
    assert torch.isfinite(output.grad).all()
    assert (output.grad.unflatten(1, (2, 3)).abs().amax(dim=(2, 3, 4)) > 0).all()  # of each image, both halves


def test_the_bound_passes_labels_and_is_deterministic_with_a_generator(gaussian):
    scheduler = TinyDDIMScheduler(num_train_timesteps=4)
    ideal, seen = gaussian(0.0, 0.3).network(scheduler), []

    def network(sample, timesteps, class_labels=None):
        seen.append(class_labels)
        return ideal(sample, timesteps)

    _, sample, _ = random_batch()
    labels = torch.arange(4)
    first = scheduler.variational_bound(network, sample, class_labels=labels, generator=torch.manual_seed(0))
    assert all(given is labels for given in seen) and len(seen) == 4
    again = scheduler.variational_bound(network, sample, generator=torch.manual_seed(0))
    assert torch.equal(first.total, again.total) and seen[-1] is None


# Invalid settings


@BOTH
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta_schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"beta_schedule": "square"}, "squaredcos_cap_v2"),
        ({"loss_type": "huberr"}, "Did you mean 'huber'"),
        ({"loss_type": "L1"}, "Did you mean 'l1'"),
        ({"huber_schedule": "exp"}, "Did you mean 'exponential'"),
        ({"prediction_type": "velocity"}, "v_prediction"),
        ({"prediction_type": "noise"}, "epsilon, sample, v_prediction"),
        ({"timestep_spacing": "leadin"}, "Did you mean 'leading'"),
        ({"huber_delta": 0.0}, "huber_delta"),
        ({"huber_delta": float("nan")}, "huber_delta"),
        ({"huber_schedule": "snr", "huber_delta": 1.0}, "huber_delta must be below 1"),
        ({"snr_gamma": 0.0}, "snr_gamma"),
        ({"loss_type": "vlb", "snr_gamma": 5.0}, "snr_gamma=5.0 means nothing to loss_type='vlb'"),
        ({"loss_type": "vlb", "huber_delta": 0.1}, "huber_delta=0.1 means nothing to loss_type='vlb'"),
        ({"loss_type": "vlb", "huber_schedule": "snr"}, "huber_schedule='snr' means nothing to loss_type='vlb'"),
        ({"clip_sample_range": -1.0}, "clip_sample_range"),
        ({"dynamic_thresholding_ratio": 0.0}, "dynamic_thresholding_ratio"),
        ({"dynamic_thresholding_ratio": 99.5}, "dynamic_thresholding_ratio"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"trained_betas": [0.1, 1.5]}, "trained_betas"),
        ({"trained_betas": [[0.1]]}, "trained_betas"),
    ],
    ids=str,
)
def test_invalid_settings_are_refused(cls, options, words):
    with pytest.raises(ValueError, match=words):
        cls(**options)


@BOTH
def test_an_unknown_variance_type_is_refused_before_sampling_and_training(cls):
    scheduler = cls(variance_type="fixed_smal")
    with pytest.raises(ValueError, match="Did you mean 'fixed_small'"):
        scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="Did you mean 'fixed_small'"):
        output, sample, noise = random_batch()
        scheduler.training_loss(output, sample, noise, torch.zeros(4, dtype=torch.long))
