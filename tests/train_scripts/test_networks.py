"""`--network transformer`: it is trained, resumed, loaded and shared as the U-Net is, and each mistake is one line."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import tiny
from tiny_diffusers import TinyPipeline, TinyTransformer2DModel
from tiny_diffusers.data import ImageData
from tiny_diffusers.families import unets
from tiny_diffusers.families.conditional_diffusion import ConditionalArguments
from tiny_diffusers.families.diffusion import DiffusionArguments
from tiny_diffusers.models.layers_tiny import height_and_width
from tiny_diffusers.train_scripts import train_conditional
from tiny_diffusers.training.arguments import parse_arguments
from tiny_diffusers.training.muon import split_parameters


NETWORK = [
    *("--network", "transformer", "--patch_size", "2", "--num_layers", "2", "--num_attention_heads", "1"),
    *("--attention_head_dim", "8", "--ddpm_num_inference_steps", "2"),
]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def images_of(size, channels=1):
    return ImageData(
        torch.zeros(1, channels, *height_and_width(size), dtype=torch.uint8), None, {0: "a"}, "gray", "train", ""
    )


def config_of(*flags, size=32, arguments=DiffusionArguments):
    with torch.device("meta"):
        return unets.build_unet(parse_arguments(arguments, list(flags)), images_of(size)).config


@pytest.mark.parametrize("kind", ["relative", "learned"])
def test_a_resumed_run_equals_an_uninterrupted_one(train, train_in_two, kind):
    options = ("--dropout", "0.1", "--position_embedding", kind, "--long_skips", "True", "--optimizer", "muon")
    whole = train(*options, name="whole")
    resumed = train_in_two(*options, stopped_at=3)
    for name in (f"unet/{WEIGHTS}", "train_log.jsonl", "samples.png"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes(), name
    pipe = TinyPipeline.from_pretrained(whole)
    assert type(pipe.unet) is TinyTransformer2DModel and pipe.unet.config.position_embedding == kind


def test_the_run_says_which_network_it_is_and_resumes_without_the_flag(train, capsys):
    folder = train("--dropout", "0.1", steps=1)
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert (settings["network"], settings["num_layers"], settings["block_out_channels"]) == ("transformer", 2, None)
    card = (folder / "README.md").read_text()
    assert "--network transformer" in card and "`TinyTransformer2DModel`" in card and "--block_out" not in card

    capsys.readouterr()
    flags = [*tiny.TINY_RUN, *NETWORK[-2:]]
    options = ("--dropout", "0.1", "--num_layers", "2")  # the second is of the transformer alone
    tiny.train(folder, *options, "--resume_from_checkpoint", "latest", steps=2, flags=flags)
    assert "warning" not in capsys.readouterr().err
    again = yaml.safe_load((folder / "config.yaml").read_text())
    assert {**settings, "max_train_steps": 2, "resolved": None} == {**again, "resolved": None}


@pytest.mark.parametrize(("network", "shrunk"), [("unet", "block_out_channels"), ("transformer", "num_layers")])
def test_smoke_shrinks_the_network_that_is_asked_for(network, shrunk):
    arguments = parse_arguments(DiffusionArguments, ["--smoke", "--network", network])
    resolved = unets.resolve_unet(arguments, images_of(8))
    given = {name for name in ("block_out_channels", "num_layers") if resolved[name] is not None}
    assert given == {shrunk} and resolved[shrunk] == DiffusionArguments.SMOKE[shrunk]


def test_a_loaded_transformer_keeps_its_weights_and_other_flags_must_fit(train, check_mistake, capsys):
    first = train(name="first", steps=1)
    loaded = ("--pretrained_model_name_or_path", str(first))
    second = train(*loaded, "--dropout", "0.3", "--learning_rate", "0", name="second", steps=1)
    assert json.loads((second / "unet" / "config.json").read_text())["dropout"] == 0.3
    a, b = (load_file(Path(folder) / "unet" / WEIGHTS) for folder in (first, second))
    assert all(torch.allclose(a[key], b[key], atol=1e-6) for key in a)
    check_mistake([*loaded, "--num_layers", "3", "--patch_size", "4"], ["--num_layers 3 (it has 2)", "(it has 2)"])
    check_mistake([*loaded, "--upsample", "bilinear"], ["--upsample bilinear (it knows no such option)"])
    words = ["--network unet: the network of", "is a TinyTransformer2DModel: leave it out"]
    check_mistake([*loaded, "--network", "unet"], words)
    configured = ("--model_config_name_or_path", str(first))
    third = train(*configured, name="third", steps=1)
    assert type(TinyPipeline.from_pretrained(third).unet) is TinyTransformer2DModel


def test_classes_that_a_checkpoint_knows_keep_their_rows(train):
    first = train("--classes", "3,7", name="first", script=train_conditional, steps=1)
    loaded = ("--pretrained_model_name_or_path", str(first), "--classes", "7,8", "--learning_rate", "0")
    second = train(*loaded, name="second", script=train_conditional, steps=1)
    a, b = (load_file(folder / "unet" / WEIGHTS)["class_embed.table.weight"].T for folder in (first, second))
    torch.testing.assert_close(b[[0, 2]], a[[1, 2]])  # "7", and no class


@pytest.mark.parametrize("size", [8, 9, 16, 24, 26, 28, 30, 31, 32, 48, 52, 60, 62, 64])
def test_the_default_transformer_fits_its_resolution(size):
    config = config_of("--network", "transformer", size=size)
    assert size % config.patch_size == 0 and 7 <= size // config.patch_size <= 31


@pytest.mark.parametrize(
    ("size", "patch_size"), [((12, 16), 1), ((16, 28), 2), ((8, 128), 4), ((48, 62), 2), ((27, 32), 1)]
)
def test_the_default_transformer_has_patches_that_divide_a_rectangle(size, patch_size):
    assert config_of("--network", "transformer", size=size).patch_size == patch_size


def test_presets_name_their_network_and_flags_change_them():
    config = config_of("--preset", "dit-ti-2", "--num_layers", "3", "--long_skips", "True")
    assert (config.num_attention_heads, config.num_layers, config.patch_size, config.long_skips) == (3, 3, 2, True)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--block_out_channels", "8", "8"], ["--block_out_channels: the network is a transformer", "--network unet"]),
        (["--upsample", "bilinear"], ["--upsample: the network is a transformer", "leave it out"]),
        (["--network", "unet"], ["--num_layers: the network is a unet, which has no such option", "transformer"]),
        (["--network", "transformr"], ["'transformr'", "'transformer'"]),
        (["--preset", "plain-256"], ["Unknown --preset 'plain-256'", "dit-ti-2"]),
        (["--num_layers", "65"], ["--num_layers 65", "[1, 64]"]),
        (["--mlp_ratio", "0"], ["--mlp_ratio 0.0", "(0, 64]"]),
        (["--position_embedding", "rotary"], ["'rotary'"]),
        (["--resolution", "9"], ["--resolution 9", "multiple"]),
        (
            ["--position_embedding", "relative", "--attention_head_dim", "6"],
            ["attention_head_dim, 6", "multiple of 4"],
        ),
    ],
)
def test_each_mistake_is_one_line_before_training(check_mistake, argv, words):
    check_mistake(argv, words)


def test_the_conditional_unets_own_flag_is_refused(check_mistake):
    words = ["--class_conditioning: the network is a transformer"]
    check_mistake(["--class_conditioning", "add"], words, script=train_conditional)


def test_many_patches_on_a_cpu_are_warned_of_with_their_cost(capsys, monkeypatch):
    monkeypatch.setattr(unets, "default_device", lambda: torch.device("cpu"))
    config_of("--network", "transformer", "--patch_size", "2", size=64)
    assert capsys.readouterr().err == ""
    config_of("--network", "transformer", "--patch_size", "1", size=64, arguments=ConditionalArguments)
    # 5 layers of 4 L^2 D operations, with L = 64 * 64 patches and D = 256
    assert "attention over 64x64 patches costs 85.9 GFLOP" in capsys.readouterr().err


def test_muon_trains_the_matrices_of_the_blocks():
    transformer = TinyTransformer2DModel(
        sample_size=8, num_layers=3, num_attention_heads=1, attention_head_dim=8, long_skips=True, num_class_embeds=2
    )
    names = {parameter: name for name, parameter in transformer.named_parameters()}
    matrices, others = split_parameters(transformer)
    layers = {"modulation", "to_qkv", "to_out", "mlp.0", "mlp.2"}
    expected = {f"blocks.{i}.{layer}.weight" for i in range(3) for layer in layers} | {"blocks.2.skip_proj.weight"}
    assert {names[parameter] for parameter in matrices} == expected
    assert len(matrices) + len(others) == len(names)
