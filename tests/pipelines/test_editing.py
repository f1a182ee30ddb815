"""Variations, inpainting and restoration of given images."""

import check_restoration
import diffusers
import numpy as np
import pytest
import torch
from check_schedulers import MixtureNetwork
from PIL import Image

from tiny_diffusers import (
    TinyDDIMScheduler,
    TinyDDPMScheduler,
    TinyEDMScheduler,
    TinyFlowMatchScheduler,
    TinyImg2ImgPipeline,
    TinyInpaintPipeline,
    TinyInterpolationPipeline,
    TinyPipeline,
    TinyRestorationPipeline,
)
from tiny_diffusers.pipelines import pipeline_tiny_restoration
from tiny_diffusers.pipelines.pipeline_tiny import image_generators
from tiny_diffusers.pipelines.pipeline_tiny_operators import LinearOperator


EDITING = [TinyImg2ImgPipeline, TinyInpaintPipeline, TinyRestorationPipeline]
SCHEDULERS = [TinyDDIMScheduler, TinyDDPMScheduler, TinyFlowMatchScheduler, TinyEDMScheduler]
QUICK = {"num_inference_steps": 5, "output_type": "pt"}
HALF = torch.zeros(8, 8)
HALF[:, 4:] = 1  # the right half is painted


def pictures(channels: int = 1, count: int = 2, side: int = 8) -> torch.Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(1))


def arguments_of(pipeline: type) -> dict:
    """Returns the arguments by which a pipeline edits `pictures()`."""
    if pipeline is TinyImg2ImgPipeline:
        return {"image": pictures(), **QUICK}
    if pipeline is TinyInpaintPipeline:
        return {"image": pictures(), "mask_image": HALF, **QUICK}
    return {"image": pictures(), "operator": "inpaint", "mask_image": HALF, **QUICK}


# --------------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("pipeline", EDITING)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("stock", [True, False])
def test_a_sample_depends_on_its_seed_alone(make_unet, quiet, pipeline, scheduler, stock):
    pipe = quiet(pipeline(make_unet(stock=stock), scheduler()))
    options = arguments_of(pipeline)
    together = pipe(num_images=3, generator=image_generators(0, 6), **options).images
    assert together.shape == (6, 1, 8, 8) and pipe.num_timesteps >= 3
    options["image"] = options["image"][1:]
    alone = pipe(num_images=1, generator=image_generators(0, 1, first=4), **options).images
    torch.testing.assert_close(alone, together[4:5], atol=1e-4, rtol=0)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


@pytest.mark.parametrize("pipeline", EDITING)
def test_a_pipeline_survives_saving_and_loading_and_is_made_of_another(make_unet, quiet, tmp_path, pipeline):
    unet = make_unet(stock=False, classes=3)
    pipe = quiet(pipeline(unet, TinyFlowMatchScheduler(), id2label={0: "a", 1: "b", 2: "c"}))
    pipe.save_pretrained(tmp_path)
    options = {**arguments_of(pipeline), "class_labels": "b", "guidance_scale": 2.0}
    expected = pipe(generator=image_generators(0, 2), **options).images
    loaded = TinyPipeline.from_pretrained(tmp_path)
    assert type(loaded) is pipeline
    for other in (loaded, pipeline.from_pretrained(tmp_path), pipeline.from_pipe(loaded)):
        torch.testing.assert_close(quiet(other)(generator=image_generators(0, 2), **options).images, expected)


@pytest.mark.parametrize("pipeline", EDITING)
def test_a_callback_sees_and_stops_each_evaluation(make_unet, quiet, pipeline):
    pipe = quiet(pipeline(make_unet(), TinyDDIMScheduler()))
    seen = []

    def on_step_end(pipe, step, timestep, tensors):
        seen.append((step, tuple(tensors["latents"].shape)))
        pipe._interrupt = step == 1
        return tensors

    pipe(callback_on_step_end=on_step_end, **arguments_of(pipeline))
    assert seen == [(0, (2, 1, 8, 8)), (1, (2, 1, 8, 8))]


@pytest.mark.parametrize("pipeline", EDITING)
def test_output_types_are_one_image_in_several_forms(make_unet, quiet, pipeline):
    pipe = quiet(pipeline(make_unet(channels=3), TinyDDIMScheduler()))
    options = arguments_of(pipeline) | {"image": pictures(3), "generator": torch.Generator()}

    def draw(output_type):
        options["generator"].manual_seed(0)
        return pipe(**options | {"output_type": output_type}).images

    pt = draw("pt")
    assert pt.min() >= 0 and pt.max() <= 1
    np.testing.assert_array_equal(draw("np"), pt.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(np.asarray(draw("pil")[0]), (draw("np")[0] * 255).round().astype(np.uint8))
    torch.testing.assert_close((draw("latent") / 2 + 0.5).clamp(0, 1), pt)
    images = pipe(**options, return_dict=False)
    assert isinstance(images, tuple) and images[0].shape == (2, 3, 8, 8)


@pytest.mark.parametrize("pipeline", EDITING)
def test_pil_images_of_another_size_and_mode_are_converted(make_unet, quiet, pipeline):
    pipe = quiet(pipeline(make_unet(channels=3), TinyDDIMScheduler()))
    image = Image.fromarray(np.tile(np.arange(16, dtype=np.uint8) * 17, (16, 1)))
    options = arguments_of(pipeline) | {"image": image}
    if pipeline is TinyInpaintPipeline:
        options["mask_image"] = Image.new("1", (16, 16))
        options["mask_image"].paste(1, (8, 0, 16, 16))
    elif pipeline is TinyRestorationPipeline:
        options["image"] = image.resize((8, 8))
    assert pipe(**options).images.shape == (1, 3, 8, 8)


# --------------------------------------------------------------------------------------------------- variations


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_strength_0_returns_the_image_and_1_has_nothing_of_it(make_unet, quiet, scheduler):
    pipe = quiet(TinyImg2ImgPipeline(make_unet(), scheduler()))
    image = pictures()
    torch.testing.assert_close(pipe(image, strength=0.0, **QUICK).images, image)
    whole = pipe(image, strength=1.0, generator=image_generators(0, 2), **QUICK).images
    samples = quiet(TinyPipeline(**pipe.components))(2, generator=image_generators(0, 2), **QUICK).images
    torch.testing.assert_close(whole, samples)


SOLVERS = ["DPMSolverMultistep", "EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete", "KDPM2Discrete"]
SOLVERS += ["DEISMultistep", "UniPCMultistep", "DDIM", "DDPM"]


@pytest.mark.parametrize(
    "name", [*SOLVERS, "tiny DDIM", "tiny DDPM", "tiny flow", "tiny EDM", "flow", "EDM", "heun", "SA"]
)
def test_a_variation_of_an_ideal_network_is_as_near_as_its_noise_allows(quiet, name):
    """At a low strength the mixture's nearest mode stays that of the image, at a high one it is drawn anew."""
    ours = {
        "tiny DDIM": TinyDDIMScheduler(beta_schedule="cosine", clip_sample=False),
        "tiny DDPM": TinyDDPMScheduler(beta_schedule="cosine", clip_sample=False),
        "tiny flow": TinyFlowMatchScheduler(),
        "tiny EDM": TinyEDMScheduler(),
        "heun": TinyFlowMatchScheduler(solver="heun"),
        "flow": diffusers.FlowMatchEulerDiscreteScheduler(),
        "EDM": diffusers.EDMEulerScheduler(),
        "SA": diffusers.SASolverScheduler.from_config(TinyFlowMatchScheduler().config),
    }
    scheduler = ours.get(name)
    if scheduler is None:
        scheduler = getattr(diffusers, f"{name}Scheduler").from_config(ours["tiny DDIM"].config)
    pipe = quiet(TinyImg2ImgPipeline(MixtureNetwork().at_levels_of(scheduler), scheduler))
    mode = MixtureNetwork.means[0].float()  # (-0.7, -0.7)
    image = (mode / 2 + 0.5).view(1, 1, 1, 2)
    options = {"num_images": 200, "num_inference_steps": 30, "output_type": "latent"}
    distances = {}
    for strength in (0.2, 1.0):
        generator = torch.Generator().manual_seed(0)
        samples = pipe(image, strength=strength, generator=generator, **options).images.flatten(1)
        distances[strength] = (samples - mode).norm(dim=1)
    assert (distances[0.2] < 0.6).float().mean() > 0.9  # the modes have a deviation of 0.1 and are 1.4 apart
    assert 0.35 < (distances[1.0] < 0.6).float().mean() < 0.65  # half of the images are of this mode


def test_a_part_of_the_steps_is_run(make_unet, quiet):
    pipe = quiet(TinyImg2ImgPipeline(make_unet(), TinyDDIMScheduler()))
    for strength, evaluations in ((0.6, 6), (0.29, 3), (0.01, 1), (0.99, 9), (1.0, 10)):
        pipe(pictures(), strength=strength, num_inference_steps=10, output_type="pt")
        assert pipe.num_timesteps == evaluations
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe(pictures(), strength=0.5, num_inference_steps=10, output_type="pt")
    assert pipe.num_timesteps == 9


@pytest.mark.parametrize("scheduler", [TinyDDIMScheduler, TinyFlowMatchScheduler, TinyEDMScheduler])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_inversion_reproduces_the_image_under_the_same_condition(make_unet, quiet, scheduler, strength):
    unet = make_unet(stock=False, classes=2)
    with torch.no_grad():  # small outputs make the map from noise to image invertible
        for parameter in unet.conv_out.parameters():
            parameter.mul_(0.1)
    is_ddim = scheduler is TinyDDIMScheduler
    options = {"clip_sample": False, "prediction_type": "v_prediction"} if is_ddim else {}
    pipe = quiet(TinyImg2ImgPipeline(unet, scheduler(**options)))
    image = pictures() * 0.8 + 0.1
    options = {"strength": strength, "inversion": True, "num_inference_steps": 20, "output_type": "pt"}
    same = pipe(image, class_labels=1, source_class_labels=1, **options).images
    again = pipe(image, guidance_scale=0.0, **options).images
    for images in (same, again):
        assert -10 * torch.log10((images - image).square().mean()) > 30


def test_the_guidance_interval_is_a_share_of_all_steps(make_unet, quiet):
    unet = make_unet(stock=False, classes=2)
    pipe = quiet(TinyImg2ImgPipeline(unet, TinyDDIMScheduler()))
    options = {"strength": 0.5, "class_labels": 1, "num_inference_steps": 10, "output_type": "pt"}

    def draw(**more):
        return pipe(pictures(), generator=image_generators(0, 2), clip_sample=True, **options | more).images

    torch.testing.assert_close(draw(guidance_scale=5.0, guidance_interval=(0.0, 0.5)), draw())
    assert not torch.allclose(draw(guidance_scale=5.0, guidance_interval=(0.5, 1.0)), draw(), atol=1e-3)


# --------------------------------------------------------------------------------------------------- inpainting


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_known_pixels_come_back_to_the_bit_and_the_others_are_painted(make_unet, quiet, scheduler):
    pipe = quiet(TinyInpaintPipeline(make_unet(channels=3), scheduler()))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    image = [Image.fromarray(picture) for picture in pixels]
    mask = Image.fromarray((HALF.numpy() * 255).astype(np.uint8))
    results = pipe(image, mask, num_images=2, num_inference_steps=4).images
    for i, result in enumerate(results):
        np.testing.assert_array_equal(np.asarray(result)[:, :4], pixels[i // 2][:, :4])
        assert (np.asarray(result)[:, 4:] != pixels[i // 2][:, 4:]).mean() > 0.5


def test_each_step_is_taken_as_often_as_asked_for(make_unet, quiet):
    pipe = quiet(TinyInpaintPipeline(make_unet(), TinyDDIMScheduler()))
    seen = []

    def on_step_end(pipe, step, timestep, tensors):
        seen.append(int(timestep))
        return tensors

    options = {"num_inference_steps": 5, "jump_length": 2, "jump_n_sample": 2}
    pipe(pictures(), HALF, callback_on_step_end=on_step_end, **options)
    assert seen == [800, 600, 800, 600, 400, 200, 400, 200, 0, 0] and pipe.num_timesteps == 10


def test_a_mask_for_each_image(make_unet, quiet):
    pipe = quiet(TinyInpaintPipeline(make_unet(), TinyDDIMScheduler()))
    masks = torch.stack([HALF, 1 - HALF])
    image = pictures()
    for mask in (masks, masks[:, None], masks.numpy(), [masks[0], masks[1]]):
        results = pipe(image, mask, **QUICK).images
        torch.testing.assert_close(results[0, :, :, :4], image[0, :, :, :4])
        torch.testing.assert_close(results[1, :, :, 4:], image[1, :, :, 4:])


# --------------------------------------------------------------------------------------------------- restoration


def blurred_kernel() -> torch.Tensor:
    line = torch.tensor([0.25, 0.5, 0.25])
    return torch.outer(line, line)


OPERATORS = {
    "inpaint": {"operator": "inpaint", "mask_image": HALF},
    "super_resolution": {"operator": "super_resolution", "factor": 2},
    "colorize": {"operator": "colorize"},
    "deblur": {"operator": "deblur", "kernel": blurred_kernel()},
    "difference": {"operator": lambda x: x[..., 1:] - x[..., :-1]},
}


@pytest.mark.parametrize("method", ["ddnm", "pigdm"])
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("scheduler", [TinyDDIMScheduler, TinyFlowMatchScheduler, TinyEDMScheduler])
def test_without_noise_the_results_give_the_observation(make_unet, quiet, scheduler, name, method):
    pipe = quiet(TinyRestorationPipeline(make_unet(channels=3), scheduler()))
    options = OPERATORS[name]
    y = pipe.observe(pictures(3), **options)
    results = pipe(y, method=method, num_images=2, num_inference_steps=5, output_type="latent", **options).images
    again = pipe._prepare_operator(**{"mask_image": None, "factor": None, "kernel": None} | options)
    assert results.abs().max() < 1e3
    torch.testing.assert_close(
        again(results), again(2 * pictures(3) - 1).repeat_interleave(2, dim=0), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_is_its_singular_value_decomposition(name):
    operators = {
        "inpaint": LinearOperator.inpaint((3, 8, 8), HALF > 0),
        "super_resolution": LinearOperator.super_resolution((3, 8, 8), 2),
        "colorize": LinearOperator.colorize((3, 8, 8)),
        "deblur": LinearOperator.deblur((3, 8, 8), blurred_kernel()),
        "difference": LinearOperator.from_callable(OPERATORS["difference"]["operator"], (3, 8, 8)),
    }
    operator = operators[name]
    x = 2 * pictures(3) - 1
    z = operator.coordinates(x)
    y = operator(x)
    assert y.shape == (2, *operator.output_shape) and z[0].numel() == operator.rank
    torch.testing.assert_close(operator.observed_coordinates(y), z, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(
        operator.coordinates(operator.from_coordinates(z)), z, atol=1e-5, rtol=1e-4
    )  # V^T V = 1
    torch.testing.assert_close(operator(operator.from_coordinates(z)), y, atol=1e-4, rtol=1e-3)  # A A^+ A = A
    expected = torch.linalg.svdvals(
        torch.stack([operator(e[None]).flatten() for e in torch.eye(192).view(-1, 3, 8, 8)], dim=1).double()
    )
    expected = expected[expected > 1e-4 * expected[0]]
    found = operator.singular_values.flatten().sort(descending=True).values.double()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_tasks_are_what_their_names_say():
    x = pictures(3)
    pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8)
    gray = LinearOperator.colorize((3, 8, 8))(pixels.permute(2, 0, 1)[None].float())[0, 0]
    expected = np.asarray(Image.fromarray(pixels.numpy()).convert("L"))
    assert np.abs(gray.round().numpy() - expected).max() <= 1
    pooled = LinearOperator.super_resolution((3, 8, 8), 4)(x)
    torch.testing.assert_close(pooled, torch.nn.functional.avg_pool2d(x, 4))
    kept = LinearOperator.inpaint((3, 8, 8), HALF > 0)(x)
    torch.testing.assert_close(kept, x[..., :4].reshape(2, 3, 32))
    constant = torch.full((1, 3, 8, 8), 0.3)  # a blur keeps what has no edges, up to the border
    torch.testing.assert_close(LinearOperator.deblur((3, 8, 8), blurred_kernel())(constant), constant)


@pytest.mark.parametrize(
    ("options", "mean_limit", "covariance_limit"),
    [
        ({"method": "ddnm"}, 0.25, 0.35),
        ({"method": "ddnm", "jump_n_sample": 3}, 0.12, 0.35),
        ({"method": "pigdm"}, 0.35, 0.35),
        ({"pipeline": "inpaint"}, 0.25, 0.3),
    ],
)
def test_samples_are_near_the_exact_posterior(options, mean_limit, covariance_limit):
    """docs/editing.md has the errors of all methods and cases, by check_restoration.py."""
    for noise_std in (0.0,) if "pipeline" in options else (0.0, 0.1):
        mean, covariance = check_restoration.errors("flow", "half", noise_std, num_images=500, **options)
        assert mean < mean_limit and covariance < covariance_limit


@pytest.mark.parametrize("variance", [0.01, 0.25, 8.0], ids=["below r^2", "r^2", "above r^2"])
def test_guidance_by_an_observation_leads_to_it_and_not_beyond(variance):
    """As far as the exact posterior, of pixels that vary as is supposed, and never farther than the observation."""
    signal, level, deviation = 0.3, 0.7, 0.05
    operator = LinearOperator.inpaint((1, 8, 8), HALF > 0)
    x_t = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    gain = signal * variance / (signal**2 * variance + level**2)  # of x_0 = E[x_0 | x_t]
    z = operator.coordinates(torch.ones(4, 1, 8, 8))
    observation = pipeline_tiny_restoration._Observation(operator, z, torch.full(z.shape[1:], deviation))
    step = pipeline_tiny_restoration._Step(signal, 1.0, level, 0.0, 1.0)
    found = pipeline_tiny_restoration._pigdm_step(x_t, lambda x: gain * x, step, observation, torch.zeros_like(x_t))
    before, after = (observation.missing(x) for x in (gain * x_t, found))
    assert ((before * after).flatten(1).sum(dim=1) > 0).all() and after.norm() < before.norm()
    left = variance * level**2 / (signal**2 * variance + level**2)  # Var[x_0 | x_t]
    if variance >= 0.25:
        torch.testing.assert_close(after, before * deviation**2 / (left + deviation**2), atol=1e-5, rtol=1e-4)


def test_statistics_are_those_of_the_samples(make_unet, quiet):
    pipe = quiet(TinyRestorationPipeline(make_unet(channels=3), TinyDDIMScheduler()))
    options = {"operator": "colorize", "num_images": 4, "return_statistics": True, "generator": torch.Generator()}
    output = pipe(pictures(1), **QUICK, **options)
    samples = output.images.unflatten(0, (2, 4))
    torch.testing.assert_close(output.mean, samples.mean(dim=1))
    torch.testing.assert_close(output.std, samples.std(dim=1, correction=0))
    output = pipe(pictures(1), num_inference_steps=2, **options)
    assert [image.size for image in output.mean + output.std] == [(8, 8)] * 4


def test_the_matrix_of_a_function_is_built_anew_only_if_its_values_change(make_unet, quiet):
    pipe = quiet(TinyRestorationPipeline(make_unet(), TinyDDIMScheduler()))
    calls, weights = [], torch.ones(8, 8)

    def total(x):
        calls.append(len(x))
        return (weights * x).sum(dim=(1, 2, 3))[:, None]

    y = torch.zeros(1, 1)
    pipe(y, total, **QUICK)
    assert sum(calls) == 64 + 3  # all pixels, and whether it is linear
    pipe(y, total, **QUICK)
    assert sum(calls) == 64 + 4  # whether it is still the same
    weights[0] = 2
    x = pipe(y, total, **QUICK | {"output_type": "latent"}).images
    assert sum(calls) == 2 * (64 + 3) + 2
    torch.testing.assert_close(total(x), y, atol=1e-3, rtol=0)


# --------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("pipeline", "arguments", "message"),
    [
        (TinyImg2ImgPipeline, {"strength": 1.1}, "`strength` must be in"),
        (TinyImg2ImgPipeline, {"strength": float("nan")}, "`strength` must be in"),
        (TinyImg2ImgPipeline, {"num_inference_steps": 1}, "at least two steps"),
        (TinyImg2ImgPipeline, {"num_images": 0}, "`num_images`"),
        (TinyImg2ImgPipeline, {"generator": [torch.Generator()]}, "one per image"),
        (TinyImg2ImgPipeline, {"class_labels": 1}, "has no classes"),
        (TinyImg2ImgPipeline, {"source_class_labels": 1}, "inversion=True"),
        (TinyInpaintPipeline, {"mask_image": torch.zeros(8, 8)}, "all black"),
        (TinyInpaintPipeline, {"mask_image": torch.ones(8, 8)}, "all white"),
        (TinyInpaintPipeline, {"mask_image": torch.zeros(8, 9)}, "size of the image"),
        (TinyInpaintPipeline, {"mask_image": 2 * HALF}, r"`mask_image` must lie in \[0, 1\]"),
        (TinyInpaintPipeline, {"mask_image": torch.stack([HALF] * 3)}, "one for each of 2"),
        (TinyInpaintPipeline, {"mask_image": torch.stack([HALF] * 3)[None]}, "size of the image"),
        (TinyInpaintPipeline, {"jump_length": 0}, "`jump_length`"),
        (TinyInpaintPipeline, {"jump_n_sample": 1.5}, "`jump_n_sample`"),
        (TinyRestorationPipeline, {"operator": "sharpen"}, "super_resolution"),
        (TinyRestorationPipeline, {"mask_image": None}, "`mask_image` is needed"),
        (TinyRestorationPipeline, {"factor": 2}, "by no other"),
        (TinyRestorationPipeline, {"operator": "super_resolution", "mask_image": None, "factor": 3}, "divides"),
        (TinyRestorationPipeline, {"operator": "colorize", "mask_image": None}, "colored"),
        (
            TinyRestorationPipeline,
            {"operator": "deblur", "mask_image": None, "kernel": torch.ones(2, 2) / 4},
            "odd sides",
        ),
        (TinyRestorationPipeline, {"operator": "deblur", "mask_image": None, "kernel": torch.ones(3, 3)}, "sum 1"),
        (TinyRestorationPipeline, {"operator": lambda x: x**2, "mask_image": None}, "not linear"),
        (TinyRestorationPipeline, {"operator": lambda x: x + 1, "mask_image": None}, "not linear"),
        (TinyRestorationPipeline, {"operator": lambda x: x / 0, "mask_image": None}, "not finite"),
        (TinyRestorationPipeline, {"operator": lambda x: x.sum(), "mask_image": None}, "must map"),
        (TinyRestorationPipeline, {"operator": lambda x: 0 * x, "mask_image": None}, "nothing is observed"),
        (TinyRestorationPipeline, {"operator": lambda x: x[:, :, :4], "mask_image": None}, "of shape"),
        (TinyRestorationPipeline, {"image": (255 * pictures()).byte()}, "floats in"),
        (TinyRestorationPipeline, {"image": [Image.new("L", (8, 8)), Image.new("L", (9, 8))]}, "must have the size"),
        (
            TinyRestorationPipeline,
            {"operator": lambda x: x, "mask_image": None, "image": Image.new("L", (8, 8))},
            "the function's values",
        ),
        (TinyRestorationPipeline, {"noise_std": -1.0}, "`noise_std`"),
        (TinyRestorationPipeline, {"method": "dps"}, "ddnm, pigdm"),
        (TinyRestorationPipeline, {"eta": 2.0}, "`eta` must be in"),
    ],
)
def test_invalid_input_is_refused_in_one_line(make_unet, quiet, pipeline, arguments, message):
    pipe = quiet(pipeline(make_unet(), TinyDDIMScheduler()))
    with pytest.raises(ValueError, match=message) as error:
        pipe(**arguments_of(pipeline) | arguments)
    assert "\n" not in str(error.value)


def test_a_mask_of_another_size_than_its_picture_is_refused(make_unet, quiet):
    pipe = quiet(TinyInpaintPipeline(make_unet(), TinyDDIMScheduler()))
    with pytest.raises(ValueError, match=r"size of the image, \(16, 16\), got \(8, 8\)"):
        pipe(Image.new("L", (16, 16)), Image.new("L", (8, 8), 255), **QUICK)


def test_schedulers_that_the_method_is_not_defined_for_are_refused(make_unet, quiet):
    for pipeline in (TinyInpaintPipeline, TinyRestorationPipeline):
        pipe = quiet(pipeline(make_unet(), TinyDDIMScheduler()))
        pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        with pytest.raises(ValueError, match="back and forth.*TinyDDIMScheduler"):
            pipe(**arguments_of(pipeline))
        pipe = quiet(pipeline(make_unet(), TinyFlowMatchScheduler(solver="heun")))
        with pytest.raises(ValueError, match='solver="euler"'):
            pipe(**arguments_of(pipeline))
    for name in ("PNDM", "LMSDiscrete"):
        pipe = quiet(TinyImg2ImgPipeline(make_unet(), TinyDDIMScheduler()))
        pipe.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(pipe.scheduler.config)
        with pytest.raises(ValueError, match="can't begin"):
            pipe(pictures(), num_inference_steps=20, output_type="pt")


@pytest.mark.parametrize("scheduler", [TinyFlowMatchScheduler, TinyEDMScheduler])
def test_what_leaves_the_order_of_the_steps_takes_eulers(make_unet, quiet, scheduler):
    unet = make_unet()
    for pipeline, options in (
        (TinyImg2ImgPipeline, {"image": pictures(), "inversion": True}),
        (TinyInpaintPipeline, {"image": pictures(), "mask_image": HALF, "jump_n_sample": 2}),
        (TinyRestorationPipeline, {"image": pictures(), "operator": "inpaint", "mask_image": HALF}),
        (TinyInterpolationPipeline, {"images": pictures(), "num_frames": 3}),
    ):
        pipes = [quiet(pipeline(unet, scheduler(solver=solver))) for solver in ("multistep", "euler")]
        images = [pipe(generator=torch.Generator().manual_seed(0), **options, **QUICK).images for pipe in pipes]
        assert torch.equal(*images)
    assert torch.equal(*(pipe.invert(pictures()) for pipe in pipes))


def test_inversion_needs_a_class_that_was_trained(make_unet, quiet):
    pipe = quiet(TinyImg2ImgPipeline(make_unet(classes=2), TinyDDIMScheduler(), class_dropout_prob=0.0))
    with pytest.raises(ValueError, match="source_class_labels"):
        pipe(pictures(), inversion=True, class_labels=1, **QUICK)
    assert pipe(pictures(), inversion=True, class_labels=1, source_class_labels=0, **QUICK).images.shape == (
        2,
        1,
        8,
        8,
    )
