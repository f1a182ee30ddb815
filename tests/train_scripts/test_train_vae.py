"""From images to a saved VAE, and the bound on the way."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tiny_diffusers import TinyPipeline, TinyVAEModel, TinyVAEPipeline
from tiny_diffusers.data import held_out, load_images
from tiny_diffusers.errors import UserError
from tiny_diffusers.families.vae import VAE
from tiny_diffusers.train_scripts import train_vae
from tiny_diffusers.training.draws import Draws
from tiny_diffusers.training.family import Batch
from tiny_diffusers.training.trainer import Trainer


SCRIPT = train_vae
WEIGHTS = "diffusion_pytorch_model.safetensors"
NETWORK = ["--block_out_channels", "8", "--latent_dim", "4"]


def batch(step: int | str = 0, images: int = 4) -> Batch:
    sample = torch.rand(images, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Batch(sample, None, Draws(0, step, range(images)))


def make(**options) -> TinyVAEModel:
    torch.manual_seed(0)
    return TinyVAEModel(8, 1, 4, (8,), **options)


def test_what_a_run_leaves(train, read_log):
    folder = train(plots=True)
    for name in ("model_index.json", "samples.png", "loss_curves.png", "README.md", "config.yaml"):
        assert (folder / name).is_file(), name
    log = read_log(folder)
    lines = [line for line in log if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4, 6] and any("val_loss" in line for line in log)
    assert all(line["reconstruction"] > 0 and line["kl"] > 0 for line in lines)
    pipe = TinyPipeline.from_pretrained(folder)
    assert type(pipe) is TinyVAEPipeline and pipe().images[0].mode == "L"


def test_the_validation_loss_is_the_bound_of_the_saved_network(train, read_log):
    folder = train("--validation_split", "0.25", "--kl_weight", "4")
    pipe = TinyPipeline.from_pretrained(folder)
    _, validation = held_out(64, 0.25, 0)
    images = load_images("digits", max_samples=64).images[validation]
    # the loop's own draws
    noise = Draws(0, "validation", range(len(images))).normal("latents", 4)
    with torch.no_grad():
        output = pipe.vae(images / 127.5 - 1, noise)
    bits = (output.reconstruction_loss + output.kl).mean() / (64 * math.log(2))
    assert read_log(folder)[-1]["val_loss"] == pytest.approx(bits.item(), rel=1e-4)


def test_the_loss_is_the_two_terms_and_the_weight_of_the_second_rises():
    vae = make()
    losses = {}
    for step in (0, 5, 10, 1000):
        family = VAE(vae, kl_weight=2.0, kl_warmup_steps=10)
        name, losses[step], scalars = next(family.losses(family.modules, batch(step)))
        assert name == "vae"
        weight = 2 * min(1, step / 10)
        torch.testing.assert_close(losses[step], scalars["reconstruction"] + weight * scalars["kl"])


def test_what_is_no_likelihood_is_validated_by_its_own_loss():
    family = VAE(make(reconstruction="mse"), kl_weight=0.25, kl_warmup_steps=10)
    name, loss, scalars = next(family.losses(family.modules, batch(10)))
    torch.testing.assert_close(family.validation_loss(family.modules, batch(10)).mean(), loss)


@pytest.mark.parametrize("stopped_at", [3])
def test_a_resumed_run_equals_an_uninterrupted_one(train, train_in_two, stopped_at):
    whole = train("--random_flip", name="whole")
    resumed = train_in_two("--random_flip", stopped_at=stopped_at)
    for name in ("vae/" + WEIGHTS, "train_log.jsonl", "samples.png"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes(), name


def test_early_stopping_keeps_the_best_bound(train, monkeypatch):
    bounds = iter([3.0, 1.0, 2.0, 2.5])
    monkeypatch.setattr(Trainer, "_validate", lambda self: next(bounds))
    folder = train("--early_stopping_patience", "2", "--validation_steps", "1")
    saved = load_file(folder / "vae" / WEIGHTS)
    best = load_file(folder / "checkpoint-2" / "vae_ema" / WEIGHTS)
    assert all(torch.equal(saved[key], best[key]) for key in saved)


def test_fine_tuning_starts_from_the_other_models_weights(train):
    first = train(name="first", steps=2)
    second = train("--pretrained_model_name_or_path", str(first), "--learning_rate", "0", name="second", steps=2)
    a, b = load_file(first / "vae" / WEIGHTS), load_file(second / "vae" / WEIGHTS)
    assert all(torch.allclose(a[key], b[key], atol=1e-6) for key in a)


def test_a_warm_up_that_outlasts_the_run_is_said(train, capsys):
    train("--kl_warmup_steps", "3", steps=2)
    assert "--kl_warmup_steps 3: the run ends before, after 2 steps" in capsys.readouterr().err
    train("--kl_warmup_steps", "3", "--kl_weight", "0", name="none", steps=2)
    assert "kl_warmup_steps" not in capsys.readouterr().err


def test_flags_that_a_checkpoint_does_not_have_are_refused(train):
    folder = train(steps=1)
    argv = ["--pretrained_model_name_or_path", str(folder), "--num_levels", "2", "--reconstruction", "bernoulli"]
    with pytest.raises(
        UserError, match=r"--reconstruction bernoulli \(it has logistic\), --num_levels 2 \(it has 256\)"
    ):
        train(*argv, name="other")


@pytest.mark.slow
def test_it_learns_the_digits(tmp_path):
    """From 8 bits a pixel to fewer than 5, and reconstructions that are nearer to their image than to any other."""
    train_vae.main(
        [
            *("--max_train_steps", "250", "--train_batch_size", "64", "--learning_rate", "3e-3", "--latent_dim", "16"),
            *("--block_out_channels", "16", "32", "--kl_warmup_steps", "50", "--mixed_precision", "no"),
            *("--num_threads", "1", "--output_dir", str(tmp_path / "run"), "--eval_batch_size", "4"),
            *("--save_images_epochs", "0"),
        ]
    )
    pipe = TinyPipeline.from_pretrained(tmp_path / "run")
    images = load_images("digits").images[:100]
    assert pipe.bits_per_dim(images, generator=torch.Generator().manual_seed(0)).mean() < 5
    reconstructed = pipe.reconstruct(images / 255, output_type="np").images.reshape(100, 1, -1)
    distances = np.square(reconstructed - (images / 255).numpy().reshape(1, 100, -1)).sum(-1)
    assert (distances.argmin(1) == np.arange(100)).mean() > 0.8


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--reconstruction", "logistics"], ["logistics", "logistic"]),
        (["--latent_dim", "0"], ["latent_dim", "0"]),
        (["--resolution", "9"], ["9", "multiple of 2"]),
        (["--kl_weight", "-1"], ["--kl_weight", "-1"]),
        (["--kl_warmup_steps", "-1"], ["--kl_warmup_steps", "-1"]),
        (["--pretrained_model_name_or_path", "no/such/folder"], ["no/such/folder"]),
    ],
)
def test_each_mistake_is_one_line_before_training(check_mistake, argv, words):
    check_mistake(argv, words)


def test_a_checkpoint_of_another_size_or_family_is_refused(train):
    from tiny_diffusers.train_scripts import train_dcgan

    folder = train(steps=1)
    with pytest.raises(UserError, match="8x8 pixels.*16x16.*--resolution 8"):
        train("--pretrained_model_name_or_path", str(folder), "--resolution", "16", name="other")
    argv = ["--pretrained_model_name_or_path", str(folder), "--output_dir", str(folder.with_name("gan"))]
    with pytest.raises(UserError, match="TinyVAEPipeline, not a TinyDCGANPipeline"):
        train_dcgan.main([*argv, "--num_threads", "1", "--mixed_precision", "no"])
