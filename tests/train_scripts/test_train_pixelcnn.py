"""Training PixelCNNs on the shared loop, on the embedded digits."""

import itertools
import time

import pytest
import torch
import yaml

from tiny_diffusers import TinyPipeline, TinyPixelCNNPipeline
from tiny_diffusers.data import load_images
from tiny_diffusers.errors import UserError
from tiny_diffusers.families.pixelcnn import PixelCNNArguments, build_pixelcnn
from tiny_diffusers.train_scripts import train_pixelcnn
from tiny_diffusers.training.arguments import parse_arguments


SCRIPT = train_pixelcnn
NETWORK = [
    *("--hidden_channels", "8", "--num_layers", "3", "--num_levels", "17", "--train_batch_size", "16"),
    *("--max_train_samples", "128", "--max_validation_samples", "16", "--checkpointing_steps", "1000"),
]


@pytest.mark.parametrize("variant", ["baseline", "gated", "plusplus", "row_lstm"])
def test_each_variant_trains_and_samples(train, read_log, variant):
    folder = train("--variant", variant, steps=2)
    pipe = TinyPipeline.from_pretrained(folder)
    assert type(pipe) is TinyPixelCNNPipeline
    assert pipe.pixelcnn.config.variant == variant
    assert (folder / "samples.png").is_file()
    losses = [line["val_loss"] for line in read_log(folder) if "val_loss" in line]
    assert losses and all(loss > 0 for loss in losses)


def test_the_loss_is_bits_a_dimension_and_falls(train, read_log):
    folder = train("--learning_rate", "1e-2", "--lr_warmup_steps", "0", "--save_images_epochs", "0", steps=60)
    losses = [line["val_loss"] for line in read_log(folder) if "val_loss" in line]
    uniform = torch.log2(torch.tensor(17.0)).item()  # the digits have 17 levels
    assert uniform / 2 < losses[0] < 1.5 * uniform
    assert losses[-1] < 0.75 * uniform


def test_classes(train):
    folder = train("--class_conditional", "--classes", "3,8,9", steps=1)
    pipe = TinyPipeline.from_pretrained(folder)
    assert pipe.config.id2label == {0: "3", 1: "8", 2: "9"}
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe(class_labels=["3", "9"]).images) == 2


def test_a_single_image_is_learned_by_heart(train, read_log, monkeypatch):
    monkeypatch.setattr(time, "perf_counter", itertools.count(0, 1e-6).__next__)  # costly grids would be fewer
    folder = train(
        *("--variant", "baseline", "--single_image", "5", "--num_levels", "256", "--hidden_channels", "16"),
        *("--learning_rate", "1e-2", "--lr_warmup_steps", "0", "--ema_max_decay", "0.9"),
        steps=150,
    )
    losses = [line["val_loss"] for line in read_log(folder) if "val_loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    assert yaml.safe_load((folder / "config.yaml").read_text())["single_image"] == 5
    assert len(list((folder / "samples").glob("*"))) == 9  # by share of the run: an epoch is a thousand steps


def test_plusplus_begins_with_its_data_dependent_initialization():
    arguments = parse_arguments(PixelCNNArguments, [*NETWORK, "--variant", "plusplus"])
    gains = build_pixelcnn(arguments, load_images("digits")).network.vertical_stream.first.gain
    assert not torch.allclose(gains, torch.ones_like(gains))


def test_training_goes_on_from_a_checkpoint(train):
    first = train("--classes", "3", name="first")
    second = train("--classes", "3", "--pretrained_model_name_or_path", str(first), name="second", steps=1)
    before, after = (TinyPipeline.from_pretrained(f).pixelcnn.network.head.weight for f in (first, second))
    torch.testing.assert_close(before, after, rtol=0, atol=2e-3)

    with pytest.raises(UserError, match=r"--hidden_channels 16 \(it has 8\)"):
        train("--hidden_channels", "16", "--pretrained_model_name_or_path", str(first), name="third")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num_levels", "512"], r"--num_levels 512: it must be in \[2, 256\]"),
        (["--single_image", "100000"], "has the images 0 to"),
        (["--temperature", "0"], "above 0"),
        (["--temperature", "inf"], "finite"),
        (["--temperature", "0.9", "--variant", "baseline"], "draws nothing"),
        (["--num_mixtures", "5"], "only plusplus"),
        (["--gradient_checkpointing"], "TinyPixelCNNModel"),
        (["--class_dropout_prob", "1"], "in \\[0, 1\\)"),
        (["--variant", "pixelsnail"], "baseline, gated, plusplus, row_lstm"),
        (["--variant", "baseline", "--class_conditional"], "no gates"),
    ],
)
def test_mistakes(train, argv, message):
    with pytest.raises(UserError, match=message):
        train(*argv)
