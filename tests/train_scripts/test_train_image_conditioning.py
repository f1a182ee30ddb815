"""Training with an image as a condition: how it is paired with the image, dropped, learned, saved and shown."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tiny_diffusers import TinyPipeline
from tiny_diffusers.data import load_images
from tiny_diffusers.errors import UserError
from tiny_diffusers.train_scripts import train_conditional, train_unconditional
from tiny_diffusers.training.batches import Batches


SCRIPT = train_conditional
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
LOW = ("--conditioning", "low_resolution:2")


@pytest.fixture
def pairs(tmp_path):
    """An .npz of color images without labels, and of pairs that show the same."""
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "pairs.npz", image=images, edges=images, flat=images[:, :4, :4])
    return tmp_path / "pairs.npz"


@pytest.fixture
def batches(monkeypatch):
    """The batches of the runs of a test: those of training, and the others."""
    seen = {True: [], False: []}
    assemble = Batches._assemble

    def spy(self, indices, draws, training, progress=1.0):
        batch = assemble(self, indices, draws, training, progress)
        seen[training].append((self.family, batch))
        return batch

    monkeypatch.setattr(Batches, "_assemble", spy)
    return seen


def read(path):
    return json.loads(path.read_text())


def test_what_a_run_leaves(train):
    folder = train(*LOW)
    index, network = read(folder / "model_index.json"), read(folder / "unet" / "config.json")
    assert (index["conditioning"], index["class_dropout_prob"]) == ("low_resolution:2", 0.1)
    assert (network["in_channels"], network["out_channels"], network["num_class_embeds"]) == (2, 1, 10)
    assert (folder / "pipeline_tiny_operators.py").is_file()
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: image-to-image" in card
    assert "takes 2 channels and gives 1. No stock pipeline of diffusers samples such a network" in card
    assert 'image = load_image("picture.png").convert("L")  # a gray image of 4x4 pixels (low_resolution:2)' in card
    assert 'images = pipe(image=image, batch_size=4, class_labels=["0"]).images' in card
    assert 'tiny-diffusers sample path/to/this/folder --image picture.png --class_labels "0"' in card
    pipe = TinyPipeline.from_pretrained(folder)
    small = Image.new("L", (4, 4))
    assert len(pipe("3", image=[small] * 2, guidance_scale=2.0, num_inference_steps=2).images) == 2


@pytest.mark.parametrize(
    ("flags", "kind"),
    [(("--conditioning", "grayscale"), "grayscale"), (("--conditioning_column", "edges"), "image:3")],
)
def test_images_without_labels_are_enough(train, pairs, read_log, flags, kind):
    folder = train("--train_data_dir", str(pairs), *flags, "--guidance_scales", "1", "2")
    assert read(folder / "model_index.json")["conditioning"] == kind
    assert any("val_loss" in line for line in read_log(folder))
    pipe = TinyPipeline.from_pretrained(folder)
    assert pipe.unet.config.num_class_embeds is None
    image = np.zeros((1, *pipe._conditioning.shape[1:], pipe._conditioning.shape[0]), np.float32)
    assert len(pipe(image=image, batch_size=2, num_inference_steps=2).images) == 2


def test_label_column_none_leaves_the_classes_out(train):
    folder = train(*LOW, "--label_column", "none")
    assert TinyPipeline.from_pretrained(folder).unet.config.num_class_embeds is None
    with pytest.raises(UserError, match="no labels"):
        train("--label_column", "none", name="classes")


@pytest.mark.parametrize("kind", ["grayscale", "low_resolution:2", "image"])
def test_the_condition_is_of_the_image_as_it_was_augmented(train, pairs, batches, kind):
    flags = ("--conditioning_column", "edges") if kind == "image" else ("--conditioning", kind)
    jitter = ("--color_jitter", "0.5", "--cutout", "3") if kind != "image" else ()
    augment = ("--random_flip", "--random_crop_padding", "2", *jitter)
    train("--train_data_dir", str(pairs), *flags, *augment, "--class_dropout_prob", "0", steps=2)
    for family, batch in batches[True] + batches[False]:
        expected = batch.images  # its pair shows the same
        if kind != "image":
            expected = family.conditioning.enlarge(family.conditioning.observe(batch.images))
        torch.testing.assert_close(batch.conditioning_images, expected, rtol=0, atol=0)


def test_jitter_and_cutout_leave_a_paired_image_alone(train, pairs, batches):
    jitter = ("--color_jitter", "0.5", "--cutout", "3", "--class_dropout_prob", "0")
    train("--train_data_dir", str(pairs), "--conditioning_column", "edges", *jitter, steps=1)
    for _, batch in batches[True]:
        assert not torch.equal(batch.images, batch.conditioning_images)
        assert {*batch.conditioning_images.add(1).mul(127.5).round().int().unique().tolist()} > {0, 255}


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_images_are_dropped_with_their_labels_and_never_in_validation(train, batches, share):
    train(*LOW, "--conditioning_dropout_prob", str(share), steps=12)
    for training in (True, False):
        labels = torch.cat([batch.labels for _, batch in batches[training]])
        images = torch.cat([batch.conditioning_images for _, batch in batches[training]])
        dropped = (images == 0).all(dim=(1, 2, 3))
        assert torch.equal(dropped, labels == 10)
        assert abs(dropped.float().mean() - (share if training else 0)) < 0.16 * (share > 0) + 1e-6


def test_a_resumed_run_equals_an_uninterrupted_one(train, train_in_two, pairs):
    flags = ("--train_data_dir", str(pairs), "--conditioning_column", "edges")
    options = (*flags, "--class_dropout_prob", "0.5", "--random_flip", "--random_crop_padding", "2")
    whole = train(*options, name="whole")
    resumed = train_in_two(*options, stopped_at=3)
    for name in (WEIGHTS, "train_log.jsonl", "samples.png"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes(), name


def test_samples_follow_the_condition(train, tmp_path):
    grays = np.tile(np.array([30, 220], np.uint8), 8)[:, None, None]
    np.savez(tmp_path / "flat.npz", image=np.broadcast_to(grays, (16, 8, 8)))
    folder = train(
        *("--train_data_dir", str(tmp_path / "flat.npz"), *LOW, "--validation_split", "0"),
        *("--block_out_channels", "16", "16", "--learning_rate", "1e-2", "--train_batch_size", "16"),
        *("--ema_max_decay", "0.9", "--checkpointing_steps", "1000"),
        steps=60,
    )
    pipe = TinyPipeline.from_pretrained(folder)
    given = np.repeat(np.float32([30, 220]) / 255, 4)[:, None, None, None] * np.ones((1, 4, 4, 1), np.float32)
    for w in (1.0, 1.5):
        options = {"guidance_scale": w, "num_inference_steps": 10, "output_type": "np"}
        images = pipe(image=given, generator=torch.Generator().manual_seed(0), **options).images
        assert images[:4].mean() < 0.3 and images[4:].mean() > 0.7


def test_a_grid_shows_held_out_images_what_is_given_of_them_and_the_samples(train, monkeypatch):
    grids = []
    from tiny_diffusers import plots

    monkeypatch.setattr(
        plots, "image_grid", lambda images, **options: grids.append((images, options)) or Image.new("L", (1, 1))
    )
    train(*LOW, "--label_column", "none", "--eval_batch_size", "12", "--validation_split", "0.05", steps=1)
    (images, options) = grids[-1]
    # of 64 images 3 are held out: a row each, and 12 samples shared out among them
    assert options == {"columns": 6, "column_labels": ["given", "w = 1", "", "", "", "image"]} and len(images) == 18
    originals = load_images("digits", max_samples=64).images[:, 0].numpy()
    for row in range(3):
        given, image = np.asarray(images[6 * row]), np.asarray(images[6 * row + 5])
        assert (originals == image).all(axis=(1, 2)).any()
        np.testing.assert_allclose(given[::2, ::2], np.asarray(images[6 * row + 5].reduce(2)), atol=1)


@pytest.mark.parametrize("shown", [(), ("--show_channels", "1")])
def test_a_grid_pads_images_of_other_channels(train, tmp_path, shown):
    images = np.random.default_rng(0).integers(0, 256, (64, 2, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "pairs.npz", image=images, edges=images[:, 0])
    options = ("--train_data_dir", str(tmp_path / "pairs.npz"), "--image_column", "image", "--channels", "2")
    folder = train(*options, "--conditioning_column", "edges", *shown, steps=2)
    grid = Image.open(folder / "samples.png")
    assert grid.mode == "L" and (grid.width > grid.height or shown)


def test_a_stock_network_takes_the_image_too(train, tmp_path):
    config = {"block_out_channels": [8, 8], "norm_num_groups": 4, "layers_per_block": 1, "attention_head_dim": 8}
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    (tmp_path / "stock.json").write_text(json.dumps({"_class_name": "UNet2DModel", **config, **blocks}))
    stock = ("--model_config_name_or_path", str(tmp_path / "stock.json"))
    folder = train(*LOW, "--label_column", "none", *stock, network=False)
    pipe = TinyPipeline.from_pretrained(folder)
    assert type(pipe.unet).__name__ == "UNet2DModel" and pipe.unet.config.in_channels == 2
    assert len(pipe(image=Image.new("L", (4, 4)), num_inference_steps=2).images) == 1


def test_fine_tuning_keeps_the_condition(train, pairs, check_mistake):
    first = train(*LOW, name="first")
    loaded = ("--pretrained_model_name_or_path", str(first))
    second = train(*loaded, *LOW, "--learning_rate", "0", name="second", network=False)
    before, after = (load_file(folder / WEIGHTS) for folder in (first, second))
    for key in before:
        torch.testing.assert_close(before[key], after[key])

    taken = "takes a conditioning image (low_resolution:2), and this run is to take"
    check_mistake([*loaded], [f"{taken} no conditioning image", "leave the flag out"], network=False)
    check_mistake([*loaded, "--conditioning", "low_resolution:4"], [taken, "(low_resolution:4)"], network=False)
    check_mistake([*loaded], [f"{taken} no conditioning image"], network=False, script=train_unconditional)
    color = ("--train_data_dir", str(pairs), *LOW)
    check_mistake([*loaded, *color], ["1 channel", "3", "images of"], network=False)
    plain = train(name="plain")
    check_mistake(
        ["--pretrained_model_name_or_path", str(plain), *LOW],
        ["takes no conditioning image", "a conditioning image (low_resolution:2)"],
        network=False,
    )


def test_fine_tuning_takes_gray_pairs_as_the_checkpoint_does(train, pairs, tmp_path):
    edges = ("--conditioning_column", "edges")
    first = train("--train_data_dir", str(pairs), *edges, name="first", steps=1)
    images = np.load(pairs)["image"]
    np.savez(tmp_path / "gray.npz", image=images, edges=images[..., 0])
    loaded = ("--pretrained_model_name_or_path", str(first), "--train_data_dir", str(tmp_path / "gray.npz"))
    second = train(*loaded, *edges, name="second", steps=1, network=False)
    assert read(second / "model_index.json")["conditioning"] == "image:3"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--conditioning", "grayscale", "--conditioning_column", "edges"], ["give one of them"]),
        (["--conditioning", "greyscale"], ["'greyscale'", "Did you mean 'grayscale'"]),
        (["--conditioning", "image:3"], ["'image:3'", "grayscale, low_resolution:2"]),
        (["--conditioning", "grayscale"], ["--conditioning: 'grayscale'", "3 channels, but these have 1"]),
        (["--conditioning", "low_resolution:3"], ["factor of at least 2 that divides", "(8, 8)"]),
        (["--conditioning", "low_resolution"], ["such as low_resolution:2"]),
        (["--conditioning_column", "edges"], ["Unknown conditioning_column of 'digits'", "'edges'"]),
    ],
)
def test_each_mistake_is_one_line_before_training(check_mistake, argv, words):
    check_mistake(argv, words)


@pytest.mark.parametrize(
    ("column", "words"),
    [("flat", ["4x4 pixels, and its images 8x8"]), ("edge", ["Did you mean 'edges'"])],
)
def test_a_column_that_does_not_fit_is_one_line(check_mistake, pairs, column, words):
    check_mistake(["--train_data_dir", str(pairs), "--conditioning_column", column], words)
