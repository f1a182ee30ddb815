"""An image as a condition: what of an image it is, how it enters the network, how it guides, and what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tiny_diffusers import (
    TinyConditionalPipeline,
    TinyDDIMScheduler,
    TinyEDMScheduler,
    TinyFlowMatchScheduler,
    TinyImg2ImgPipeline,
    TinyInpaintPipeline,
    TinyInterpolationPipeline,
    TinyPipeline,
    TinyRestorationPipeline,
)
from tiny_diffusers.pipelines.pipeline_tiny_operators import Conditioning


KINDS = [("grayscale", 3), ("low_resolution:2", 1), ("low_resolution:4", 3), ("image:3", 1)]


@pytest.fixture
def make_pipe(make_unet, quiet):
    """Builds a pipeline of 8x8 images with a conditioning image."""

    def make(kind="low_resolution:2", channels=1, classes=None, scheduler=None, learned=False, stock=False, **options):
        further = Conditioning(kind, (channels, 8, 8)).shape[0]
        config = {"in_channels": channels + further, "out_channels": channels * (2 if learned else 1)}
        unet = make_unet(stock, classes=classes, **config)
        scheduler = scheduler or TinyDDIMScheduler()
        return quiet(TinyConditionalPipeline(unet, scheduler, conditioning=kind, **options))

    return make


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(pipe, image, **options):
    options = {"num_inference_steps": 3, "generator": generator(), "output_type": "np", **options}
    return pipe(image=image, **options).images


def test_gray_is_the_gray_of_pil_and_low_resolution_the_means_of_squares():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    sample = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    for kind, expected in (
        ("grayscale", np.asarray(Image.fromarray(pixels).convert("L"))[None]),
        ("low_resolution:4", np.asarray(Image.fromarray(pixels).reduce(4)).transpose(2, 0, 1)),
    ):
        conditioning = Conditioning(kind, (3, 8, 8))
        observed = conditioning.observe(sample)
        assert observed.shape == (1, *conditioning.shape) == (1, *expected.shape)
        np.testing.assert_allclose(observed[0], expected, atol=1)
        enlarged = conditioning.enlarge(observed)
        assert enlarged.shape[2:] == (8, 8)
        torch.testing.assert_close(conditioning.enlarge(observed.flip(-1)), enlarged.flip(-1), rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "channels"), KINDS)
def test_the_channels_of_the_image_follow_from_those_of_the_network(kind, channels):
    conditioning = Conditioning(kind, (channels, 8, 8))
    assert Conditioning.of_network(kind, channels + conditioning.shape[0], 8, 8) == conditioning


@pytest.mark.parametrize(
    ("kind", "shape", "words"),
    [
        ("greyscale", (3, 8, 8), "'greyscale' is not grayscale, low_resolution:FACTOR"),
        ("low_resolution", (3, 8, 8), "such as low_resolution:2"),
        ("grayscale", (1, 8, 8), "3 channels, but these have 1"),
        ("low_resolution:3", (3, 8, 8), r"divides the image's size \(8, 8\)"),
        ("low_resolution:1", (3, 8, 8), "at least 2"),
        ("low_resolution:-2", (3, 8, 8), "positive integer"),
        ("image:0", (3, 8, 8), "positive integer"),
    ],
)
def test_what_no_image_has_is_refused(kind, shape, words):
    with pytest.raises(ValueError, match=words):
        Conditioning(kind, shape)


@pytest.mark.parametrize("kind", ["image:2", "image:9", "low_resolution:2", "grayscale", "sepia"])
def test_a_conditioning_that_does_not_fit_the_network_is_refused(make_unet, kind):
    unet = make_unet(stock=False, in_channels=1 if kind == "image:2" else 3, out_channels=1)
    with pytest.raises(ValueError, match=kind):
        TinyConditionalPipeline(unet, TinyDDIMScheduler(), conditioning=kind)


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize(("kind", "channels"), KINDS)
def test_the_image_decides_the_sample(make_pipe, kind, channels, stock):
    pipe = make_pipe(kind, channels, stock=stock)
    shape = pipe._conditioning.shape
    dark, bright = torch.zeros(1, *shape), torch.ones(1, *shape)
    samples = [draw(pipe, image) for image in (dark, bright, bright)]
    assert samples[0].shape == (1, 8, 8, channels)
    assert np.abs(samples[0] - samples[1]).max() > 0.01
    np.testing.assert_array_equal(samples[1], samples[2])


@pytest.mark.parametrize("scheduler", [TinyDDIMScheduler, TinyFlowMatchScheduler, TinyEDMScheduler])
@pytest.mark.parametrize("classes", [None, 3])
def test_guidance_leads_away_from_neither_class_nor_image(make_pipe, scheduler, classes):
    pipe = make_pipe(classes=classes, scheduler=scheduler())
    x, image = torch.randn(2, 1, 8, 8, generator=generator()), torch.rand(2, 1, 8, 8, generator=generator(1))
    labels = None if classes is None else torch.tensor([0, 2])
    null = {} if classes is None else {"class_labels": torch.tensor([3, 3])}
    condition = {} if classes is None else {"class_labels": labels}
    pipe._num_timesteps, timestep = 1, torch.tensor(0.5)
    with torch.no_grad():
        with_image = pipe.unet(torch.cat([x, image], dim=1), timestep, **condition).sample
        without = pipe.unet(torch.cat([x, torch.zeros_like(image)], dim=1), timestep, **null).sample
        for w in (0.0, 1.0, 2.5):
            guided = pipe._guided_predict(labels, w, (0.0, 1.0), image)(x, timestep, 0)
            torch.testing.assert_close(guided, w * with_image + (1 - w) * without, atol=1e-5, rtol=1e-5)


def test_without_guidance_no_image_is_needed_and_none_counts(make_pipe):
    pipe = make_pipe()
    expected = draw(pipe, None, guidance_scale=0)
    np.testing.assert_array_equal(draw(pipe, torch.ones(1, 1, 4, 4), guidance_scale=0), expected)
    assert draw(pipe, None, guidance_scale=0, batch_size=3).shape == (3, 8, 8, 1)


def test_a_learned_variance_stays_that_of_the_condition(make_pipe):
    scheduler = TinyDDIMScheduler(variance_type="learned_range")
    pipe = make_pipe("image:3", learned=True, scheduler=scheduler)
    assert draw(pipe, torch.ones(2, 3, 8, 8), guidance_scale=2.0).shape == (2, 8, 8, 1)


def test_every_form_of_an_image_is_the_same_condition(make_pipe):
    pipe = make_pipe("image:3")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    array = np.float32(pixels) / 255
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
    expected = draw(pipe, array)
    for form in (tensor, [Image.fromarray(image) for image in pixels], list(tensor)):
        np.testing.assert_allclose(draw(pipe, form), expected, atol=1e-6)


def test_one_image_is_for_all_samples_and_each_sample_is_independent_of_its_batch(make_pipe):
    pipe = make_pipe(classes=3)
    image = torch.rand(2, 1, 4, 4, generator=generator())
    batch = draw(pipe, image, class_labels=[0, 1], generator=[generator(0), generator(1)])
    for i in range(2):
        alone = draw(pipe, image[i : i + 1], class_labels=[i], generator=[generator(i)])
        np.testing.assert_allclose(alone, batch[i : i + 1], atol=1e-5)
    assert draw(pipe, image[:1], class_labels=[0, 1, 2]).shape[0] == 3
    assert draw(pipe, image[:1], class_labels=0, batch_size=3).shape[0] == 3
    assert draw(pipe, image, class_labels=0).shape[0] == 2


def test_the_condition_of_a_whole_image_is_made_on_request(make_pipe):
    picture = Image.fromarray(np.uint8(np.arange(64).reshape(8, 8)))
    observed = make_pipe().observe(picture)
    np.testing.assert_allclose(observed[0, 0] * 255, np.asarray(picture.reduce(2)), atol=0.51)
    assert make_pipe("grayscale", 3).observe(Image.new("RGB", (8, 8), "white")).eq(1).all()
    with pytest.raises(ValueError, match="another image .image:3., which can't be made"):
        make_pipe("image:3").observe(picture)


@pytest.mark.parametrize("stock", [False, True])
def test_it_is_saved_with_the_pipeline(make_pipe, quiet, tmp_path, stock):
    pipe = make_pipe(classes=3, stock=stock)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "TinyConditionalPipeline"  # no stock pipeline gives the image
    assert index["unet"][0] == "diffusers" or not stock
    loaded = quiet(TinyPipeline.from_pretrained(tmp_path))
    assert type(loaded) is TinyConditionalPipeline and loaded.config.conditioning == "low_resolution:2"
    image = torch.rand(1, 1, 4, 4, generator=generator())
    np.testing.assert_allclose(draw(loaded, image, class_labels=1), draw(pipe, image, class_labels=1), atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("low_resolution:2", {}, "needs `image`: give a gray image of 4x4 pixels .*`guidance_scale=0`"),
        ("low_resolution:2", {"image": Image.new("L", (8, 8))}, r"4x4 pixels.*`pipe.observe\(image\)`.*\(8, 8\)"),
        ("low_resolution:2", {"image": Image.new("RGB", (4, 4))}, "gray image of 4x4.*mode RGB"),
        ("low_resolution:2", {"image": np.zeros((1, 8, 8, 1), np.float32)}, r"4x4 pixels.*\(1, 1, 8, 8\)"),
        ("low_resolution:2", {"image": np.full((1, 4, 4, 1), 2.0)}, r"must lie in \[0, 1\]"),
        ("low_resolution:2", {"image": torch.zeros(2, 1, 4, 4), "batch_size": 3}, "one for each of 3 samples, got 2"),
        ("image:3", {"image": torch.zeros(1, 1, 8, 8)}, r"a color image of 8x8 pixels \(image:3\): .*\(1, 1, 8, 8\)"),
        (None, {"image": torch.zeros(1, 1, 8, 8)}, "takes no image as a condition: leave out `image`"),
    ],
)
def test_an_image_that_is_not_the_condition_is_one_clear_line(make_pipe, make_unet, quiet, kind, options, words):
    plain = quiet(TinyConditionalPipeline(make_unet(stock=False), TinyDDIMScheduler()))
    with pytest.raises(ValueError, match=words) as error:
        (plain if kind is None else make_pipe(kind))(num_inference_steps=1, **options)
    assert "\n" not in str(error.value)


def test_guidance_by_an_image_that_was_never_dropped_warns(make_pipe):
    with pytest.warns(UserWarning, match="won't help.*drops conditions and conditioning images as well"):
        draw(make_pipe(class_dropout_prob=0.0), torch.zeros(1, 1, 4, 4), guidance_scale=2.0)


@pytest.mark.parametrize(
    "other", [TinyImg2ImgPipeline, TinyInpaintPipeline, TinyInterpolationPipeline, TinyRestorationPipeline]
)
def test_pipelines_that_cannot_give_the_image_refuse_the_network(make_pipe, tmp_path, other):
    pipe = make_pipe()
    with pytest.raises(
        ValueError, match=f"image as a condition .*{other.__name__} can't give.*TinyConditionalPipeline"
    ):
        other.from_pipe(pipe)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{other.__name__} can't give"):
        other.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="takes 2 channels and gives 1"):
        TinyPipeline(**pipe.components)()


def test_an_unconditional_pipeline_refuses_it_also_with_a_learned_variance(make_pipe, make_unet):
    pipe = make_pipe("image:1", learned=True, scheduler=TinyDDIMScheduler(variance_type="learned_range"))
    with pytest.raises(ValueError, match=r"condition \(image:1\), which TinyPipeline can't give"):
        TinyPipeline.from_pipe(pipe)
    assert TinyPipeline.from_pipe(pipe, unet=make_unet(stock=False))._image_shape == (1, 8, 8)
    assert TinyConditionalPipeline.from_pipe(pipe).config.conditioning == "image:1"
