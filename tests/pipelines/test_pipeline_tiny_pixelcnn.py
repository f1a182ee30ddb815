"""Sampling, completion and likelihoods with a PixelCNN."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from tiny_diffusers import TinyPipeline, TinyPixelCNNModel, TinyPixelCNNPipeline


WITH_LIKELIHOOD = ("gated", "plusplus", "row_lstm")
VARIANTS = ("baseline", *WITH_LIKELIHOOD)


@pytest.fixture
def make_pipe(quiet):
    """Returns a factory of pipelines with small random networks."""

    def make(variant="gated", channels=1, size=5, levels=256, classes=None, id2label=None, class_dropout_prob=None):
        torch.manual_seed(0)
        config = {"hidden_channels": 12, "num_layers": 3, "num_mixtures": 3, "num_class_embeds": classes}
        model = TinyPixelCNNModel(size, channels, levels, variant, **config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return quiet(TinyPixelCNNPipeline(model.eval(), id2label, class_dropout_prob))

    return make


def seeded(*seeds):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators if len(generators) > 1 else generators[0]


# --------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    ("channels", "size", "levels", "batch"),
    [pytest.param(1, 8, 256, 1, marks=pytest.mark.exhaustive), (3, 5, 256, 3), (3, 2, 2, 4)],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_and_naive_sampling_give_the_same_images(make_pipe, variant, channels, size, levels, batch):
    pipe = make_pipe(variant, channels, size, levels)
    cached, naive = (
        pipe(batch, generator=seeded(1), output_type="pt", use_cache=use_cache).images for use_cache in (True, False)
    )
    assert cached.shape == (batch, channels, size, size)
    assert torch.equal(cached, naive)


def test_sampling_with_the_cache_in_bfloat16_draws_levels(make_pipe):
    pipe = make_pipe(channels=3).to(torch.bfloat16)
    images = pipe(2, output_type="pt").images
    assert images.dtype == torch.float32
    assert torch.equal(pipe.pixelcnn.to_levels(images), pipe.pixelcnn.to_levels(pipe.pixelcnn.to_levels(images)))


@pytest.mark.parametrize("variant", WITH_LIKELIHOOD)
def test_a_list_of_generators_makes_each_image_independent_of_its_batch(make_pipe, variant):
    pipe = make_pipe(variant, levels=16)
    together = pipe(3, generator=seeded(5, 6, 7), output_type="pt").images
    alone = pipe(1, generator=[torch.Generator().manual_seed(6)], output_type="pt").images
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("variant", WITH_LIKELIHOOD)
def test_sample_frequencies_match_the_likelihood(make_pipe, variant):
    pipe = make_pipe(variant, channels=2, size=1, levels=3)
    every = torch.tensor(list(itertools.product([0.0, 0.5, 1.0], repeat=2))).view(-1, 2, 1, 1)
    with torch.no_grad():
        p = 2 ** (-2 * pipe.pixelcnn.nll(every))
    images = pipe(20_000, generator=seeded(0), output_type="pt").images
    index = (images.flatten(1) * 2).round().long() @ torch.tensor([3, 1])
    torch.testing.assert_close(torch.bincount(index, minlength=9) / 20_000, p, rtol=0, atol=0.015)


def test_output_types(make_pipe):
    for channels, mode in ((1, "L"), (3, "RGB")):
        pipe = make_pipe(channels=channels)
        pil, array, tensor = (pipe(2, generator=seeded(3), output_type=kind).images for kind in ("pil", "np", "pt"))
        assert [image.mode for image in pil] == [mode, mode]
        assert array.shape == (2, 5, 5, channels)
        np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
        values = np.stack([np.asarray(image) for image in pil]).reshape(array.shape)
        np.testing.assert_array_equal(values, (array * 255).round())
    assert isinstance(pipe(return_dict=False), tuple)
    assert len(pipe().images) == 1


def test_the_baseline_is_deterministic(make_pipe):
    images = make_pipe("baseline")(2, generator=seeded(1, 2), output_type="pt").images
    assert torch.equal(images[0], images[1])


def test_the_callback_sees_each_row_and_can_stop(make_pipe):
    pipe = make_pipe()
    rows = []

    def look(pipe, step, timestep, callback_kwargs):
        assert callback_kwargs["images"].shape == (1, 1, 5, 5)
        rows.append(step)
        pipe._interrupt = step == 2

    images = pipe(generator=seeded(0), callback_on_step_end=look, output_type="pt").images
    assert rows == [0, 1, 2]
    assert (images[:, :, 3:] == 0).all()
    assert torch.equal(images[:, :, :3], pipe(generator=seeded(0), output_type="pt").images[:, :, :3])


def test_the_progress_bar_counts_pixels(make_pipe):
    pipe = make_pipe(channels=3)
    totals = []

    class Bar:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self):
            totals.append(1)

    pipe.progress_bar = lambda total: totals.append(-total) or Bar()
    pipe()
    assert totals == [-25] + [1] * 25


# --------------------------------------------------------------------------------------------------- completing


@pytest.mark.parametrize("variant", VARIANTS)
def test_completion_keeps_the_given_pixels_and_samples_the_rest(make_pipe, variant):
    pipe = make_pipe(variant, channels=3, levels=16)
    images = pipe(2, generator=seeded(1, 2), output_type="pt").images
    mask = torch.zeros(5, 5, dtype=torch.bool)
    mask[:2] = True
    mask[2, :3] = True
    again = pipe(2, generator=seeded(1, 2), images=images, mask=mask, output_type="pt").images
    assert torch.equal(again, images)  # each sub-pixel has its own random numbers, so the rest is sampled as before
    if variant != "baseline":
        other = pipe(2, generator=seeded(3, 4), images=images, mask=mask, output_type="pt").images
        assert torch.equal(other[..., :2, :], images[..., :2, :])
        assert torch.equal(other[..., 2, :3], images[..., 2, :3])
        assert not torch.equal(other, images)


def test_gray_pictures_are_completed(make_pipe):
    pipe, mask = make_pipe(levels=256), torch.ones(5, 5, dtype=torch.bool)
    given = [Image.fromarray(np.full((5, 5), value, np.uint8)) for value in (0, 200)]
    for image, kept in zip(given, pipe(2, images=given, mask=mask).images, strict=True):
        np.testing.assert_array_equal(np.asarray(kept), np.asarray(image))


def test_images_and_masks_are_accepted_in_every_form(make_pipe):
    pipe = make_pipe(channels=3, levels=16)
    tensor, array, pil = (pipe(2, generator=seeded(1), output_type=kind).images for kind in ("pt", "np", "pil"))
    mask = np.zeros((2, 1, 5, 5))
    mask[0, :, :1] = 1
    mask[1, :, :4] = 1
    results = [
        pipe(images=images, mask=mask, generator=seeded(9), output_type="pt").images for images in (tensor, array, pil)
    ]
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[0][1, :, :4], tensor[1, :, :4])
    one_for_all = pipe(3, images=pil[0], mask=mask[1], output_type="pt").images
    torch.testing.assert_close(one_for_all[:, :, :4], tensor[:1, :, :4].expand(3, -1, -1, -1))


def test_channels_of_a_pixel_can_be_given(make_pipe):
    pipe = make_pipe("plusplus", channels=3, levels=16)
    images = pipe(generator=seeded(1), output_type="pt").images
    mask = torch.zeros(1, 3, 5, 5)
    mask[0, :, 0, 0] = mask[0, 0, 0, 1] = 1
    again = pipe(generator=seeded(2), images=images, mask=mask, output_type="pt").images
    assert torch.equal(again[mask == 1], images[mask == 1])


# ---------------------------------------------------------------------------------------------------- classes


def test_classes(make_pipe):
    pipe = make_pipe(levels=16, classes=2, id2label={0: "cat", 1: "frog"})
    by_id, by_name = (
        pipe(class_labels=labels, generator=seeded(1), output_type="pt").images for labels in ([1], "frog")
    )
    assert torch.equal(by_id, by_name)
    assert len(pipe(class_labels=["cat", "frog", "frog"]).images) == 3
    assert len(pipe(4, class_labels="cat").images) == 4
    none = torch.tensor([[0.0, 0.0, 1.0]])  # the null class, as a mixture
    assert len(pipe(class_labels=none).images) == 1
    for labels, message in ((None, "needs `class_labels`"), ("dog", "Unknown class 'dog'"), ([2], "Unknown class id")):
        with pytest.raises(ValueError, match=message):
            pipe(class_labels=labels)
    with pytest.raises(ValueError, match="no classes"):
        make_pipe()(class_labels=[0])


# -------------------------------------------------------------------------------------------------- likelihoods


@pytest.mark.parametrize("variant", WITH_LIKELIHOOD)
def test_bits_per_dim_of_8_bit_images(make_pipe, variant):
    images = torch.randint(256, (3, 1, 5, 5), dtype=torch.uint8, generator=seeded(0))
    pipe = make_pipe(variant)
    with torch.no_grad():
        torch.testing.assert_close(pipe.bits_per_dim(images), pipe.pixelcnn.nll(images / 255))
    coarse = make_pipe(variant, levels=4, classes=2)
    with torch.no_grad():
        expected = coarse.pixelcnn.nll((images // 64) / 3, torch.tensor([0, 1, 1]))
    torch.testing.assert_close(coarse.bits_per_dim(images, [0, 1, 1]), expected)
    assert coarse.bits_per_dim(images).shape == (3,)  # null class
    with pytest.raises(ValueError, match="uint8"):
        pipe.bits_per_dim(images / 255)
    without_dropout = make_pipe(variant, classes=2, class_dropout_prob=0.0)
    assert without_dropout.bits_per_dim(images, [0, 1, 1]).shape == (3,)
    with pytest.raises(ValueError, match="no label was dropped"):
        without_dropout.bits_per_dim(images)


def test_the_baseline_has_no_likelihood_and_no_temperature(make_pipe):
    pipe = make_pipe("baseline")
    with pytest.raises(ValueError, match="no likelihood"):
        pipe.bits_per_dim(torch.zeros(1, 1, 5, 5, dtype=torch.uint8))
    with pytest.raises(ValueError, match="no distribution"):
        pipe(temperature=0.9)


# --------------------------------------------------------------------------------------- loading and invalid input


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_pipeline_survives_saving_and_loading(make_pipe, quiet, tmp_path, variant):
    classes = None if variant == "baseline" else 2
    pipe = make_pipe(variant, levels=16, classes=classes, id2label=classes and {0: "cat", 1: "frog"})
    pipe.save_pretrained(tmp_path)
    loaded = quiet(TinyPipeline.from_pretrained(tmp_path))
    assert type(loaded) is TinyPixelCNNPipeline
    label = None if classes is None else "frog"
    images = [p(2, label, generator=seeded(1), output_type="pt").images for p in (pipe, loaded)]
    assert torch.equal(*images)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nonfinite_parameters_are_refused(make_pipe, variant):
    pipe = make_pipe(variant, size=2)
    with torch.no_grad():
        for parameter in pipe.pixelcnn.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        pipe()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "`temperature` must be a finite number above 0, got 0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"output_type": "latent"}, "'pil', 'np', 'pt'"),
        ({"batch_size": 2, "generator": [torch.Generator()]}, "one per image"),
        ({"images": torch.zeros(1, 1, 5, 5)}, "together"),
        ({"images": torch.zeros(1, 1, 4, 4), "mask": torch.ones(4, 4)}, r"\(batch, 1, 5, 5\)"),
        ({"images": torch.full((1, 1, 5, 5), 2.0), "mask": torch.ones(5, 5)}, r"\[0, 1\]"),
        ({"images": torch.full((1, 1, 5, 5), 0.51), "mask": torch.ones(5, 5)}, "between the network's 16 levels"),
        ({"images": torch.zeros(2, 1, 5, 5), "mask": torch.ones(5, 5), "batch_size": 3}, "one for each of 3"),
        ({"images": torch.zeros(1, 1, 5, 5), "mask": torch.ones(4, 5)}, r"\(H, W\) = \(5, 5\)"),
        ({"callback_on_step_end_tensor_inputs": ["latents"]}, "latents"),
        ({"images": [Image.new("L", (5, 4))], "mask": torch.ones(5, 5)}, r"5 pixels wide.*\(5, 4\)"),
        ({"images": [], "mask": torch.ones(5, 5)}, "empty list"),
        ({"images": [np.zeros((5, 5, 1))], "mask": torch.ones(5, 5)}, "PIL images, got a ndarray"),
        ({"images": np.zeros((5, 5, 1)), "mask": torch.ones(5, 5)}, r"\(B, H, W, C\), got \(5, 5, 1\)"),
    ],
)
def test_invalid_input_is_refused(make_pipe, options, message):
    with pytest.raises(ValueError, match=message):
        make_pipe(levels=16)(**options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_completion_has_exact_levels_for_any_dtype(make_pipe, dtype):
    pipe, mask = make_pipe(), torch.ones(5, 5)
    given = torch.randint(256, (2, 1, 5, 5), generator=seeded(0)) / 255
    completed = pipe(images=given.to(dtype), mask=mask, output_type="pt").images
    assert completed.dtype == torch.float32
    torch.testing.assert_close(completed, given, rtol=0, atol=1e-6)


def test_one_label_applies_to_all_images_and_a_mask_may_be_pil(make_pipe):
    pipe = make_pipe(levels=16, classes=2)
    mask = Image.fromarray(np.repeat(np.uint8([255, 255, 0, 0, 0])[:, None], 5, axis=1))
    given = torch.zeros(4, 1, 5, 5)
    completed = pipe(class_labels=1, images=given, mask=mask, output_type="pt").images
    assert completed.shape == given.shape and not completed[:, :, :2].any()


def test_a_mask_that_is_not_causal_is_refused_with_its_first_pixel(make_pipe):
    mask = torch.zeros(5, 5)
    mask[:2] = 1
    mask[3, 2] = 1
    with pytest.raises(ValueError, match="row 3, column 2"):
        make_pipe()(images=torch.zeros(1, 1, 5, 5), mask=mask)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_a_single_pixel_are_images(make_pipe, channels):
    pipe = make_pipe(size=1, channels=channels)
    images = [pipe(2, generator=torch.Generator().manual_seed(0), output_type=kind).images for kind in ("pil", "np")]
    for image, values in zip(*images, strict=True):
        assert (image.size, image.mode) == ((1, 1), "L" if channels == 1 else "RGB")
        np.testing.assert_array_equal(np.asarray(image).reshape(1, 1, channels), np.rint(255 * values))
