"""The game: its losses, where its gradients flow, what it learns, and what a run of it leaves."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tiny_diffusers import TinyDCGANDiscriminator, TinyDCGANGenerator, TinyDCGANPipeline, TinyPipeline
from tiny_diffusers.data import load_images
from tiny_diffusers.errors import UserError
from tiny_diffusers.families.dcgan import DCGAN, DCGANArguments
from tiny_diffusers.train_scripts import train_dcgan
from tiny_diffusers.training.batches import Batches
from tiny_diffusers.training.draws import Draws
from tiny_diffusers.training.family import Batch
from tiny_diffusers.training.process import setup_process
from tiny_diffusers.training.trainer import Trainer


SCRIPT = train_dcgan
WEIGHTS = "diffusion_pytorch_model.safetensors"
NETWORK = [
    # two levels: the discriminator has no batch norm on the first
    *("--generator_channels", "8", "8", "--discriminator_channels", "8", "8", "--latent_dim", "4"),
    *("--eval_batch_size", "20"),
]


def make(classes: int | None = None, **options) -> DCGAN:
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "block_out_channels": (8, 8), "num_class_embeds": classes}
    generator = TinyDCGANGenerator(out_channels=1, latent_dim=4, **sizes)
    discriminator = TinyDCGANDiscriminator(in_channels=1, **sizes)
    return DCGAN(
        generator, discriminator, None if classes is None else dict(enumerate("abcdefghijkl"[:classes])), **options
    )


def batch(step: int = 0, labels: torch.Tensor | None = None) -> Batch:
    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Batch(images, labels, Draws(0, step, range(8)))


def test_the_losses_are_the_formulas():
    """Goodfellow et al., with the targets smoothed and the generator's loss non-saturating."""
    family = make(real_label=0.9, fake_label=0.1)
    networks = copy.deepcopy(family.modules)
    with torch.no_grad():
        fake = networks["generator"](batch().draws.normal("latents", 4)).sample
        d_real = networks["discriminator"](batch().images).logits.sigmoid()
        d_fake = networks["discriminator"](fake).logits.sigmoid()
    real_loss = -(0.9 * d_real.log() + 0.1 * (1 - d_real).log()).mean()
    fake_loss = -(0.1 * d_fake.log() + 0.9 * (1 - d_fake).log()).mean()

    losses = family.losses(family.modules, batch())
    name, loss, scalars = next(losses)
    assert name == "discriminator"
    torch.testing.assert_close(loss, real_loss + fake_loss)
    torch.testing.assert_close(scalars["D(x)"], d_real.mean())
    torch.testing.assert_close(scalars["D(G(z))"], d_fake.mean())
    name, loss = next(losses)
    assert name == "generator"
    torch.testing.assert_close(loss, -d_fake.log().mean())
    assert next(losses, None) is None


def test_gradients_flow_only_where_they_should():
    family = make()
    generator, discriminator = family.modules["generator"], family.modules["discriminator"]
    losses = family.losses(family.modules, batch())
    next(losses)[1].backward()
    assert all(p.grad is None for p in generator.parameters())
    assert all(p.grad.abs().sum() > 0 for p in discriminator.parameters())
    discriminator.zero_grad()
    next(losses)[1].backward()
    assert all(p.grad is None for p in discriminator.parameters())
    assert all(p.grad.abs().sum() > 0 for p in generator.parameters())
    next(losses, None)
    assert all(p.requires_grad for p in discriminator.parameters())


def test_each_step_moves_its_own_network_only(train, monkeypatch):
    """In the loop, with its optimizers: the weights around each of the two losses."""
    seen, losses = [], DCGAN.losses

    def watched(self, modules, one):
        def weights():
            return {name: [p.detach().clone() for p in module.parameters()] for name, module in modules.items()}

        before = weights()
        for item in losses(self, modules, one):
            yield item
            after = weights()
            moved = {
                name
                for name in before
                if any(not torch.equal(a, b) for a, b in zip(before[name], after[name], strict=True))
            }
            seen.append((item[0], moved))
            before = after

    monkeypatch.setattr(DCGAN, "losses", watched)
    train(steps=2)
    assert seen == [("discriminator", {"discriminator"}), ("generator", {"generator"})] * 2


def test_noise_on_the_inputs_decays_to_none():
    family = make(instance_noise=0.5, instance_noise_steps=10)
    images = torch.zeros(8, 1, 8, 8)
    noise = [family._noisy(images, batch(step), "real_noise") for step in (0, 5, 10, 11)]
    unit = [batch(step).draws.normal("real_noise", 1, 8, 8) for step in (0, 5)]
    torch.testing.assert_close(noise[0], 0.5 * unit[0])
    torch.testing.assert_close(noise[1], 0.25 * unit[1])
    assert not noise[2].any() and not noise[3].any()


def test_both_networks_are_given_the_class():
    family = make(classes=3)
    seen = []
    for module in family.modules.values():
        module.class_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    labels = torch.arange(8) % 3
    list(family.losses(family.modules, batch(0, labels)))
    assert len(seen) == 4 and all(torch.equal(given, labels) for given in seen)


def test_what_a_run_leaves(train, read_log):
    folder = train("--save_images_epochs", "1", steps=24, plots=True)
    names = ("model_index.json", "samples.png", "training.gif", "loss_curves.png", "README.md")
    for name in names:
        assert (folder / name).is_file(), name
    lines = read_log(folder)
    keys = {"discriminator_loss", "generator_loss", "D(x)", "D(G(z))"}
    assert [line["step"] for line in lines] == list(range(2, 25, 2)) and all(keys <= set(line) for line in lines)
    assert all(0 < line["D(x)"] < 1 and 0 < line["D(G(z))"] < 1 for line in lines)

    with Image.open(folder / "training.gif") as movie:
        assert movie.n_frames == len(list((folder / "samples").glob("step-*.png"))) + 1 == 3
    card = (folder / "README.md").read_text()
    parameters = sum(tensor.numel() for tensor in load_file(folder / "generator" / WEIGHTS).values())
    assert "TinyDCGANGenerator" in card and "gray" in card and f"{parameters / 1e6:.2f} M" in card
    pipe = TinyPipeline.from_pretrained(folder)
    assert type(pipe) is TinyDCGANPipeline and pipe.discriminator is not None and pipe().images[0].mode == "L"


def test_the_animation_shows_the_same_latents(train, monkeypatch):
    seen, sample = [], DCGAN.sample

    def watched(self, pipeline, num_images, seed):
        call = type(pipeline).__call__
        monkeypatch.setattr(
            type(pipeline),
            "__call__",
            lambda pipe, **arguments: (
                seen.append([g.initial_seed() for g in arguments["generator"]]) or call(pipe, **arguments)
            ),
        )
        images = sample(self, pipeline, num_images, seed)
        monkeypatch.setattr(type(pipeline), "__call__", call)
        return images

    monkeypatch.setattr(DCGAN, "sample", watched)
    train("--save_images_epochs", "1", "--train_batch_size", "32", steps=6)
    assert len(seen) == 3 and seen[0] == seen[1] == seen[2] and len(set(seen[0])) == 20


def test_a_conditional_run_has_a_row_for_each_class(train):
    folder = train("--class_conditional", steps=1)
    pipe = TinyPipeline.from_pretrained(folder)
    assert pipe.config.id2label == {k: str(k) for k in range(10)}
    for classes, labels in ((3, "abc"), (12, "abcdefghij")):
        family = make(classes=classes)
        pipe = TinyDCGANPipeline(family.modules["generator"].eval(), id2label=family.id2label)
        images, options = family.sample(pipe, 2 * len(labels), 0)
        assert len(images) == 2 * len(labels) and options == {"columns": 2, "row_labels": list(labels)}
    assert "class_labels=" in (folder / "README.md").read_text()
    assert "guidance_scale" not in (folder / "README.md").read_text()


def test_averaged_weights_and_statistics_are_what_is_saved(train):
    folder = train()
    saved, trained = (load_file(folder / path / WEIGHTS) for path in ("generator", "checkpoint-6/generator"))
    for kind in ("weight", "running_mean", "running_var"):
        assert any(kind in name and not torch.equal(saved[name], trained[name]) for name in saved), kind
    assert all(torch.equal(saved[name], trained[name]) for name in saved if "num_batches" in name)


def test_a_skipped_step_leaves_the_statistics_as_they_were(train, read_log, monkeypatch):
    seen, optimize = [], Trainer._optimize

    def broken_once(self, step):
        seen.append([buffer.clone() for buffer in self.buffers])
        return optimize(self, step)

    def training(self, step, *rest, draw=Batches.training):
        drawn = draw(self, step, *rest)
        drawn.images.fill_(torch.nan if step == 1 else 0.5)
        return drawn

    monkeypatch.setattr(Trainer, "_optimize", broken_once)
    monkeypatch.setattr(Batches, "training", training)
    folder = train(steps=4)
    assert [line["step"] for line in read_log(folder) if "skipped" in line] == [2]
    before, after = seen[1:3]
    assert len(before) == 9 and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for network in ("generator", "discriminator"):
        assert all(tensor.isfinite().all() for tensor in load_file(folder / network / WEIGHTS).values())


def test_float16_with_several_micro_batches_is_refused(tmp_path):
    """Of one gradient scaler accelerate unscales both networks' gradients, whichever is clipped."""
    arguments = DCGANArguments(output_dir=str(tmp_path), mixed_precision="no", num_threads=1)
    accelerator, data = setup_process(arguments), load_images("digits", max_samples=8)
    assert not accelerator.ddp_handler.broadcast_buffers
    settings = dataclasses.replace(arguments, mixed_precision="fp16", gradient_accumulation_steps=2)
    with pytest.raises(UserError, match="--mixed_precision fp16 --gradient_accumulation_steps 2"):
        Trainer(settings, accelerator, data, make())


def test_noise_that_outlasts_the_run_is_said(train, capsys):
    train("--instance_noise", "0.1", "--instance_noise_steps", "3", steps=2)
    assert "--instance_noise_steps 3: the run ends before, after 2 steps" in capsys.readouterr().err
    train("--instance_noise", "0.1", "--instance_noise_steps", "2", name="fits", steps=2)
    assert "instance_noise_steps" not in capsys.readouterr().err


@pytest.mark.parametrize(("optimizer", "stops"), [("adam", (2, 3)), ("muon", (3,))])
def test_a_resumed_run_equals_an_uninterrupted_one(train, train_in_two, optimizer, stops):
    options = ("--instance_noise", "0.1", "--class_conditional", "--gradient_accumulation_steps", "2")
    options += ("--optimizer", optimizer, "--posthoc_ema")
    whole = train(*options, name="whole")
    names = ["train_log.jsonl", "samples.png", *(path.relative_to(whole) for path in whole.glob("snapshots/*/*"))]
    assert len(names) == 2 + 6 * 5  # two averages of each network, and a manifest
    names += [f"{at}{network}/{WEIGHTS}" for network in ("generator", "discriminator") for at in ("", "checkpoint-6/")]
    for stopped_at in stops:
        resumed = train_in_two(*options, stopped_at=stopped_at, name=f"resumed-{stopped_at}")
        for network in ("generator", "discriminator"):
            name = f"checkpoint-6/{network}_optimizer/optimizer.safetensors"
            ours, theirs = load_file(whole / name), load_file(resumed / name)
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
        for name in names:
            assert (whole / name).read_bytes() == (resumed / name).read_bytes(), (stopped_at, name)


def test_fine_tuning_starts_from_both_networks(train):
    first = train(name="first", steps=2)
    second = train("--pretrained_model_name_or_path", str(first), "--learning_rate", "0", name="second", steps=2)
    for network in ("generator", "discriminator"):
        a, b = load_file(first / network / WEIGHTS), load_file(second / network / WEIGHTS)
        weights = [name for name in a if "running" not in name and "num_batches" not in name]
        assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in weights)
    index = json.loads((first / "model_index.json").read_text())
    (first / "model_index.json").write_text(json.dumps(index | {"discriminator": [None, None]}))
    with pytest.raises(UserError, match="without its discriminator"):
        train("--pretrained_model_name_or_path", str(first), name="third")


def draw_mixture(count: int) -> tuple[np.ndarray, np.ndarray]:
    """8x8 images of a spot at a draw from eight narrow Gaussians on a circle, and the centers of these."""
    random = np.random.default_rng(0)
    angles = 2 * np.pi * np.arange(8) / 8
    centers = 3.5 + 2.4 * np.stack([np.cos(angles), np.sin(angles)], 1)
    places = centers[random.integers(8, size=count)] + 0.1 * random.standard_normal((count, 2))
    grid = np.stack(np.meshgrid(np.arange(8), np.arange(8), indexing="xy"), -1)
    squared = np.square(grid - places[:, None, None]).sum(-1)
    return (255 * np.exp(-squared / 2)).astype(np.uint8), centers


@pytest.mark.slow
def test_it_covers_the_modes_of_a_mixture(tmp_path):
    images, centers = draw_mixture(2000)
    (tmp_path / "spots").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "spots" / f"{i:04}.png")
    train_dcgan.main(
        [
            *("--dataset_name", str(tmp_path / "spots"), "--output_dir", str(tmp_path / "run")),
            *("--generator_channels", "16", "32", "--discriminator_channels", "16", "32", "--latent_dim", "16"),
            *(
                "--max_train_steps",
                "600",
                "--train_batch_size",
                "64",
                "--eval_batch_size",
                "4",
                "--learning_rate",
                "1e-3",
            ),
            *("--real_label", "0.9", "--instance_noise", "0.2", "--instance_noise_steps", "600"),
            *("--save_images_epochs", "0", "--mixed_precision", "no", "--num_threads", "1"),
        ]
    )
    pipe = TinyPipeline.from_pretrained(tmp_path / "run")
    samples = pipe(batch_size=500, generator=torch.Generator().manual_seed(0), output_type="np").images[..., 0]
    mass = samples / samples.sum((1, 2), keepdims=True)
    places = np.stack([(mass.sum(1) * np.arange(8)).sum(1), (mass.sum(2) * np.arange(8)).sum(1)], 1)  # (500, 2): x, y
    distances = np.linalg.norm(places[:, None] - centers, axis=-1)
    near = distances.min(1) < 0.6
    covered = np.bincount(distances.argmin(1)[near], minlength=8) > 0.02 * len(samples)
    assert covered.sum() >= 6, (covered, near.mean())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--real_label", "0.1", "--fake_label", "0.9"], ["0.1", "0.9", "smoothed"]),
        (["--real_label", "1.5"], ["1.5"]),
        (["--instance_noise", "-1"], ["--instance_noise", "-1"]),
        (["--instance_noise_steps", "0"], ["--instance_noise_steps", "0"]),
        (["--validation_split", "0.1"], ["--validation_split", "no validation loss"]),
        (["--early_stopping_patience", "3"], ["--early_stopping_patience"]),
        (["--gradient_checkpointing"], ["--gradient_checkpointing", "batch norm"]),
        (["--resolution", "9"], ["9", "multiple of 4", "--generator_channels"]),
        (["--discriminator_channels", "8", "0"], ["--discriminator_channels 0"]),
        (["--latent_dim", "0"], ["latent_dim", "0"]),
        (["--class_embed_dim", "0", "--class_conditional"], ["class_embed_dim", "0"]),
        (["--pretrained_model_name_or_path", "no/such/folder"], ["no/such/folder"]),
    ],
)
def test_each_mistake_is_one_line_before_training(check_mistake, argv, words):
    check_mistake(argv, words)


def test_a_checkpoint_of_other_images_or_classes_is_refused(train):
    folder = train(steps=1)
    for argv, words in (
        (["--resolution", "16"], "8x8 pixels.*16x16.*--resolution 8"),
        (["--class_conditional"], "no classes.*ask for 10.*--class_conditional"),
    ):
        with pytest.raises(UserError, match=words):
            train("--pretrained_model_name_or_path", str(folder), *argv, name="other")
    folder = train("--class_conditional", "--classes", "1,2", name="classes", steps=1)
    with pytest.raises(UserError, match=r"its classes are \['1', '2'\], but those of digits are \['3', '4'\]"):
        train("--pretrained_model_name_or_path", str(folder), "--class_conditional", "--classes", "3,4", name="other")


def test_flags_that_a_checkpoint_does_not_have_are_refused(train):
    folder = train(steps=1)
    argv = ["--pretrained_model_name_or_path", str(folder), "--discriminator_channels", "8", "16", "--latent_dim", "5"]
    with pytest.raises(UserError, match=r"--latent_dim 5 \(it has 4\), --discriminator_channels 8 16 \(it has 8 8\)"):
        train(*argv, name="other")
    smoke = ("--pretrained_model_name_or_path", str(folder), "--smoke")  # which asks for a width of 8
    train(*smoke, name="smoke", steps=1)
