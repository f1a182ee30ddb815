"""Latent diffusion: from images to a saved autoencoder, and to a diffusion model on its latents."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import tiny
from tiny_diffusers import TinyLatentPipeline, TinyPipeline, TinyUNet2DModel, TinyVAEPipeline
from tiny_diffusers.data import held_out, load_images
from tiny_diffusers.errors import UserError
from tiny_diffusers.families.autoencoder import Autoencoder, default_widths, measure_latents
from tiny_diffusers.families.unets import default_network
from tiny_diffusers.train_scripts import train_autoencoder, train_conditional, train_unconditional, train_vae
from tiny_diffusers.training.batches import Batches
from tiny_diffusers.training.draws import Draws
from tiny_diffusers.training.family import Batch
from tiny_diffusers.training.trainer import Trainer


SCRIPT = train_autoencoder
NETWORK = ["--block_out_channels", "8", "8"]  # latents of 4x4
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINY_DIFFUSERS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the autoencoder, for tests that only read it."""
    return tiny.train(tmp_path_factory.mktemp("finished"), script=SCRIPT, flags=[*tiny.TINY_RUN, *NETWORK], steps=2)


@pytest.fixture
def train_latents(train, finished):
    """A run on the latents of the finished autoencoder."""

    def run(*argv, script=train_unconditional, vae=finished, **options):
        return train("--vae", str(vae), *argv, script=script, network=tiny.TINY_DIFFUSION, **options)

    return run


def test_what_a_run_leaves_reconstructs_and_knows_its_latents(finished, read_log):
    for name in ("samples.png", "README.md", "vae/config.json", "pipeline_tiny_autoencoder.py"):
        assert (finished / name).is_file(), name
    log = read_log(finished)
    assert all(line["reconstruction"] > 0 and line["kl"] > 0 for line in log if "loss" in line)
    pipe = TinyPipeline.from_pretrained(finished)
    assert type(pipe) is TinyVAEPipeline
    vae = AutoencoderKL.from_pretrained(finished, subfolder="vae")
    training, validation = held_out(64, 0.05, 0)
    images = load_images("digits", max_samples=64).images / 127.5 - 1
    with torch.no_grad():
        error = (vae(images[validation]).sample - images[validation]).abs().mean()
    assert log[-1]["val_loss"] == pytest.approx(error.item(), rel=1e-4)
    latents = pipe.encode((images[training] + 1) / 2).double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(latents.mean(1), torch.zeros(4).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(1, correction=0), torch.ones(4).double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_the_loss_is_the_error_and_the_weighted_divergence(kind):
    torch.manual_seed(0)
    vae = AutoencoderKL(1, 1, block_out_channels=(8,), norm_num_groups=4, latent_channels=2, sample_size=4)
    family = Autoencoder(vae, kind, kl_weight=0.5)
    images = torch.rand(3, 1, 4, 4) * 2 - 1
    batch = Batch(images, None, Draws(0, 0, range(3)))
    _, loss, scalars = next(family.losses(family.modules, batch))
    posterior = vae.encode(images).latent_dist
    latents = posterior.mean + posterior.std * Draws(0, 0, range(3)).normal("latents", 2, 4, 4)
    difference = vae.decode(latents).sample - images
    torch.testing.assert_close(scalars["reconstruction"], {"l1": difference.abs(), "l2": difference**2}[kind].mean())
    torch.testing.assert_close(scalars["kl"], posterior.kl().mean() / 32)
    torch.testing.assert_close(loss, scalars["reconstruction"] + 0.5 * scalars["kl"])


def test_default_widths_halve_while_the_latents_can_be_halved_once_more():
    sizes = {(64, 64): 3, (32, 32): 3, (28, 28): 2, (16, 16): 3, (8, 8): 2, (10, 10): 1, (48, 64): 3, (9, 9): 1}
    assert {size: len(default_widths(*size)) for size in sizes} == sizes


def test_a_channel_that_never_changes_is_left_as_it_is():
    latents = torch.cat([torch.ones(4, 1, 2, 2), torch.randn(4, 1, 2, 2)], dim=1)
    measured = measure_latents(iter(latents.split(3)))
    assert measured["latents_mean"][0] == measured["latents_std"][0] == 1
    assert measured["latents_std"][1] == pytest.approx(float(latents[:, 1].std(correction=0)), rel=1e-5)


@pytest.mark.slow
def test_a_resumed_autoencoder_equals_an_uninterrupted_one(train, train_in_two):
    whole, resumed = train("--random_flip", name="whole"), train_in_two("--random_flip", stopped_at=3)
    for name in ("vae/" + WEIGHTS, "vae/config.json", "train_log.jsonl", "samples.png"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes(), name


def test_what_a_saved_autoencoder_has_measured_does_not_stop_a_resume(train):
    flags = ("--max_train_samples", "16", "--save_model_epochs", "1", "--checkpointing_steps", "2")
    checkpoint = train(*flags, steps=4) / "checkpoint-4"
    assert json.loads((checkpoint / "vae" / "config.json").read_text())["latents_mean"]
    train(*flags, "--resume_from_checkpoint", "latest", steps=6)


@pytest.mark.slow
def test_the_perceptual_distance_has_a_gradient(train, read_log):
    log = read_log(train("--perceptual_features", "efficientnet-lite0", steps=2))
    assert any(line.get("perceptual", 0) > 0 for line in log)
    with pytest.raises(UserError, match="--perceptual_features pixels: it has no layers"):
        train("--perceptual_features", "pixels", name="other")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--block_out_channels", "8", "8", "--resolution", "9"], ["2 levels", "multiple of 2", "9x9"]),
        (["--norm_num_groups", "3"], ["--norm_num_groups 3", "divide", "--block_out_channels 8 8"]),
        (["--latent_channels", "0"], ["latent_channels", "0"]),
    ],
)
def test_each_mistake_is_one_line_before_training(check_mistake, argv, words):
    check_mistake(argv, words)


def test_a_vae_does_not_start_from_an_autoencoder(train, finished):
    argv = ["--pretrained_model_name_or_path", str(finished)]
    with pytest.raises(UserError, match="has a network of the class AutoencoderKL, not TinyVAEModel"):
        train(*argv, script=train_vae, network=[])


def test_a_diffusion_model_is_trained_on_the_latents_of_images_and_their_mirror_images(
    train_latents, finished, monkeypatch
):
    batches, training = [], Batches.training
    monkeypatch.setattr(Batches, "training", lambda self, *at: batches.append(training(self, *at)) or batches[-1])
    trainers, run = [], Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self: trainers.append(self) or run(self))
    folder = train_latents("--random_flip", steps=2)
    pipe = TinyPipeline.from_pretrained(folder)
    assert type(pipe) is TinyLatentPipeline and pipe.unet.config.sample_size == 4
    assert load_file(folder / "vae" / WEIGHTS).keys() == load_file(finished / "vae" / WEIGHTS).keys()

    images = load_images("digits", max_samples=64).images / 255
    expected = torch.stack([pipe.encode(images), pipe.encode(images.flip(3))], dim=1)
    torch.testing.assert_close(trainers[0].data.latents, expected, atol=1e-5, rtol=0)
    indices = trainers[0].batches.train_indices[trainers[0].batches.order(range(8))]
    flips = Draws(0, 0, range(8)).uniform("augment", 8)[:, 0] < 0.5
    assert 0 < flips.sum() < 8
    seen = trainers[0].data.latents[indices, flips.long()]
    assert torch.equal(batches[0].images, seen)
    checkpoint = TinyPipeline.from_pretrained(folder / "checkpoint-2")
    assert type(checkpoint) is TinyLatentPipeline


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["flow", "edm"])
def test_a_resumed_run_on_latents_equals_an_uninterrupted_one(finished, train_in_two, train_latents, objective):
    argv = ["--random_flip", "--prediction_type", objective]
    whole = train_latents(*argv, script=train_conditional, name="whole", steps=4)
    resumed = train_in_two(
        "--vae", str(finished), *argv, script=train_conditional, network=tiny.TINY_DIFFUSION, stopped_at=2, steps=4
    )
    for name in ("unet/" + WEIGHTS, "vae/" + WEIGHTS, "train_log.jsonl", "samples.png"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes(), name
    scheduler = TinyPipeline.from_pretrained(whole).scheduler
    assert scheduler.config.get("sigma_data", 1.0) == 1.0


@pytest.mark.slow
def test_an_autoencoder_alone_is_measured_on_the_images(train_latents, finished, tmp_path):
    vae = AutoencoderKL.from_pretrained(finished, subfolder="vae")
    vae.register_to_config(latents_mean=None, latents_std=None, scaling_factor=0.5)
    vae.save_pretrained(tmp_path / "alone")
    folder = train_latents("--prediction_type", "epsilon", vae=tmp_path / "alone", steps=1)
    pipe = TinyPipeline.from_pretrained(folder)
    latents = pipe.encode(load_images("digits", max_samples=64).images / 255).transpose(0, 1).flatten(1).numpy()
    np.testing.assert_allclose(latents.mean(1), 0, atol=1e-4)
    np.testing.assert_allclose(latents.std(1), 1, atol=1e-4)
    assert pipe.scheduler.config.clip_sample is False


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--resolution", "16"], ["--vae", "8x8 pixels", "16x16", "--resolution 8"]),
        (["--channels", "3"], ["--vae", "1 channel,", "--channels 1"]),
        (["--loss_type", "vlb"], ["--loss_type vlb", "bits/dim"]),
        (["--variance_type", "learned_range"], ["--variance_type learned_range"]),
        (["--color_jitter", "0.1"], ["--color_jitter 0.1", "pixels"]),
        (["--dynamic_thresholding", "0.9"], ["--dynamic_thresholding 0.9", "pixels"]),
        (["--vae", "no/such/folder"], ["--vae", "no/such/folder"]),
    ],
)
def test_what_means_nothing_to_latents_is_refused(finished, check_mistake, argv, words):
    argv = ["--vae", str(finished), *argv]
    check_mistake(argv, words, script=train_unconditional, network=tiny.TINY_DIFFUSION)


@pytest.fixture
def other_vae(finished, tmp_path):
    """The autoencoder with other weights."""
    vae = AutoencoderKL.from_pretrained(finished, subfolder="vae")
    with torch.no_grad():
        vae.quant_conv.bias.add_(1e-3)
    vae.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def test_a_run_on_latents_resumes_with_its_own_autoencoder_alone_wherever_it_lies(
    train_latents, train, finished, other_vae, tmp_path
):
    resume = ("--resume_from_checkpoint", "latest")
    folder = train_latents(steps=2)
    with pytest.raises(
        UserError, match=r"was trained on the latents of another autoencoder\. Give .*--vae .*checkpoint-2"
    ):
        train_latents(*resume, vae=other_vae, steps=4)
    with pytest.raises(UserError, match=r"was trained on latents\. Give .*--vae .*checkpoint-2"):
        train(*resume, script=train_unconditional, network=tiny.TINY_DIFFUSION, steps=4)
    shutil.copytree(finished / "vae", tmp_path / "moved")
    for step, vae in ((3, folder / "checkpoint-2"), (4, tmp_path / "moved")):
        train_latents(*resume, vae=vae, steps=step)
        assert (folder / f"checkpoint-{step}").is_dir()


def test_the_default_network_of_latents_costs_no_more_than_that_of_their_pixels():
    def cost(side, channels, is_latent):
        network = TinyUNet2DModel(side, channels, channels, **default_network(side, side, is_latent))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.zeros(1, channels, side, side), torch.zeros(1))
        return counter.get_total_flops(), network.num_parameters()

    for side in (32, 64):
        (pixel_flops, pixel_parameters), (flops, parameters) = cost(side, 3, False), cost(side // 4, 4, True)
        assert 0.4 * pixel_flops < flops < pixel_flops and parameters > pixel_parameters


@pytest.mark.slow
def test_a_run_on_pixels_does_not_resume_on_latents(train_latents, train):
    train(script=train_unconditional, network=tiny.TINY_DIFFUSION, steps=2)
    with pytest.raises(UserError, match=r"the run was trained on pixels\. Leave --vae out\."):
        train_latents("--resume_from_checkpoint", "latest", steps=4)


def test_fine_tuning_takes_the_autoencoder_of_the_checkpoint_and_warns_of_another(
    train_latents, train, other_vae, caplog
):
    latents = train_latents(name="latents", steps=1)
    start = ["--pretrained_model_name_or_path", str(latents)]
    options = {
        "script": train_unconditional,
        "network": [*tiny.TINY_RUN, "--ddpm_num_inference_steps", "2"],
        "steps": 1,
    }
    own = train(*start, name="own", **options)
    for name in (WEIGHTS, "config.json"):
        assert (own / "vae" / name).read_bytes() == (latents / "vae" / name).read_bytes()
    settings = yaml.safe_load((own / "config.yaml").read_text())
    assert settings["vae"] == "latents" and "vae" in settings["resolved"]
    assert "own autoencoder" not in caplog.text
    with pytest.raises(
        UserError, match="--color_jitter 0.1 is for pixels, and this run is on the latents of .*latents"
    ):
        train(*start, "--color_jitter", "0.1", name="refused", **options)
    other = train(*start, "--vae", str(other_vae), name="tuned", **options)
    assert f"own autoencoder and would have to learn those of --vae {other_vae} from scratch" in caplog.text
    assert (other / "vae" / WEIGHTS).read_bytes() == (other_vae / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_checkpoints_of_images_and_of_latents_do_not_start_from_each_other(train, train_latents, finished):
    pixels = train(script=train_unconditional, network=tiny.TINY_DIFFUSION, name="pixels", steps=1)
    options = {"script": train_unconditional, "network": ["--ddpm_num_inference_steps", "2"]}
    with pytest.raises(
        UserError, match="pixels has no AutoencoderKL: give a checkpoint of `tiny-diffusers train auto"
    ):
        train("--vae", str(pixels), **options)
    with pytest.raises(UserError, match="pixels denoises pixels, not latents: leave --vae out"):
        train("--pretrained_model_name_or_path", str(pixels), "--vae", str(finished), **options)
