"""Sampling, reconstruction, interpolation and the likelihood bound with a VAE."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from tiny_diffusers import TinyPipeline, TinyVAEModel, TinyVAEPipeline
from tiny_diffusers.pipelines.pipeline_tiny import image_generators


def make(channels: int = 1, **options) -> TinyVAEPipeline:
    torch.manual_seed(0)
    vae = TinyVAEModel(sample_size=8, in_channels=channels, latent_dim=3, block_out_channels=(8, 8), **options)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return TinyVAEPipeline(vae.eval())


@pytest.fixture
def pipe():
    return make()


@pytest.fixture
def images():
    return torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_output_types(channels, mode):
    pipe = make(channels)
    forms = {kind: pipe(2, image_generators(0, 2), output_type=kind).images for kind in ("pil", "np", "pt", "latent")}
    assert [image.mode for image in forms["pil"]] == [mode] * 2 and forms["pil"][0].size == (8, 8)
    assert forms["np"].shape == (2, 8, 8, channels) and forms["pt"].shape == (2, channels, 8, 8)
    np.testing.assert_allclose(forms["np"], forms["pt"].permute(0, 2, 3, 1).numpy())
    torch.testing.assert_close((forms["latent"] / 2 + 0.5).clamp(0, 1), forms["pt"])
    assert torch.equal(pipe(2, image_generators(0, 2), output_type="pt", return_dict=False)[0], forms["pt"])


def test_an_image_does_not_depend_on_its_batch(pipe):
    together = pipe(4, image_generators(0, 4), output_type="np").images
    alone = pipe(1, image_generators(0, 4)[2:3], output_type="np").images
    np.testing.assert_allclose(alone, together[2:3], atol=1e-5)


def test_latents_replace_the_generators_noise(pipe):
    latents = torch.randn(2, 3, generator=torch.Generator().manual_seed(5))
    drawn = pipe(2, torch.Generator().manual_seed(5), output_type="np").images
    np.testing.assert_array_equal(pipe(2, latents=latents, output_type="np").images, drawn)
    with torch.no_grad():
        decoded = pipe.vae.decode(latents)
    torch.testing.assert_close(pipe(2, latents=latents, output_type="latent").images, decoded)


def test_a_reconstruction_decodes_the_mean_or_a_sample(pipe, images):
    with torch.no_grad():
        posterior = pipe.vae.encode(images / 127.5 - 1)
        expected = pipe.vae.decode(posterior.mean)
    reconstructed = pipe.reconstruct(images / 255, output_type="latent").images
    torch.testing.assert_close(reconstructed, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(pipe.encode(images / 255), posterior.mean, atol=1e-5, rtol=1e-4)

    draws = [pipe.reconstruct(images / 255, True, image_generators(0, 4), "latent").images for _ in range(2)]
    assert torch.equal(*draws) and not torch.allclose(draws[0], expected)
    noise = torch.cat([torch.randn(1, 3, generator=generator) for generator in image_generators(0, 4)])
    with torch.no_grad():
        drawn = pipe.vae.decode(posterior.mean + posterior.stddev * noise)
    torch.testing.assert_close(draws[0], drawn, atol=1e-5, rtol=1e-4)


def test_images_are_accepted_in_every_form(pipe, images):
    pil = [Image.fromarray(image[0].numpy()) for image in images]
    forms = [images / 255, (images / 255).permute(0, 2, 3, 1).numpy(), pil, [image.convert("RGB") for image in pil]]
    outputs = [pipe.reconstruct(form, output_type="np").images for form in forms]
    for output in outputs[1:]:
        np.testing.assert_allclose(output, outputs[0], atol=1e-4)
    assert pipe.encode([image.resize((16, 12)) for image in pil]).shape == (4, 3)


def test_interpolation_is_linear_between_the_two_reconstructions(pipe, images):
    ends = pipe.reconstruct(images[:2] / 255, output_type="np").images
    frames = pipe.interpolate(images[:2] / 255, num_frames=5, output_type="np").images
    np.testing.assert_allclose(frames[[0, -1]], ends, atol=1e-5)
    middle = pipe(1, latents=pipe.encode(images[:2] / 255).mean(0, keepdim=True), output_type="np").images
    np.testing.assert_allclose(frames[2:3], middle, atol=1e-5)
    assert len(pipe.interpolate(images[:2] / 255).images) == 16


@pytest.mark.parametrize(
    "options", [{}, {"reconstruction": "gaussian"}, {"reconstruction": "bernoulli", "num_levels": 2}]
)
def test_bits_per_dim_is_the_elbo(images, options):
    pipe = make(**options)
    noise = torch.cat([torch.randn(1, 3, generator=generator) for generator in image_generators(0, 4)])
    with torch.no_grad():
        output = pipe.vae(images / 127.5 - 1, noise)
    expected = (output.reconstruction_loss + output.kl) / (64 * math.log(2))
    bits = pipe.bits_per_dim(images, generator=image_generators(0, 4))
    assert bits.shape == (4,)
    torch.testing.assert_close(bits, expected, rtol=1e-4, atol=1e-4)


def test_an_uninformed_network_takes_one_bit_for_two_levels():
    """A Bernoulli of one half takes one bit per dimension."""
    pipe = make(reconstruction="bernoulli", num_levels=2)
    with torch.no_grad():
        for parameter in pipe.vae.parameters():
            parameter.zero_()
    bits = pipe.bits_per_dim(torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8))
    torch.testing.assert_close(bits, torch.ones(3))


@pytest.mark.parametrize("options", [{"reconstruction": "mse"}, {"reconstruction": "bernoulli"}])
def test_a_loss_that_is_not_a_likelihood_has_no_bits_per_dim(images, options):
    with pytest.raises(ValueError, match="no likelihood.*sum to 1.*'logistic'"):
        make(**options).bits_per_dim(images)


def test_a_pipeline_survives_saving_and_loading(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = TinyPipeline.from_pretrained(tmp_path)
    assert type(loaded) is TinyVAEPipeline and type(loaded.vae) is TinyVAEModel and not loaded.vae.training
    expected = pipe(2, image_generators(0, 2), output_type="np").images
    np.testing.assert_array_equal(loaded(2, image_generators(0, 2), output_type="np").images, expected)
    np.testing.assert_array_equal(
        TinyVAEPipeline.from_pretrained(tmp_path)(2, image_generators(0, 2), output_type="np").images, expected
    )


def test_bfloat16_is_near_float32(pipe):
    expected = pipe(4, image_generators(0, 4), output_type="np").images
    samples = pipe.to(torch.bfloat16)(4, image_generators(0, 4), output_type="np").images
    np.testing.assert_allclose(samples, expected, atol=0.05)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda pipe: pipe(0), "batch_size.*0"),
        (lambda pipe: pipe(2, output_type="jpg"), "output_type.*jpg"),
        (lambda pipe: pipe(2, latents=torch.zeros(2, 4)), r"latents.*\(2, 3\), got \(2, 4\)"),
        (lambda pipe: pipe(2, image_generators(0, 3)), "got 3 for a batch of 2"),
        (lambda pipe: pipe.reconstruct(torch.zeros(2, 3, 8, 8)), "images"),
        (lambda pipe: pipe.reconstruct(torch.zeros(2, 1, 16, 16)), r"\(1, 8, 8\), got \(2, 1, 16, 16\)"),
        (lambda pipe: pipe.encode(np.zeros((2, 8, 4, 1), np.float32)), r"\(1, 8, 8\), got \(2, 1, 8, 4\)"),
        (lambda pipe: pipe.encode(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)), "floats.*uint8"),
        (lambda pipe: pipe.encode(np.zeros((2, 8, 8, 1), np.uint8)), "floats.*uint8"),
        (lambda pipe: pipe.encode(torch.full((2, 1, 8, 8), 200.0)), "0, 1.*200"),
        (lambda pipe: pipe.interpolate(torch.full((2, 1, 8, 8), -0.5)), "0, 1.*-0.5"),
        (lambda pipe: pipe.reconstruct(torch.full((2, 1, 8, 8), math.nan)), "0, 1.*nan"),
        (lambda pipe: pipe.interpolate(torch.zeros(3, 1, 8, 8)), "must be 2 images"),
        (lambda pipe: pipe.interpolate(torch.zeros(2, 1, 8, 8), num_frames=1), "num_frames.*1"),
        (lambda pipe: pipe.bits_per_dim(torch.zeros(2, 1, 8, 8)), "uint8.*float32"),
        (lambda pipe: pipe.bits_per_dim(torch.zeros(2, 1, 4, 4, dtype=torch.uint8)), "8, 8"),
        (lambda pipe: pipe.bits_per_dim(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), [0, 1]), "no classes"),
        (lambda pipe: pipe(2, latents=torch.full((2, 3), math.nan)), "not finite"),
    ],
)
def test_invalid_input_is_refused(pipe, call, words):
    with pytest.raises(ValueError, match=words) as error:
        call(pipe)
    assert "\n" not in str(error.value)
