"""Classes: how they are learned, saved, guided and carried over, and every mistake with them."""

import json
import re
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tiny_diffusers import TinyConditionalPipeline, TinyPipeline
from tiny_diffusers.data import ImageData
from tiny_diffusers.errors import UserError
from tiny_diffusers.families import unets
from tiny_diffusers.families.conditional_diffusion import ConditionalArguments, ConditionalDiffusion
from tiny_diffusers.families.unets import build_unet, resolve_unet
from tiny_diffusers.models.layers_tiny import height_and_width
from tiny_diffusers.train_scripts import train_conditional, train_unconditional
from tiny_diffusers.training.arguments import parse_arguments
from tiny_diffusers.training.batches import Batches


SCRIPT = train_conditional
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def stock_config(tmp_path):
    """A stock network's configuration, as a file."""
    config = {"block_out_channels": [8, 8], "norm_num_groups": 4, "layers_per_block": 1, "attention_head_dim": 8}
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    path = tmp_path / "stock.json"
    path.write_text(json.dumps({"_class_name": "UNet2DModel", **config, **blocks}))
    return str(path)


def read(path):
    return json.loads(path.read_text())


def class_table(folder):
    """The rows of a network's table of classes, (K + 1, D)."""
    weights = load_file(folder / "unet" / WEIGHTS)
    if "class_embedding.weight" in weights:
        return weights["class_embedding.weight"]
    return weights["class_embed.table.weight"].T


def test_what_a_run_leaves(train):
    folder = train("--classes", "3,7")
    index = read(folder / "model_index.json")
    assert index["id2label"] == {"0": "3", "1": "7"}
    assert (index["null_class_id"], index["class_dropout_prob"]) == (2, 0.1)
    pipe = TinyPipeline.from_pretrained(folder)
    assert type(pipe) is TinyConditionalPipeline and pipe.unet.config.num_class_embeds == 2
    assert len(pipe(["7", "3"], guidance_scale=3.0, num_inference_steps=2).images) == 2
    card = (folder / "README.md").read_text()
    assert "class-conditional" in card and "--guidance_scale 3" in card


def test_images_are_of_the_class_that_is_asked_for(train, tmp_path):
    for name, gray in (("dark", 30), ("bright", 220)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.full((8, 8), gray + i, np.uint8)).save(tmp_path / "images" / name / f"{i}.png")
    folder = train(
        *("--dataset_name", str(tmp_path / "images"), "--validation_split", "0"),
        *("--block_out_channels", "16", "16", "--learning_rate", "1e-2", "--train_batch_size", "16"),
        *("--ema_max_decay", "0.9", "--checkpointing_steps", "1000", "--save_images_epochs", "0"),
        steps=40,
    )
    pipe = TinyPipeline.from_pretrained(folder)
    for w in (1.0, 2.0):
        generator = torch.Generator().manual_seed(0)
        labels = ["dark"] * 4 + ["bright"] * 4
        images = pipe(labels, guidance_scale=w, generator=generator, num_inference_steps=10, output_type="np").images
        assert images[:4].mean() < 0.3 and images[4:].mean() > 0.7


def test_classes_without_a_training_image_are_named(train, capsys):
    train("--max_train_samples", "12", steps=1)
    assert re.search(r"[1-9] of 10 classes have no training image.*: \d", capsys.readouterr().err)
    train("--validation_split", "0", "--overwrite_output_dir", steps=1)
    assert "no training image" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prediction_type", "steps", "stopped_at"), [("v_prediction", 10, 3), ("flow", 6, 3), ("edm", 6, 3)]
)
def test_a_resumed_run_equals_an_uninterrupted_one(train, train_in_two, prediction_type, steps, stopped_at):
    options = ("--class_dropout_prob", "0.5", "--random_flip", "--prediction_type", prediction_type)
    whole = train(*options, steps=steps, name="whole")
    resumed = train_in_two(*options, stopped_at=stopped_at, steps=steps)
    for name in ("unet/" + WEIGHTS, "train_log.jsonl", "samples.png"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes(), name


def test_the_average_starts_after_a_tenth_of_the_run(train, capsys):
    folder = train("--checkpointing_steps", "1", "--checkpoints_total_limit", "10", steps=10)
    assert "ema_start_step: 1\n" in (folder / "config.yaml").read_text()
    for step, equal in ((1, True), (3, False)):
        checkpoint = folder / f"checkpoint-{step}"
        weights, average = (load_file(checkpoint / name / WEIGHTS) for name in ("unet", "unet_ema"))
        assert all(torch.equal(weights[key], average[key]) for key in weights) == equal

    longer = ("--resume_from_checkpoint", "latest", "--checkpointing_steps", "100")
    train(*longer, steps=20)  # does not move the start
    assert "ema_start_step: 1\n" in (folder / "config.yaml").read_text()
    assert "ema_start_step" not in capsys.readouterr().err
    assert parse_arguments(ConditionalArguments, ["--ema_start_step", "2000"]).ema_start_step == 2000


@pytest.mark.parametrize(("share", "least", "most"), [(0.0, 0, 0), (0.5, 0.35, 0.65)])
def test_labels_are_dropped_in_training_and_never_in_validation(train, monkeypatch, share, least, most):
    seen = {True: [], False: []}
    assemble = Batches._assemble

    def spy(self, indices, draws, training, progress=1.0):
        batch = assemble(self, indices, draws, training, progress)
        seen[training].append(batch.labels)
        return batch

    monkeypatch.setattr(Batches, "_assemble", spy)
    train("--class_dropout_prob", str(share), "--train_batch_size", "48", steps=2)
    dropped = {training: (torch.cat(labels) == 10).float().mean() for training, labels in seen.items()}
    assert least <= dropped[True] <= most and dropped[False] == 0


def test_a_grid_has_a_row_for_each_class_and_the_same_noise_at_each_scale():
    calls = []

    class FakePipeline:
        def __call__(self, class_labels, guidance_scale, generator, num_inference_steps):
            calls.append((class_labels, guidance_scale, [g.initial_seed() for g in generator]))
            self.images = [f"{label}@{guidance_scale:g}#{i}" for i, label in enumerate(class_labels)]
            return self

    unet = torch.nn.Identity()
    family = ConditionalDiffusion(unet, None, {0: "cat", 1: "frog"}, 0.1, [1.0, 4.0], num_inference_steps=2)
    images, options = family.sample(FakePipeline(), num_images=8, seed=5)
    assert images == ["0@1#0", "0@1#1", "0@4#0", "0@4#1", "1@1#2", "1@1#3", "1@4#2", "1@4#3"]
    assert options["columns"] == 4 and options["row_labels"] == ["cat", "frog"]
    assert options["column_labels"] == ["w = 1", "", "w = 4", ""]
    assert [call[2] for call in calls] == [[5, 6, 7, 8]] * 2

    many = ConditionalDiffusion(unet, None, {i: str(i) for i in range(100)}, num_inference_steps=2)
    assert many.sample(FakePipeline(), num_images=4, seed=0)[1]["row_labels"] == [str(i) for i in range(10)]


def test_guidance_without_dropped_labels_warns_and_says_why(train, capsys):
    folder = train("--class_dropout_prob", "0", steps=1)
    assert "guidance" not in capsys.readouterr().err  # the grids keep to what the model can do
    pipe = TinyPipeline.from_pretrained(folder)
    with pytest.warns(UserWarning, match="won't help.*trained without label dropout"):
        pipe("3", guidance_scale=3.0, num_inference_steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe("3", guidance_scale=1.0, num_inference_steps=2)

    train("--class_dropout_prob", "0", "--guidance_scales", "1", "3", name="asked", steps=1)
    assert "guidance won't help if no label is dropped" in capsys.readouterr().err


def test_a_stock_network_has_a_row_more_than_classes(train, stock_config):
    folder = train("--model_config_name_or_path", stock_config, network=False, steps=1)
    pipe = TinyPipeline.from_pretrained(folder)
    assert type(pipe).__name__ == "TinyConditionalPipeline" and type(pipe.unet).__name__ == "UNet2DModel"
    assert pipe.unet.config.num_class_embeds == 11 and pipe.config.null_class_id == 10
    assert len(pipe([0, 9], guidance_scale=2.0, num_inference_steps=2).images) == 2


@pytest.mark.parametrize("stock", [False, True])
def test_fine_tuning_keeps_the_classes_it_knows_by_name(train, stock_config, capsys, stock):
    network = ("--model_config_name_or_path", stock_config) if stock else ()
    first = train(*network, "--classes", "1,2,3", name="first", network=not stock, steps=2)
    loaded = ("--pretrained_model_name_or_path", str(first))
    second = train("--classes", "3,7", *loaded, "--learning_rate", "0", name="second", network=False, steps=2)
    assert "1 of the 2 classes are new to the checkpoint" in capsys.readouterr().err
    before, after = class_table(first), class_table(second)
    assert len(before) == 4 and len(after) == 3
    torch.testing.assert_close(after[0], before[2])  # "3"
    torch.testing.assert_close(after[2], before[3])  # no class
    assert not any(torch.allclose(after[1], row) for row in before)  # "7"
    weights = [load_file(folder / "unet" / WEIGHTS) for folder in (first, second)]
    for key in weights[0]:
        if "class_embed" not in key:
            torch.testing.assert_close(weights[0][key], weights[1][key])


def test_fine_tuning_from_no_classes_and_to_none(train):
    plain = train(name="plain", script=train_unconditional, steps=1)
    conditional = train("--pretrained_model_name_or_path", str(plain), name="conditional", steps=1)
    assert TinyPipeline.from_pretrained(conditional).unet.config.num_class_embeds == 10
    with pytest.raises(UserError, match="train_conditional.py"):
        train("--pretrained_model_name_or_path", str(conditional), name="back", script=train_unconditional)


def test_another_process_than_the_checkpoints_is_said(train, capsys):
    process = ("--prediction_type", "epsilon", "--ddpm_beta_schedule", "quadratic", "--ddpm_num_steps", "900")
    first = train(*process, name="first", steps=1)
    assert "would have to learn" not in capsys.readouterr().err
    loaded = ("--pretrained_model_name_or_path", str(first))
    train(*loaded, *process, name="same", steps=1)
    assert "would have to learn" not in capsys.readouterr().err
    train(*loaded, name="second", steps=1)
    said = capsys.readouterr().err
    for kept in ("--ddpm_beta_schedule quadratic", "--ddpm_num_steps 900"):
        assert f"{kept} continues from what it knows" in said
    assert "--prediction_type" not in said  # which is the checkpoint's if nobody says
    train(*loaded, "--prediction_type", "flow", name="third", steps=1)
    assert "--prediction_type epsilon continues from what it knows" in capsys.readouterr().err


@pytest.mark.parametrize("conditioning", ["add", "scale"])
def test_both_ways_of_conditioning_train(train, conditioning):
    folder = train("--class_conditioning", conditioning, steps=2)
    assert read(folder / "unet" / "config.json")["class_conditioning"] == conditioning


def test_dynamic_thresholding_is_saved_with_the_model(train):
    config = read(train("--dynamic_thresholding", "0.9", steps=1) / "scheduler" / "scheduler_config.json")
    assert config["thresholding"] and config["dynamic_thresholding_ratio"] == 0.9


def images_of(size, channels=3):
    images = torch.zeros(1, channels, *height_and_width(size), dtype=torch.uint8)
    return ImageData(images, torch.zeros(1, dtype=torch.int64), {0: "a"}, "gray", "train", "")


@pytest.mark.parametrize(
    ("argv", "cost"),
    [
        # 2 * 2 + 1 blocks of 4 L^2 C operations, against 36 L C^2, with L = 64 * 64 places and C = 64 channels
        (["--patch_size", "1", "--attention", "full", "--block_out_channels", "64", "64"], "21.5 GFLOP.*7 times"),
        (["--patch_size", "2", "--attention", "full", "--block_out_channels", "64", "64"], None),
        (["--patch_size", "1", "--attention", "linear", "--block_out_channels", "64", "64"], None),
        (["--patch_size", "1", "--attention", "none", "full", "--block_out_channels", "64", "64"], None),
        (["--patch_size", "1", "--attention", "none", "--block_out_channels", "64"], "4.3 GFLOP.*for --mid_attention"),
    ],
)
def test_full_attention_at_64x64_on_a_cpu_is_warned_of_with_its_cost(capsys, monkeypatch, argv, cost):
    monkeypatch.setattr(unets, "default_device", lambda: torch.device("cpu"))
    with torch.device("meta"):
        arguments = parse_arguments(ConditionalArguments, [*argv, "--layers_per_block", "2"])
        build_unet(arguments, images_of(64), num_class_embeds=1)
    said = capsys.readouterr().err
    assert (said == "") if cost is None else re.search(f"64x64 positions.*{cost}", said)


@pytest.mark.parametrize(
    ("size", "patch_size", "levels"),
    [
        *((8, 1, 2), (26, 1, 2), (28, 2, 2), (32, 2, 3), (48, 2, 3), (52, 2, 2), (60, 2, 2), (62, 1, 2), (64, 2, 3)),
        *(((12, 16), 1, 2), ((28, 30), 1, 2), ((24, 36), 2, 2), ((48, 64), 2, 3), ((8, 128), 2, 3)),
    ],
)
def test_the_default_network_fits_its_resolution(size, patch_size, levels):
    arguments = parse_arguments(ConditionalArguments, [])
    with torch.device("meta"):
        config = build_unet(arguments, images_of(size), num_class_embeds=1).config
    assert (config.patch_size, len(config.block_out_channels)) == (patch_size, levels)
    assert config.resnet_time_scale_shift == "scale_shift" and "full" in config.attention
    resolved = resolve_unet(arguments, images_of(size))
    assert resolved["block_out_channels"] == list(config.block_out_channels) and resolved["patch_size"] == patch_size


@pytest.mark.parametrize(("size", "shown", "nearest"), [(9, "9", "8"), (31, "31", "32"), ((12, 15), "12x15", "12x16")])
def test_an_odd_resolution_is_refused_with_what_to_change(size, shown, nearest):
    advice = f"another size, or fewer levels in --block_out_channels; the nearest size is {nearest}."
    with pytest.raises(UserError, match=f"--resolution {shown} .*{advice}"):
        build_unet(parse_arguments(ConditionalArguments, []), images_of(size), num_class_embeds=1)


def test_the_optimizer_is_that_of_diffusion():
    arguments = parse_arguments(ConditionalArguments, [])
    assert arguments.optimizer is None and arguments.learning_rate is None  # resolve_diffusion chooses both
    decided = ConditionalArguments.__dataclass_fields__["pretrained_model_name_or_path"].metadata["decides"]
    assert "prediction_type" in decided


def test_a_preset_is_a_base_that_flags_change():
    arguments = parse_arguments(ConditionalArguments, ["--preset", "self-attention-2-levels-half", "--dropout", "0.1"])
    with torch.device("meta"):
        config = build_unet(arguments, images_of(32), num_class_embeds=1).config
    assert (config.block_out_channels, config.attention) == ((104, 120), "full")
    assert (config.sample_size, config.dropout) == (32, 0.1)


def test_data_without_labels_are_refused_and_their_columns_named(train, tmp_path):
    (tmp_path / "images").mkdir()
    for name in "ab":
        Image.new("L", (8, 8)).save(tmp_path / "images" / f"{name}.png")
    with pytest.raises(UserError, match="no labels.*columns are image.*`label_column`"):
        train("--dataset_name", str(tmp_path / "images"))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--class_dropout_prob", "1.5"], ["1.5", "[0, 1)"]),
        (["--class_dropout_prob", "-0.1"], ["-0.1", "[0, 1)"]),
        (["--guidance_scales", "1", "nan"], ["nan", "finite"]),
        (["--class_conditioning", "ad"], ["'ad'", "'add'"]),
        (["--preset", "plane-256"], ["'plane-256'", "Did you mean 'plain-256'"]),
        (["--dynamic_thresholding", "2"], ["2.0", "(0, 1]"]),
    ],
)
def test_each_mistake_is_one_line_before_training(check_mistake, argv, words):
    check_mistake(argv, words)
