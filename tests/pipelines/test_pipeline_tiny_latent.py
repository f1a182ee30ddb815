"""Diffusion in the latents of an autoencoder, and the autoencoder's own pipeline."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput

from tiny_diffusers import (
    TinyDDIMScheduler,
    TinyEDMScheduler,
    TinyFlowMatchScheduler,
    TinyImg2ImgPipeline,
    TinyLatentPipeline,
    TinyPipeline,
    TinyVAEPipeline,
)
from tiny_diffusers.app.models import read_model
from tiny_diffusers.cards import write_card
from tiny_diffusers.network_summary import stages, summarize
from tiny_diffusers.pipelines.pipeline_tiny import image_generators


MEAN, STD = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 0.25])


def make_vae(channels: int = 1, sample_size: int = 8, **config) -> AutoencoderKL:
    torch.manual_seed(0)
    options = {"latents_mean": MEAN.tolist(), "latents_std": STD.tolist(), "scaling_factor": 1.0} | config
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=2,
        sample_size=sample_size,
        **options,
    ).eval()


@pytest.fixture
def make_pipe(make_unet, quiet):
    def make(scheduler=None, classes=None, names=None, **options):
        unet = make_unet(stock=False, classes=classes, channels=2, sample_size=4, **options)
        return quiet(TinyLatentPipeline(make_vae(), unet, scheduler or TinyFlowMatchScheduler(), names))

    return make


def column(values):
    return values[:, None, None]


@torch.no_grad()
def test_latents_are_standardized_and_decoded_as_the_config_says(make_pipe):
    pipe = make_pipe()
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    posterior = pipe.vae.encode(2 * images - 1).latent_dist
    torch.testing.assert_close(pipe.encode(images), (posterior.mean - column(MEAN)) / column(STD))

    options = {"batch_size": 3, "num_inference_steps": 2}
    latents = pipe(**options, generator=image_generators(0, 3), output_type="latent").images
    assert latents.shape == (3, 2, 4, 4)
    decoded = pipe.vae.decode(column(MEAN) + column(STD) * latents).sample
    drawn = pipe(**options, generator=image_generators(0, 3), output_type="pt", return_intermediates=1)
    torch.testing.assert_close(drawn.images, (decoded / 2 + 0.5).clamp(0, 1))
    assert drawn.intermediates[0].pred_original_sample.shape == (3, 1, 8, 8)
    assert pipe(**options).images[0].size == (8, 8)


@torch.no_grad()
def test_a_scaling_factor_counts_where_nothing_was_measured():
    vae = make_vae(latents_mean=None, latents_std=None, shift_factor=0.25, scaling_factor=0.5)
    images = torch.rand(2, 1, 8, 8)
    latents = TinyVAEPipeline(vae).encode(images)
    torch.testing.assert_close(latents, 0.5 * (vae.encode(2 * images - 1).latent_dist.mean - 0.25))


@pytest.mark.parametrize(
    "scheduler",
    [
        TinyDDIMScheduler(clip_sample=True),
        TinyFlowMatchScheduler(thresholding=True),
        TinyEDMScheduler(clip_sample=True, clip_sample_range=0.1),
    ],
)
def test_the_network_denoises_as_without_an_autoencoder_and_nothing_is_clipped(make_pipe, quiet, scheduler):
    pipe = make_pipe(scheduler)
    options = {"batch_size": 2, "num_inference_steps": 3, "output_type": "latent"}
    latents = pipe(**options, generator=image_generators(0, 2)).images
    plain = quiet(TinyPipeline(pipe.unet, pipe.scheduler))
    expected, clipped = (
        plain(**options, generator=image_generators(0, 2), clip_sample=clip).images for clip in (False, True)
    )
    assert torch.equal(latents, expected) and not torch.equal(latents, clipped)


class Exact(ModelMixin, ConfigMixin):
    """The velocity of rectified flow for x_0 of N(0, I): E[eps - x_0 | x_t]."""

    @register_to_config
    def __init__(self, sample_size: int = 1, in_channels: int = 2, out_channels: int = 2):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, sample, timestep):
        s = timestep / 1000
        return UNet2DOutput((2 * s - 1) / ((1 - s) ** 2 + s**2) * sample)


def test_exact_latents_of_a_linear_autoencoder_give_the_mean_and_the_covariance_of_the_data(quiet):
    vae = make_vae(sample_size=2)
    vae.post_quant_conv = None
    vae.decoder = torch.nn.ConvTranspose2d(2, 1, 2, stride=2)  # each latent to 2x2 pixels, linearly
    torch.nn.init.normal_(vae.decoder.weight, std=0.3)
    pipe = quiet(TinyLatentPipeline(vae, Exact(), TinyFlowMatchScheduler(solver="heun")))
    generator = torch.Generator().manual_seed(0)
    count, samples = 20000, []
    pipe._to_images, to_images = lambda sample, kind: samples.append(sample), pipe._to_images
    pipe(batch_size=count, num_inference_steps=30, generator=generator, output_type="pt")
    with torch.no_grad():
        pixels = vae.decode(column(MEAN) + column(STD) * samples[0]).sample.flatten(1)
        torch.testing.assert_close(to_images(samples[0], "pt").flatten(1), (pixels / 2 + 0.5).clamp(0, 1))
        weight = vae.decoder.weight.reshape(2, 4)
        mean = MEAN @ weight + vae.decoder.bias
        covariance = weight.T @ torch.diag(STD**2) @ weight
    scale = covariance.diagonal().sqrt()
    assert ((pixels.mean(0) - mean) / scale).abs().max() < 0.03
    assert ((torch.cov(pixels.T) - covariance) / torch.outer(scale, scale)).abs().max() < 0.05


def test_it_is_saved_with_its_autoencoder_and_each_part_loads_in_stock(make_pipe, quiet, tmp_path):
    pipe = make_pipe(TinyDDIMScheduler(), classes=2, names={0: "cat", 1: "dog"})
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "TinyLatentPipeline" and index["vae"] == ["diffusers", "AutoencoderKL"]
    vae = AutoencoderKL.from_pretrained(tmp_path, subfolder="vae")
    assert vae.config.latents_mean == MEAN.tolist()
    loaded = quiet(TinyPipeline.from_pretrained(tmp_path))
    assert type(loaded) is TinyLatentPipeline
    options = {"class_labels": ["dog", "cat"], "guidance_scale": 2.0, "num_inference_steps": 2, "output_type": "pt"}
    images = [each(**options, generator=image_generators(0, 2)).images for each in (pipe, loaded)]
    assert torch.equal(*images)

    model = read_model(str(tmp_path), "latent")
    assert (model.size, model.num_channels, model.classes) == ((8, 8), 1, ("cat", "dog"))
    assert model.can_walk and not model.can_edit
    card = write_card(tmp_path, model_name="latent").read_text()
    assert "model of 8x8 gray images: `TinyUNet2DModel` on the latents of an `AutoencoderKL`" in card

    with pytest.raises(
        ValueError, match="denoises the latents of an autoencoder, and TinyImg2ImgPipeline is for images"
    ):
        TinyImg2ImgPipeline.from_pretrained(tmp_path)
    path = tmp_path / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"latents_std": [1.0, 0.0]}))
    with pytest.raises(ValueError, match="can't be loaded: `latents_mean` and `latents_std`.*positive"):
        TinyPipeline.from_pretrained(tmp_path)


def test_the_ends_of_an_interpolation_are_the_samples_of_its_seeds(make_pipe):
    pipe = make_pipe(classes=2)
    options = {"num_inference_steps": 2, "output_type": "pt"}
    frames = pipe.interpolate((3, 7), num_frames=3, class_labels=[0, 1], **options).images
    ends = [
        pipe(label, generator=[torch.Generator().manual_seed(seed)], eta=0.0, **options).images[0]
        for seed, label in ((3, 0), (7, 1))
    ]
    torch.testing.assert_close(frames[::2], torch.stack(ends))
    assert not torch.equal(frames[1], frames[0])
    with pytest.raises(ValueError, match="must be 'slerp' or 'linear', got 'cubic'"):
        pipe.interpolate(interpolation="cubic")


def test_parts_of_different_models_are_refused(make_unet, make_pipe):
    for options in ({"sample_size": 8, "channels": 2}, {"sample_size": 4}):
        unet = make_unet(stock=False, **options)
        with pytest.raises(ValueError, match=r"but those of the autoencoder have \(2, 4, 4\)"):
            TinyLatentPipeline(make_vae(), unet, TinyFlowMatchScheduler())
    with pytest.raises(ValueError, match="is for images: sample with `TinyLatentPipeline`"):
        TinyPipeline.from_pipe(make_pipe())


@torch.no_grad()
def test_an_autoencoder_alone_reconstructs_and_walks_between_images():
    pipe = TinyVAEPipeline(make_vae(channels=3))
    images = torch.rand(2, 3, 8, 8)
    rebuilt = pipe.reconstruct(images, output_type="pt").images
    decoded = pipe.vae(2 * images - 1).sample  # stock: from the means
    torch.testing.assert_close(rebuilt, (decoded / 2 + 0.5).clamp(0, 1))
    frames = pipe.interpolate(images, num_frames=3, output_type="pt").images
    torch.testing.assert_close(frames[::2], rebuilt)
    assert pipe(batch_size=2, generator=torch.Generator().manual_seed(0)).images[0].size == (8, 8)
    with pytest.raises(ValueError, match="An AutoencoderKL has no likelihood"):
        pipe.bits_per_dim(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    assert sum(row.parameters for row in summarize(pipe.vae)) == pipe.vae.num_parameters()
    assert stages(pipe.vae)[0].lines == ["3x8x8"]
