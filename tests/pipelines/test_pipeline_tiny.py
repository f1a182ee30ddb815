import inspect
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, DDIMPipeline, DDIMScheduler, ImagePipelineOutput, ModelMixin
from diffusers.callbacks import PipelineCallback
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput

from tiny_diffusers import (
    TinyDDIMScheduler,
    TinyDDPMScheduler,
    TinyEDMScheduler,
    TinyFlowMatchScheduler,
    TinyPipeline,
)
from tiny_diffusers.pipelines.pipeline_tiny import image_generators


# EDM has no betas, and the SDE solver needs torchsde.
NOT_TESTED = {"EDMEulerScheduler", "DPMSolverSDEScheduler"}
SCHEDULERS = sorted({scheduler.__name__ for scheduler in TinyDDIMScheduler().compatibles} - NOT_TESTED)


@pytest.fixture(params=["stock", "tiny"])
def pipe(request, make_unet, quiet):
    return quiet(TinyPipeline(make_unet(stock=request.param == "stock"), TinyDDIMScheduler()))


class OneImageNetwork(ModelMixin, ConfigMixin):
    """Ideal noise predictor for data of a single gray image x_0: eps = (x_t - sqrt(abar) x_0) / sqrt(1 - abar)."""

    @register_to_config
    def __init__(self, sample_size=(4, 6), in_channels=1):
        super().__init__()
        self.x_0, self.calls = torch.nn.Parameter(torch.tensor(0.5)), 0
        # Solvers also use values between the training timesteps, where they interpolate the log-SNR linearly.
        self.log_snr = torch.logit(TinyDDIMScheduler().alphas_cumprod.double())

    def forward(self, sample, timestep):
        self.calls += 1
        low = timestep.long()
        high = (low + 1).clamp(max=len(self.log_snr) - 1)
        abar = torch.sigmoid(torch.lerp(self.log_snr[low], self.log_snr[high], timestep.double() - low)).float()
        return UNet2DOutput(sample=(sample - abar**0.5 * self.x_0) / (1 - abar) ** 0.5)


# ----------------------------------------------------------------------------------------------------- output


def test_the_stock_pipeline_gives_the_same_images(make_unet, quiet):
    unet, scheduler = make_unet(), DDIMScheduler()
    ours, stock = quiet(TinyPipeline(unet, scheduler)), quiet(DDIMPipeline(unet, scheduler))
    for eta in (0.0, 1.0):
        arguments = {"batch_size": 2, "num_inference_steps": 5, "eta": eta, "output_type": "np"}
        images = ours(generator=image_generators(0, 2), **arguments).images
        expected = stock(generator=image_generators(0, 2), use_clipped_model_output=True, **arguments).images
        np.testing.assert_allclose(images, expected, atol=1e-6)


def test_clipping_leaves_no_veil_that_grows_with_the_steps(quiet):
    """On a trained model, as random ones are nowhere sure of black; eps of the unclipped x_0 leaves 1.6, 2.1, 3.6 of 255."""
    pipe = quiet(TinyPipeline.from_pretrained(Path(__file__).parents[2] / "model_cards" / "digits-8"))
    grays = []
    for steps in (10, 50):
        call = {"num_inference_steps": steps, "eta": 0.0, "clip_sample": True, "output_type": "pt"}
        images = pipe(16, image_generators(0, 16), **call).images
        grays.append(255 * images[:, 0, :, 0].mean())  # the first column, which is black in real digits
    assert grays[1] < grays[0] < 2


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_output_types_are_one_image_in_three_forms(make_unet, quiet, channels, mode):
    pipe = quiet(TinyPipeline(make_unet(channels=channels, sample_size=(8, 16)), TinyDDIMScheduler()))
    pil, array, tensor = (
        pipe(2, image_generators(0, 2), num_inference_steps=3, output_type=output_type).images
        for output_type in ("pil", "np", "pt")
    )
    assert [image.mode for image in pil] == [mode, mode] and pil[0].size == (16, 8)
    assert array.shape == (2, 8, 16, channels) and array.dtype == np.float32
    assert array.min() >= 0 and array.max() <= 1
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(
        np.stack([np.asarray(image) for image in pil]), (array.squeeze(-1 if channels == 1 else ()) * 255).round()
    )


def test_tuple_and_dict_are_equal(pipe):
    arguments = {"num_inference_steps": 3, "output_type": "np", "return_intermediates": 2}
    output = pipe(generator=image_generators(0, 1), **arguments)
    images, intermediates = pipe(generator=image_generators(0, 1), return_dict=False, **arguments)
    assert isinstance(output, ImagePipelineOutput)
    np.testing.assert_array_equal(output.images, images)
    np.testing.assert_array_equal(output.intermediates[0].sample, intermediates[0].sample)
    assert len(pipe(num_inference_steps=1, return_dict=False)) == 1


@pytest.mark.parametrize("scheduler", [TinyDDIMScheduler, TinyDDPMScheduler])
def test_a_list_of_generators_makes_an_image_independent_of_its_batch(pipe, scheduler):
    pipe.scheduler = scheduler()
    batch = pipe(16, image_generators(0, 16), num_inference_steps=5, eta=0.5, output_type="np").images
    for i in (0, 7, 15):
        alone = pipe(1, image_generators(0, 1, first=i), num_inference_steps=5, eta=0.5, output_type="np").images
        np.testing.assert_allclose(alone[0], batch[i], atol=1e-4)


def test_image_generators_have_consecutive_seeds():
    draws = [torch.randn(4, generator=generator) for generator in image_generators(5, 2, first=3)]
    for draw, seed in zip(draws, (8, 9), strict=True):
        assert torch.equal(draw, torch.randn(4, generator=torch.Generator().manual_seed(seed)))


def test_one_seed_gives_one_image(pipe):
    images = [pipe(1, image_generators(seed, 1)[0], 3, output_type="np").images for seed in (0, 0, 1)]
    np.testing.assert_array_equal(images[0], images[1])
    assert np.abs(images[0] - images[2]).max() > 0.01


@pytest.mark.parametrize("scheduler", [TinyDDIMScheduler, diffusers.EulerDiscreteScheduler])
def test_latents_replace_the_generators_noise(pipe, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    latents = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    options = {"num_inference_steps": 3, "eta": 0.0, "output_type": "pt"}
    given = pipe(latents=latents, **options).images
    drawn = pipe(generator=torch.Generator().manual_seed(3), **options).images
    torch.testing.assert_close(given, drawn, rtol=0, atol=0)


def test_bfloat16_is_near_float32_and_float64_stays_float64(make_unet, quiet):
    pipe = quiet(TinyPipeline(make_unet(), TinyDDIMScheduler()))
    full = pipe(generator=image_generators(0, 1), num_inference_steps=5, output_type="pt").images
    pipe.to(torch.bfloat16)
    low = pipe(generator=image_generators(0, 1), num_inference_steps=5, output_type="pt").images
    assert low.dtype == torch.float32 and pipe.unet.dtype == torch.bfloat16
    assert (low - full).abs().mean() < 0.05
    pipe.to(torch.float64)
    assert pipe(num_inference_steps=2, output_type="np").images.dtype == np.float64


# ------------------------------------------------------------------------------------------- any scheduler


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_stock_scheduler_finds_the_single_image(name, quiet):
    scheduler = getattr(diffusers, name).from_config(TinyDDIMScheduler(clip_sample=False).config)
    pipe = quiet(TinyPipeline(OneImageNetwork(), scheduler))
    output = pipe(2, num_inference_steps=20, output_type="pt", return_intermediates=3)
    # Every intermediate x_0 is exact, whether the scheduler or the pipeline predicts it.
    for _, _, x_0 in output.intermediates:
        torch.testing.assert_close(x_0, torch.full((2, 1, 4, 6), 0.75), atol=5e-3, rtol=0)
    assert (output.images - 0.75).abs().mean() < 0.05
    assert pipe.num_timesteps == pipe.unet.calls


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_x_0_is_predicted_for_solvers_that_do_not_return_it(make_unet, quiet, name, prediction_type):
    tiny = TinyDDIMScheduler(prediction_type=prediction_type)
    pipe = quiet(TinyPipeline(make_unet(), getattr(diffusers, name).from_config(tiny.config)))
    for timestep, x_t, x_0 in pipe(num_inference_steps=4, output_type="latent", return_intermediates=2).intermediates:
        abar = tiny.alphas_cumprod[int(timestep)]
        with torch.no_grad():
            output = pipe.unet(x_t, timestep).sample
        expected = {
            "epsilon": (x_t - (1 - abar) ** 0.5 * output) / abar**0.5,
            "sample": output,
            "v_prediction": abar**0.5 * x_t - (1 - abar) ** 0.5 * output,
        }[prediction_type]
        torch.testing.assert_close(x_0, expected, atol=1e-4, rtol=1e-4)


def test_a_second_order_scheduler_evaluates_the_network_twice_a_step(pipe):
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe(num_inference_steps=4)
    assert pipe.num_timesteps == 7


@pytest.mark.parametrize("name", ["TinyDDPM", "TinyDDIM", "DDPM", "DDIM", "DPMSolverMultistep", "EulerDiscrete"])
def test_a_learned_variance_is_used_or_dropped(make_unet, quiet, name):
    tiny = TinyDDPMScheduler(variance_type="learned_range")
    schedulers = {"TinyDDPM": tiny, "TinyDDIM": TinyDDIMScheduler.from_config(tiny.config)}
    scheduler = schedulers.get(name) or getattr(diffusers, f"{name}Scheduler").from_config(tiny.config)
    pipe = quiet(TinyPipeline(make_unet(learned=True), scheduler))
    output = pipe(2, num_inference_steps=3, output_type="pt", return_intermediates=2)
    assert output.images.shape == output.intermediates[0].pred_original_sample.shape == (2, 1, 8, 8)


def test_the_variance_type_may_be_none(make_unet, quiet):
    pipe = quiet(TinyPipeline(make_unet(), diffusers.DDPMScheduler(variance_type=None)))
    assert len(pipe(2, num_inference_steps=2).images) == 2


def test_custom_timesteps_are_used(pipe):
    visited = []

    def note(pipe, step, timestep, tensors):
        visited.append(int(timestep))
        return tensors

    pipe(timesteps=[900, 300, 20], callback_on_step_end=note)
    assert visited == [900, 300, 20]


# ----------------------------------------------------------------------------- intermediates and callbacks


@pytest.mark.parametrize("count", [1, 2, 4, 10])
def test_intermediates_are_evenly_spaced_and_end_with_the_image(pipe, count):
    output = pipe(2, image_generators(0, 2), num_inference_steps=10, output_type="np", return_intermediates=count)
    timesteps = [intermediate.timestep for intermediate in output.intermediates]
    assert len(timesteps) == count and timesteps[-1] == 0
    assert timesteps == sorted(timesteps, reverse=True)
    if count > 1:
        assert timesteps[0] == 900 and max(np.diff(timesteps)) - min(np.diff(timesteps)) <= 100
        noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        np.testing.assert_allclose(output.intermediates[0].sample[0, ..., 0], (noise[0, 0] / 2 + 0.5).clamp(0, 1))
    np.testing.assert_allclose(output.intermediates[-1].pred_original_sample, output.images, atol=1e-6)


def test_intermediates_come_in_the_output_type(pipe):
    intermediate = pipe(2, num_inference_steps=2, return_intermediates=1).intermediates[0]
    assert [image.mode for image in intermediate.pred_original_sample] == ["L", "L"]


def test_a_callback_sees_and_changes_the_latents(pipe):
    seen = []

    def last_to_gray(pipe, step, timestep, tensors):
        assert set(tensors) == {"latents"}
        seen.append(step)
        if step == pipe.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    images = pipe(num_inference_steps=3, output_type="np", callback_on_step_end=last_to_gray).images
    assert seen == [0, 1, 2] and (images == 0.5).all()
    latents = pipe(num_inference_steps=3, output_type="latent", callback_on_step_end=last_to_gray).images
    assert latents.abs().sum() == 0
    pipe(num_inference_steps=2, callback_on_step_end=lambda *a: a[-1], callback_on_step_end_tensor_inputs=[])


def test_a_callback_sees_the_predicted_images(pipe):
    seen = []

    def keep(pipe, step, timestep, tensors):
        seen.append(tensors["pred_original_sample"])
        return {}

    output = pipe(
        num_inference_steps=3,
        output_type="latent",
        return_intermediates=3,
        callback_on_step_end=keep,
        callback_on_step_end_tensor_inputs=["pred_original_sample"],
    )
    for x_0, intermediate in zip(seen, output.intermediates, strict=True):
        assert torch.equal(x_0, intermediate.pred_original_sample)


def test_a_callback_can_stop_sampling(pipe):
    seen = []

    def stop_after_two(pipe, step, timestep, tensors):
        seen.append(step)
        pipe._interrupt = step == 1
        return tensors

    pipe(num_inference_steps=5, callback_on_step_end=stop_after_two)
    assert seen == [0, 1]
    pipe(num_inference_steps=5)
    assert not pipe.interrupt


def test_a_callback_object_names_its_own_tensors(pipe):
    class Zero(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            return {"latents": torch.zeros_like(callback_kwargs["latents"])}

    images = pipe(num_inference_steps=1, output_type="np", callback_on_step_end=Zero(cutoff_step_ratio=1.0)).images
    assert (images == 0.5).all()


def test_no_gradients_are_kept(pipe):
    assert not pipe(num_inference_steps=1, output_type="pt").images.requires_grad


# ------------------------------------------------------------------------------- conventions of diffusers


def test_a_pipeline_can_be_rebuilt_from_its_components(pipe, quiet):
    again = quiet(TinyPipeline(**pipe.components))
    arguments = {"num_inference_steps": 2, "output_type": "np"}
    np.testing.assert_array_equal(
        again(generator=image_generators(0, 1), **arguments).images,
        pipe(generator=image_generators(0, 1), **arguments).images,
    )


def test_arguments_have_the_names_and_defaults_of_diffusers(make_unet, quiet):
    ours, stock = (inspect.signature(c.__call__).parameters for c in (TinyPipeline, DDIMPipeline))
    for name in set(stock) - {"self", "eta", "num_inference_steps", "use_clipped_model_output"}:
        assert ours[name].default == stock[name].default
    for scheduler, num_steps in (
        (TinyDDIMScheduler(), stock["num_inference_steps"].default),
        (TinyFlowMatchScheduler(), 20),
        (TinyFlowMatchScheduler(num_train_timesteps=10), 10),
        (TinyFlowMatchScheduler(stochastic_sampling=True), 2),  # a consistency model
    ):
        pipe = quiet(TinyPipeline(make_unet(), scheduler))
        pipe()
        assert pipe.num_timesteps == num_steps


@pytest.mark.parametrize(
    ("scheduler", "eta"),
    [
        (TinyDDIMScheduler(), 1.0),
        (TinyFlowMatchScheduler(), 1.0),
        (TinyFlowMatchScheduler(solver="multistep"), 1.5),
        (TinyFlowMatchScheduler(solver="heun"), 0.0),
        (TinyEDMScheduler(), 1.0),
    ],
)
def test_fresh_noise_is_drawn_unless_the_solver_is_of_second_order(make_unet, quiet, scheduler, eta):
    pipe = quiet(TinyPipeline(make_unet(), scheduler))

    def draw(**options):
        return pipe(2, image_generators(0, 2), num_inference_steps=4, output_type="pt", **options).images

    torch.testing.assert_close(draw(), draw(eta=eta), rtol=0, atol=0)
    assert not torch.allclose(draw(), draw(eta=0.5), atol=1e-3)


def test_the_progress_bar_can_be_configured(make_unet, capsys):
    pipe = TinyPipeline(make_unet(), TinyDDIMScheduler())
    pipe.set_progress_bar_config(desc="denoising")
    pipe(num_inference_steps=2)
    assert "denoising" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ invalid input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps.*1 to 1000.*got 0"),
        ({"num_inference_steps": 1001}, "num_inference_steps.*1 to 1000.*got 1001"),
        ({"num_inference_steps": 2.5}, "num_inference_steps.*integer"),
        ({"eta": -0.1}, "eta.*got -0.1"),
        ({"eta": 1.1}, "eta.*got 1.1"),
        ({"eta": float("nan")}, "eta.*got nan"),
        ({"latents": torch.zeros(1, 1, 8, 9)}, r"latents.*\(1, 1, 8, 8\), got \(1, 1, 8, 9\)"),
        ({"latents": torch.zeros(2, 1, 8, 8)}, "latents.*shape"),
        ({"batch_size": 3, "generator": image_generators(0, 2)}, "got 2 for a batch of 3"),
        ({"batch_size": 0}, "batch_size.*got 0"),
        ({"output_type": "jpg"}, "output_type.*'pil', 'np', 'pt', 'latent', got 'jpg'"),
        ({"timesteps": [10, 20]}, "timesteps.*strictly decreasing"),
        ({"timesteps": [20, 20]}, "timesteps.*strictly decreasing"),
        ({"timesteps": [1000, 20]}, "timesteps.*999"),
        ({"timesteps": []}, "timesteps"),
        ({"callback_on_step_end_tensor_inputs": ["prompt"]}, "prompt"),
        ({"return_intermediates": 0}, "return_intermediates.*got 0"),
        ({"num_inference_steps": 3, "return_intermediates": 4}, "return_intermediates.*3 steps"),
    ],
)
def test_invalid_input_is_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        pipe(**arguments)
    assert "\n" not in str(error.value)


def test_a_scheduler_without_custom_timesteps_is_named(pipe):
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="DDIMScheduler does not support custom `timesteps`"):
        pipe(timesteps=[20, 10])


def test_a_stock_network_with_classes_needs_the_conditional_pipeline(make_unet):
    with pytest.raises(ValueError, match="TinyConditionalPipeline"):
        TinyPipeline(make_unet(classes=3), TinyDDIMScheduler())()


def test_a_tiny_network_with_classes_samples_its_null_class(make_unet, quiet):
    pipe = quiet(TinyPipeline(make_unet(stock=False, classes=3), TinyDDIMScheduler()))
    assert len(pipe(2, num_inference_steps=2).images) == 2


def test_a_network_without_a_size_is_refused(make_unet):
    with pytest.raises(ValueError, match="sample_size"):
        TinyPipeline(make_unet(sample_size=None), TinyDDIMScheduler())()


def test_nonfinite_samples_are_refused(pipe):
    with torch.no_grad():
        next(pipe.unet.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite: the network overflows in torch.float32.*bfloat16"):
        pipe(num_inference_steps=2)
