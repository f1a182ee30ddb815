import logging
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from diffusers.utils import export_to_gif

from tiny_diffusers.pipelines import TinyConditionalPipeline, TinyInterpolationPipeline, TinyPipeline
from tiny_diffusers.pipelines.pipeline_tiny import image_generators, slerp
from tiny_diffusers.schedulers import TinyDDIMScheduler, TinyDDPMScheduler


QUICK = {"num_inference_steps": 4, "eta": 0.0, "output_type": "pt"}


@pytest.fixture
def pipe(make_unet, quiet):
    return quiet(TinyInterpolationPipeline(make_unet(), TinyDDIMScheduler(prediction_type="v_prediction")))


@pytest.fixture(params=["stock", "tiny"])
def conditional(request, make_unet, quiet):
    unet = make_unet(stock=request.param == "stock", classes=3)
    return quiet(TinyInterpolationPipeline(unet, TinyDDIMScheduler(), id2label={0: "cat", 1: "dog", 2: "frog"}))


def noise(count: int) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------------------------------------------- the path


def test_slerp_stays_on_the_sphere_with_equal_angles():
    x, y = noise(2).double().split(1)
    x, y = x / x.norm(), y / y.norm()
    path = slerp(x, y, torch.linspace(0, 1, 5, dtype=torch.float64).view(-1, 1, 1, 1))
    torch.testing.assert_close(path.flatten(1).norm(dim=1), torch.ones(5, dtype=torch.float64))
    cosines = (path[1:] * path[:-1]).sum(dim=(1, 2, 3))
    torch.testing.assert_close(cosines, cosines[:1].expand(4))
    torch.testing.assert_close(path[0], x[0])
    torch.testing.assert_close(path[-1], y[0])


def test_slerp_of_collinear_points_is_linear():
    x, share = noise(1), torch.tensor([0.0, 0.5, 1.0]).view(-1, 1, 1, 1)
    torch.testing.assert_close(slerp(x, 3 * x, share), torch.lerp(x, 3 * x, share))
    assert torch.isfinite(slerp(x, -x, share)).all()


@pytest.mark.parametrize("interpolation", ["slerp", "linear"])
def test_the_ends_are_the_two_samples(pipe, quiet, interpolation):
    alone = quiet(TinyPipeline(**{name: pipe.components[name] for name in ("unet", "scheduler")}))
    latents = noise(2)
    frames = pipe(latents=latents, num_frames=5, interpolation=interpolation, **QUICK).images
    for end, frame in ((latents[:1], frames[0]), (latents[1:], frames[-1])):
        torch.testing.assert_close(alone(latents=end, **QUICK).images[0], frame, atol=1e-4, rtol=0)

    frames = pipe(seeds=(3, 4), num_frames=3, interpolation=interpolation, **QUICK).images
    for seed, frame in ((3, frames[0]), (4, frames[-1])):
        image = alone(generator=[torch.Generator().manual_seed(seed)], **QUICK).images[0]
        torch.testing.assert_close(image, frame, atol=1e-4, rtol=0)


def test_the_frames_are_in_order_and_the_path_is_smooth(pipe):
    frames = pipe(seeds=(0, 1), num_frames=9, **QUICK).images
    to_start = (frames - frames[:1]).flatten(1).norm(dim=1)
    steps = (frames[1:] - frames[:-1]).flatten(1).norm(dim=1)
    assert len(frames) == 9 and to_start[-1] > to_start[1]
    assert steps.max() < 0.5 * to_start[-1]


def test_linear_interpolation_has_less_noise_than_slerp(pipe):
    middle = {}
    for kind in ("slerp", "linear"):
        output = pipe(latents=noise(2), num_frames=3, interpolation=kind, return_intermediates=4, **QUICK)
        middle[kind] = output.intermediates[0].sample[1].std()
    assert middle["linear"] < middle["slerp"]


def test_frames_are_ready_for_a_gif(pipe, tmp_path):
    frames = pipe(seeds=(0, 1), num_frames=np.int64(4), num_inference_steps=2).images
    assert all(isinstance(frame, PIL.Image.Image) for frame in frames)
    with PIL.Image.open(export_to_gif(frames, str(tmp_path / "walk.gif"))) as gif:
        assert gif.n_frames == 4 and gif.size == (8, 8)


def test_intermediates_are_returned_for_each_frame(pipe):
    output = pipe(seeds=(0, 1), num_frames=3, num_inference_steps=4, output_type="np", return_intermediates=2)
    assert [i.sample.shape for i in output.intermediates] == [(3, 8, 8, 1)] * 2


# ----------------------------------------------------------------------------------------------------------- classes


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_classes_are_interpolated_with_the_latents(conditional, quiet, guidance_scale):
    alone = quiet(TinyConditionalPipeline(**conditional.components, id2label=conditional.config.id2label))
    latents, arguments = noise(2), {"guidance_scale": guidance_scale, **QUICK}
    frames = conditional(latents=latents, class_labels=["cat", "frog"], num_frames=3, **arguments).images
    for i, (label, latent) in enumerate(zip(["cat", "frog"], latents.split(1), strict=True)):
        image = alone(label, latents=latent, **arguments).images[0]
        torch.testing.assert_close(image, frames[2 * i], atol=1e-4, rtol=0)
    weights = torch.tensor([[0.5, 0, 0.5, 0]])
    middle = slerp(latents[:1], latents[1:], torch.tensor([0.5]).view(-1, 1, 1, 1))
    torch.testing.assert_close(alone(weights, latents=middle, **arguments).images[0], frames[1], atol=1e-4, rtol=0)


def test_one_class_applies_to_all_frames(conditional, quiet):
    alone = quiet(TinyConditionalPipeline(**conditional.components, id2label=conditional.config.id2label))
    frames = conditional(latents=noise(2), class_labels="dog", num_frames=3, **QUICK).images
    torch.testing.assert_close(alone("dog", latents=noise(2)[:1], **QUICK).images[0], frames[0], atol=1e-4, rtol=0)
    assert len(conditional(seeds=(0, 1), guidance_scale=0.0, num_frames=2, **QUICK).images) == 2


# ------------------------------------------------------------------------------------------------ images and inversion


@pytest.mark.parametrize("scheduler", [TinyDDIMScheduler, DDIMScheduler])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_inversion_reconstructs_images(make_unet, quiet, scheduler, prediction_type):
    unet = make_unet()
    with torch.no_grad():  # small outputs make the map from noise to image invertible
        unet.conv_out.weight.mul_(0.1)
        unet.conv_out.bias.zero_()
    config = {"prediction_type": prediction_type, "clip_sample": False, "beta_end": 0.005}
    pipe = quiet(TinyInterpolationPipeline(unet, scheduler(**config)))
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    latents = pipe.invert(images, num_inference_steps=20)
    alone = quiet(TinyPipeline(unet, pipe.scheduler))
    again = alone(2, latents=latents, num_inference_steps=20, eta=0.0, output_type="pt").images
    psnr = -10 * torch.log10((again - images).square().mean())
    assert latents.shape == (2, 1, 8, 8) and psnr > 30


@pytest.mark.parametrize(
    ("name", "clip_sample"),
    [
        ("digits-8", True),
        pytest.param("digits-8", False, marks=pytest.mark.exhaustive),
        pytest.param("mnist-32", False, marks=pytest.mark.slow),
    ],
)
def test_inversion_finds_the_latents_of_a_trained_models_samples(quiet, name, clip_sample):
    pipe = quiet(TinyInterpolationPipeline.from_pretrained(Path(__file__).parents[2] / "model_cards" / name))
    alone = quiet(TinyPipeline(pipe.unet, pipe._single_step(pipe.scheduler)))  # what is inverted
    options = {"num_inference_steps": 50, "eta": 0.0, "clip_sample": True, "output_type": "pt"}
    images = alone(2, image_generators(0, 2), **options).images
    errors = []
    for steps in (12, 50):
        call = {"num_inference_steps": steps, "clip_sample": clip_sample}
        latents = pipe.invert(images, **call)
        again = alone(2, latents=latents, eta=0.0, output_type="pt", **call).images
        # near N(0, I): smooth images have less, and more so if the layers predict the image
        least = 0.3 if pipe.unet.config.x_prediction else 0.4
        assert latents.mean().abs() < 0.3 and least < latents.std() < 1.3
        errors.append(255 * (again - images).abs().mean())
    if pipe.unet.config.x_prediction:  # near with few steps already, and not nearer with more
        assert max(errors) < 2.5
    else:
        assert errors[1] < min(5, 0.75 * errors[0])


def test_images_are_accepted_in_every_form(pipe):
    pil = [PIL.Image.fromarray(np.full((8, 8), value, dtype=np.uint8)) for value in (51, 204)]
    array = np.stack([np.asarray(image) for image in pil])[..., None] / 255.0
    forms = [pil, array.astype(np.float32), torch.from_numpy(array).permute(0, 3, 1, 2).float()]
    latents = [pipe.invert(images, num_inference_steps=2) for images in forms]
    torch.testing.assert_close(latents[0], latents[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(latents[0], latents[2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pipe.invert(pil[0], num_inference_steps=2), latents[0][:1], atol=1e-5, rtol=1e-5)
    assert len(pipe(images=pil, num_frames=3, num_inference_steps=2).images) == 3
    others = [image.convert("RGB").resize((16, 16)) for image in pil]
    assert len(pipe(images=others, num_inference_steps=2).images) == 16


# ------------------------------------------------------------------------------------------------------ invalid input


@pytest.mark.parametrize(
    ("scheduler", "eta"), [(TinyDDIMScheduler, 0.5), (TinyDDPMScheduler, 0.0), (EulerAncestralDiscreteScheduler, 0.0)]
)
def test_a_path_that_is_not_smooth_is_warned_about(pipe, caplog, scheduler, eta):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    with caplog.at_level(logging.WARNING):
        pipe(seeds=(0, 1), num_frames=2, num_inference_steps=2, eta=eta)
    assert "won't be smooth" in caplog.text


@pytest.mark.parametrize("scheduler", [TinyDDIMScheduler, DDIMScheduler, EulerDiscreteScheduler])
def test_a_smooth_path_is_not_warned_about(pipe, caplog, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    with caplog.at_level(logging.WARNING):
        pipe(seeds=(0, 1), num_frames=2, num_inference_steps=2)
    assert "smooth" not in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 1}, "num_frames.*at least 2.*got 1"),
        ({"interpolation": "cubic"}, "'slerp' or 'linear', got 'cubic'"),
        ({"seeds": None}, "one of `seeds`, `latents` and `images`"),
        ({"latents": torch.zeros(2, 1, 8, 8)}, "one of `seeds`, `latents` and `images`"),
        ({"seeds": (0, 1, 2)}, "seeds.*two"),
        ({"seeds": None, "latents": torch.zeros(3, 1, 8, 8)}, "latents"),
        ({"seeds": None, "images": torch.zeros(3, 1, 8, 8)}, "images.*2 images.*got"),
        ({"class_labels": 0}, "no classes"),
        ({"num_inference_steps": 2000}, "num_inference_steps"),
        ({"generator": [torch.Generator()]}, "got 1 for a batch of 16"),
    ],
)
def test_invalid_input_is_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        pipe(**({"seeds": (0, 1)} | arguments))
    assert "\n" not in str(error.value)


def test_a_network_with_classes_needs_labels(conditional):
    with pytest.raises(ValueError, match="needs `class_labels`.*cat"):
        conditional(seeds=(0, 1))
    with pytest.raises(ValueError, match="must be one label"):
        conditional(seeds=(0, 1), class_labels=[0, 1, 2])


def test_only_ddim_inverts_images(pipe):
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="not by EulerDiscreteScheduler.*TinyDDIMScheduler.from_config"):
        pipe(images=torch.zeros(2, 1, 8, 8))
