"""Sampling with a DCGAN's generator, with and without classes."""

import math

import numpy as np
import pytest
import torch

from tiny_diffusers import TinyDCGANDiscriminator, TinyDCGANGenerator, TinyDCGANPipeline, TinyPipeline
from tiny_diffusers.pipelines.pipeline_tiny import image_generators


NAMES = {0: "cat", 1: "dog", 2: "frog"}


def make(classes: int | None = None, channels: int = 1, **options) -> TinyDCGANPipeline:
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "block_out_channels": (8, 8), "num_class_embeds": classes}
    generator = TinyDCGANGenerator(out_channels=channels, latent_dim=6, **sizes)
    discriminator = TinyDCGANDiscriminator(in_channels=channels, **sizes)
    generator(torch.randn(32, 6), torch.arange(32) % classes if classes else None)  # batch norm needs statistics
    options = {"discriminator": discriminator.eval(), "id2label": NAMES if classes else None} | options
    return TinyDCGANPipeline(generator.eval(), **options)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_output_types(channels, mode):
    pipe = make(channels=channels)
    forms = {
        kind: pipe(batch_size=2, generator=image_generators(0, 2), output_type=kind).images
        for kind in ("pil", "np", "pt", "latent")
    }
    assert [image.mode for image in forms["pil"]] == [mode] * 2
    assert forms["np"].shape == (2, 8, 8, channels) and forms["pt"].shape == (2, channels, 8, 8)
    np.testing.assert_allclose(forms["np"], forms["pt"].permute(0, 2, 3, 1).numpy())
    assert forms["latent"].abs().max() <= 1
    assert len(pipe().images) == 1


def test_an_image_does_not_depend_on_its_batch():
    pipe = make()
    together = pipe(batch_size=4, generator=image_generators(0, 4), output_type="np").images
    alone = pipe(generator=image_generators(0, 4)[2:3], output_type="np").images
    np.testing.assert_allclose(alone, together[2:3], atol=1e-5)
    latents = torch.cat([torch.randn(1, 6, generator=generator) for generator in image_generators(0, 4)])
    np.testing.assert_array_equal(pipe(batch_size=4, latents=latents, output_type="np").images, together)


def test_classes_are_ids_names_tensors_or_weights():
    pipe = make(classes=3)

    def sample(labels):
        return pipe(labels, generator=image_generators(0, 2), output_type="np").images

    expected = sample([0, 2])
    for labels in (["cat", "frog"], torch.tensor([0, 2]), np.array([0, 2]), torch.eye(4)[[0, 2]]):
        np.testing.assert_allclose(sample(labels), expected, atol=1e-6)
    assert np.abs(expected - sample([1, 1])).max() > 1e-3
    assert len(pipe("dog", batch_size=5).images) == 5


@pytest.mark.parametrize("classes", [None, 3])
def test_an_interpolation_ends_at_the_samples_of_its_seeds_and_classes(classes):
    pipe, labels = make(classes), ["cat", "frog"] if classes else None
    frames = pipe.interpolate((3, 8), labels, num_frames=5, output_type="np").images
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 8)]
    ends = pipe(labels, batch_size=2, generator=generators, output_type="np").images
    np.testing.assert_allclose(frames[[0, -1]], ends, atol=1e-5)
    assert frames.shape == (5, 8, 8, 1) and (np.abs(np.diff(frames, axis=0)).max((1, 2, 3)) > 0).all()
    with pytest.raises(ValueError, match="must be two seeds, got"):
        pipe.interpolate((1, 2, 3), labels)


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("with_discriminator", [True, False])
def test_a_pipeline_survives_saving_and_loading(tmp_path, classes, with_discriminator):
    pipe = make(classes, **({} if with_discriminator else {"discriminator": None}))
    pipe.save_pretrained(tmp_path)
    loaded = TinyPipeline.from_pretrained(tmp_path)
    assert type(loaded) is TinyDCGANPipeline and type(loaded.generator) is TinyDCGANGenerator
    assert isinstance(loaded.discriminator, TinyDCGANDiscriminator) == with_discriminator
    assert loaded.config.id2label == (NAMES if classes else None)
    labels = [0, 1] if classes else None
    np.testing.assert_array_equal(
        loaded(labels, 2, image_generators(0, 2), output_type="np").images,
        pipe(labels, 2, image_generators(0, 2), output_type="np").images,
    )


def test_bfloat16_is_near_float32():
    pipe = make()
    expected = pipe(batch_size=4, generator=image_generators(0, 4), output_type="np").images
    samples = pipe.to(torch.bfloat16)(batch_size=4, generator=image_generators(0, 4), output_type="np").images
    np.testing.assert_allclose(samples, expected, atol=0.1)


@pytest.mark.parametrize(
    ("classes", "arguments", "words"),
    [
        (None, {"batch_size": 0}, "batch_size.*0"),
        (None, {"output_type": "jpg"}, "output_type.*jpg"),
        (None, {"batch_size": 2, "latents": torch.zeros(2, 5)}, r"latents.*\(2, 6\), got \(2, 5\)"),
        (None, {"batch_size": 2, "generator": image_generators(0, 3)}, "got 3 for a batch of 2"),
        (None, {"class_labels": [0]}, "no classes"),
        (None, {"latents": torch.full((1, 6), math.nan)}, "not finite"),
        (3, {}, r"needs `class_labels`: give classes of 0: cat, 1: dog, 2: frog\.$"),
        (3, {"class_labels": "cta"}, "cta.*Did you mean 'cat'"),
        (3, {"class_labels": 3}, "3.*0: cat"),
        (3, {"class_labels": [0, 1], "batch_size": 3}, "one for each of 3 images, got 2"),
    ],
)
def test_invalid_input_is_refused(classes, arguments, words):
    with pytest.raises(ValueError, match=words) as error:
        make(classes)(**arguments)
    assert "\n" not in str(error.value)


def test_class_names_must_match_the_network():
    with pytest.raises(ValueError, match="no class"):
        make(classes=2)
