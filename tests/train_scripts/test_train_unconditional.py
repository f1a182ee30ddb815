"""The way from images to a shared model, and every mistake on it."""

import dataclasses
import importlib
import itertools
import json
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from accelerate import PartialState
from PIL import Image
from safetensors.torch import load_file

from tiny_diffusers import TinyDDPMScheduler, TinyEDMScheduler, TinyFlowMatchScheduler, TinyPipeline
from tiny_diffusers.errors import UserError
from tiny_diffusers.families.diffusion import Diffusion, DiffusionArguments, build_scheduler, resolve_diffusion
from tiny_diffusers.train_scripts import train_unconditional
from tiny_diffusers.training.arguments import parse_arguments
from tiny_diffusers.training.process import launch
from tiny_diffusers.training.trainer import Trainer


WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_what_a_run_leaves(finished, read_log):
    folder = finished
    for name in ("model_index.json", "samples.png", "train_log.jsonl", "loss_curves.png", "README.md", "config.yaml"):
        assert (folder / name).is_file(), name
    assert not list(folder.rglob("*.bin")) and not list(folder.rglob("*.pt"))
    log = read_log(folder)
    assert [line["step"] for line in log if "loss" in line] == [2, 4, 6]
    assert any("val_loss" in line for line in log)
    pipe = TinyPipeline.from_pretrained(folder)
    assert pipe(num_inference_steps=2).images[0].mode == "L"


def test_the_averaged_weights_are_what_is_saved(finished):
    folder = finished
    saved = load_file(folder / "unet" / WEIGHTS)
    average = load_file(folder / "checkpoint-6" / "unet_ema" / WEIGHTS)
    trained = load_file(folder / "checkpoint-6" / "unet" / WEIGHTS)
    assert all(torch.equal(saved[key], average[key]) for key in saved)
    assert any(not torch.equal(saved[key], trained[key]) for key in saved)
    for name in (".", "checkpoint-6"):  # a checkpoint is a pipeline of its moment
        unet = TinyPipeline.from_pretrained(folder / name).unet
        assert all(torch.equal(saved[key], value) for key, value in unet.state_dict().items()), name


@pytest.mark.parametrize(
    ("name", "remedy", "reason"),
    [
        ("a/b/c", "give another --hub_model_id, or leave it out", "HFValidationError"),
        ("me/tiny", "leave it out and push later", "OfflineModeIsEnabled|ConnectionError|ConnectError"),
    ],
)
def test_a_push_that_must_fail_is_refused_before_training(train, tmp_path, monkeypatch, name, remedy, reason):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=f"--push_to_hub: {remedy}.*: nothing can be pushed to '{name}' .({reason})"):
        train("--push_to_hub", "--hub_model_id", name, "--hub_token", "hf_x", name="run")
    assert not (tmp_path / "run").exists()


def test_same_seed_same_weights_and_samples_to_the_bit(finished, train):
    one, two, other = finished, train(name="two"), train("--seed", "1", name="other")
    assert (one / "unet" / WEIGHTS).read_bytes() == (two / "unet" / WEIGHTS).read_bytes()
    assert (one / "samples.png").read_bytes() == (two / "samples.png").read_bytes()
    assert (one / "train_log.jsonl").read_bytes() == (two / "train_log.jsonl").read_bytes()
    assert (one / "unet" / WEIGHTS).read_bytes() != (other / "unet" / WEIGHTS).read_bytes()


def test_the_layout_changes_nothing_but_the_speed(train, monkeypatch, capsys):
    seen = set()
    forward = torch.nn.Conv2d.forward

    def spy(self, x):
        seen.add((x.is_contiguous(), self.weight.is_contiguous()))
        return forward(self, x)

    last = load_file(train(name="last", steps=2) / "unet" / WEIGHTS)
    assert "channels_last, fused muon, foreach EMA, into" in capsys.readouterr().out
    monkeypatch.setattr(torch.nn.Conv2d, "forward", spy)
    folder = train("--memory_format", "contiguous_format", name="contiguous", steps=2)
    contiguous = load_file(folder / "unet" / WEIGHTS)
    assert "contiguous_format, fused muon" in capsys.readouterr().out
    assert seen == {(True, True)}
    for key, weight in last.items():
        torch.testing.assert_close(contiguous[key], weight, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("optimizer", "stops"), [("adamw", (2, 3, 5)), ("muon", (3,))])
def test_a_resumed_run_equals_an_uninterrupted_one(train, train_in_two, optimizer, stops):
    options = ("--dropout", "0.1", "--random_flip", "--gradient_accumulation_steps", "2", "--optimizer", optimizer)
    whole = train(*options, "--posthoc_ema", name="whole")
    snapshots = [str(path.relative_to(whole)) for path in whole.glob("snapshots/*/*")]
    assert len(snapshots) == 6 * 3  # of two averages, and a manifest
    for stopped_at in stops:
        resumed = train_in_two(*options, "--posthoc_ema", stopped_at=stopped_at, name=f"resumed-{stopped_at}")
        for name in ("unet/" + WEIGHTS, "train_log.jsonl", "samples.png", f"checkpoint-6/unet/{WEIGHTS}", *snapshots):
            assert (whole / name).read_bytes() == (resumed / name).read_bytes(), (stopped_at, name)
        for name in ("unet_ema/" + WEIGHTS, "unet_optimizer/optimizer.safetensors"):
            ours, theirs = load_file(whole / "checkpoint-6" / name), load_file(resumed / "checkpoint-6" / name)
            assert all(torch.equal(ours[key], theirs[key]) for key in ours), (stopped_at, name)


def test_what_was_logged_after_the_checkpoint_is_logged_once(train, read_log):
    folder = train(steps=4)
    with (folder / "train_log.jsonl").open("a") as log:
        log.write('{"step": 5, "loss": 9.0}\n{"step": 6, "lo')
    train("--resume_from_checkpoint", "latest")
    assert [line["step"] for line in read_log(folder) if "loss" in line] == [2, 4, 6]


def test_minutes_settle_into_steps_that_reproduce_the_run(train, monkeypatch):
    monkeypatch.setattr(Trainer, "_broadcast", lambda self, value: 2)
    timed = train("--max_train_minutes", "0.01", steps=None, name="timed")
    steps = train(steps=2, name="steps")
    assert "max_train_steps: 2" in (timed / "config.yaml").read_text()
    assert (timed / "unet" / WEIGHTS).read_bytes() == (steps / "unet" / WEIGHTS).read_bytes()


def test_fine_tuning_starts_from_the_other_models_weights(finished, train):
    first = finished
    second = train("--pretrained_model_name_or_path", str(first), "--learning_rate", "0", name="second", steps=2)
    a, b = load_file(first / "unet" / WEIGHTS), load_file(second / "unet" / WEIGHTS)
    assert all(torch.allclose(a[key], b[key], atol=1e-6) for key in a)


def test_a_run_shares_no_path_and_finds_its_data_again(train, tmp_path, capsys):
    pets, rng = tmp_path / "somewhere" / "pets", np.random.default_rng(0)
    pets.mkdir(parents=True)
    for i in range(24):
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(pets / f"{i}.png")
    first = train("--dataset_name", str(pets), steps=1, name="first")
    second = train("--dataset_name", str(pets), "--pretrained_model_name_or_path", str(first), steps=1, name="second")
    shared = [p for p in second.rglob("*") if p.suffix in (".json", ".yaml", ".md", ".jsonl") and p.name[0] != "."]
    texts = {p: p.read_text() for p in shared if not p.relative_to(second).parts[0].startswith("checkpoint-")}
    assert len(texts) > 5 and not [p for p, text in texts.items() if str(tmp_path) in text or "somewhere" in text]
    settings = yaml.safe_load((second / "config.yaml").read_text())
    assert (settings["train_data_dir"], settings["pretrained_model_name_or_path"]) == ("pets", "first")
    assert "--train_data_dir pets" in (second / "README.md").read_text()

    capsys.readouterr()
    config = ("--config", str(second / "config.yaml"))
    longer = train(*config, "--resume_from_checkpoint", "latest", steps=2, name="second")
    assert "warning" not in capsys.readouterr().err
    again = train(*config, steps=1, name="again")
    assert (longer / "unet" / WEIGHTS).read_bytes() != (first / "unet" / WEIGHTS).read_bytes()
    assert json.loads((again / "run.json").read_text())["data"]["images"] == 24


def test_the_network_by_resolution_stands_in_the_runs_files_and_resumes_silently(train, train_in_two, capsys):
    small = {"steps": 2, "network": False}
    first = train("--train_batch_size", "2", name="first", **small)
    config = (first / "config.yaml").read_text()
    assert "block_out_channels:\n- 64\n- 64\n" in config and "resnet_time_scale_shift: scale_shift\n" in config
    card = (first / "README.md").read_text()
    assert "--block_out_channels 64 64" in card and "--attention none full" in card
    capsys.readouterr()
    resumed = train_in_two("--train_batch_size", "2", stopped_at=1, **small)
    assert "warning" not in capsys.readouterr().err
    again = train("--config", str(first / "config.yaml"), "--train_batch_size", "2", name="again", **small)
    weights = [(folder / "unet" / WEIGHTS).read_bytes() for folder in (first, resumed, again)]
    assert weights[0] == weights[1] == weights[2]


@pytest.mark.parametrize("stock", [False, True])
def test_a_config_with_classes_and_other_timesteps_is_settled_by_the_run(train, tmp_path, stock):
    config = {"block_out_channels": [8, 8], "norm_num_groups": 4, "layers_per_block": 1, "num_class_embeds": 3}
    if stock:
        blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
        config |= {"_class_name": "UNet2DModel", "attention_head_dim": 8, "class_embed_type": "timestep", **blocks}
        config |= {"time_embedding_type": "learned", "num_train_timesteps": 20}
    else:
        config |= {"_class_name": "TinyUNet2DModel", "attention": "none", "time_embedding": "learned"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = ("--model_config_name_or_path", str(tmp_path / "config.json"), "--ddpm_num_steps", "50")
    loaded += ("--prediction_type", "v_prediction")  # learned embeddings are of whole timesteps
    saved = json.loads((train(*loaded, steps=1, network=False) / "unet" / "config.json").read_text())
    assert (saved["num_train_timesteps"], saved["num_class_embeds"]) == (50, None)


def test_dropout_alone_of_the_networks_flags_is_applied_to_a_pretrained_network(train, check_mistake):
    first = str(train("--dropout", "0.1", name="first", steps=1))
    loaded = ("--pretrained_model_name_or_path", first)
    second = train(*loaded, "--dropout", "0.3", "--learning_rate", "0", name="second", steps=1)
    assert json.loads((second / "unet" / "config.json").read_text())["dropout"] == 0.3
    a, b = (load_file(Path(folder) / "unet" / WEIGHTS) for folder in (first, second))
    assert all(torch.allclose(a[key], b[key], atol=1e-6) for key in a)

    differing = ["--block_out_channels 8 16 (it has 8)", "--patch_size 2 (it has 1)", "leave such flags out"]
    check_mistake([*loaded, "--block_out_channels", "8", "16", "--patch_size", "2"], differing)
    check_mistake([*loaded, "--dropout", "1.5"], ["dropout 1.5", "[0, 1)"])
    check_mistake([*loaded, "--preset", "plain-256"], ["--pretrained_model_name_or_path and --preset", "one of them"])
    check_mistake([*loaded, "--resolution", "16"], ["8x8", "16x16", "--resolution 8"])
    check_mistake([*loaded, "--variance_type", "learned_range"], ["1 channels", "--variance_type fixed_small"])
    train(*loaded, "--smoke", name="smoke", steps=1, network=False)  # which can't shrink it


def test_flags_that_a_stock_network_does_not_know_are_refused(check_mistake, tmp_path):
    config = {"block_out_channels": [8, 8], "norm_num_groups": 4, "layers_per_block": 1, "attention_head_dim": 8}
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", **config, **blocks}))
    loaded = ["--model_config_name_or_path", str(tmp_path / "config.json"), "--norm_num_groups", "4"]
    words = ["--patch_size 2 (it knows no such option)", "--dropout 0.1 (it has 0.0)"]
    check_mistake([*loaded, "--patch_size", "2", "--dropout", "0.1"], words, network=False)


@pytest.mark.parametrize(
    ("prediction_type", "pipeline", "scheduler"),
    [
        ("flow", "DDPMPipeline", TinyFlowMatchScheduler),
        pytest.param("edm", "ConsistencyModelPipeline", TinyEDMScheduler, marks=pytest.mark.slow),
    ],
)
def test_flow_and_edm_train_a_stock_network_that_stock_diffusers_loads(
    train, tmp_path, capsys, prediction_type, pipeline, scheduler
):
    config = {"block_out_channels": [8, 8], "norm_num_groups": 4, "layers_per_block": 1}
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", **config, **blocks}))
    network = ("--model_config_name_or_path", str(tmp_path / "config.json"))
    options = ("--prediction_type", prediction_type, "--dynamic_thresholding", "0.99")
    folder = train(*network, *options, steps=1, network=False)
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == pipeline
    pipe = TinyPipeline.from_pretrained(folder)
    assert type(pipe.scheduler) is scheduler and pipe.scheduler.config.dynamic_thresholding_ratio == 0.99
    assert pipe.scheduler.config.solver == "multistep"
    capsys.readouterr()
    loaded = ("--pretrained_model_name_or_path", str(folder))
    same = train(*loaded, name="same", steps=1, network=False)
    assert type(TinyPipeline.from_pretrained(same).scheduler) is scheduler
    assert "would have to learn" not in capsys.readouterr().err
    train(*loaded, "--prediction_type", "epsilon", name="other", steps=1, network=False)
    assert f"was trained with --prediction_type {prediction_type}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", ("flow", "muon", 3e-3)),
        ("--optimizer adamw", ("flow", "adamw", 1e-3)),
        ("--learning_rate 0.5", ("flow", "muon", 0.5)),
        ("--prediction_type edm", ("edm", "muon", 3e-3)),
        *((f"--{flag}", ("v_prediction", "muon", 3e-3)) for flag in ("ddpm_beta_schedule cosine", "snr_gamma 5")),
        ("--time_embedding learned", ("v_prediction", "muon", 3e-3)),
        ("--loss_type l2 --prediction_type epsilon", ("epsilon", "muon", 3e-3)),
    ],
)
def test_the_objective_and_the_optimizer_are_chosen_if_nobody_says(flags, expected):
    arguments = parse_arguments(DiffusionArguments, flags.split())
    resolved = resolve_diffusion(arguments, PartialState())
    assert (resolved["prediction_type"], resolved["optimizer"], resolved["learning_rate"]) == expected
    is_on_betas = expected[0] not in ("flow", "edm")
    assert resolved.get("beta_end") == (0.02 if is_on_betas else None)


def test_a_flag_of_betas_decides_the_objective_of_an_earlier_runs_settings(train, tmp_path):
    folder = train(steps=1)
    again = ["--config", str(folder / "config.yaml"), "--output_dir", str(tmp_path / "again"), "--num_threads", "1"]
    train_unconditional.main([*again, "--ddpm_beta_schedule", "linear"])
    settings = yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())
    assert (settings["prediction_type"], settings["ddpm_beta_schedule"]) == ("v_prediction", "linear")


@pytest.mark.parametrize("flags", ["--prediction_type v_prediction", "--snr_gamma 5", ""])
def test_a_run_is_resumed_with_its_own_objective(train, flags):
    folder = train(*flags.split(), steps=1)
    before = yaml.safe_load((folder / "config.yaml").read_text())
    train("--resume_from_checkpoint", "latest", *(["--snr_gamma", "5"] if "snr" in flags else []), steps=2)
    after = yaml.safe_load((folder / "config.yaml").read_text())
    for name in ("prediction_type", "ddpm_beta_schedule", "loss_type", "snr_gamma", "optimizer", "learning_rate"):
        assert after[name] == before[name]


def test_another_objective_replaces_what_an_earlier_run_resolved(train, tmp_path):
    folder = train("--prediction_type", "v_prediction", steps=1)
    again = ["--config", str(folder / "config.yaml"), "--output_dir", str(tmp_path / "again"), "--num_threads", "1"]
    train_unconditional.main([*again, "--prediction_type", "flow"])
    settings = yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())
    assert (settings["prediction_type"], settings["ddpm_beta_schedule"]) == ("flow", None)


def test_the_network_of_a_flow_predicts_the_image_unless_it_is_told_not_to(train, tmp_path, check_mistake):
    def config_of(folder):
        return json.loads((folder / "unet" / "config.json").read_text())

    first = train(steps=1)
    assert config_of(first)["x_prediction"] and yaml.safe_load((first / "config.yaml").read_text())["x_prediction"]
    for flags in ("--x_prediction False", "--prediction_type v_prediction", "--prediction_type edm"):
        assert not config_of(train(*flags.split(), "--overwrite_output_dir", name="other", steps=1))["x_prediction"]
    again = ["--config", str(first / "config.yaml"), "--output_dir", str(tmp_path / "again"), "--num_threads", "1"]
    train_unconditional.main([*again, "--prediction_type", "v_prediction"])
    assert not config_of(tmp_path / "again")["x_prediction"]

    loaded = ["--pretrained_model_name_or_path", str(first)]
    assert config_of(train(*loaded, name="tuned", steps=1, network=False))["x_prediction"]
    check_mistake([*loaded, "--x_prediction", "False"], ["--x_prediction False (it has True)"], network=False)
    words = ["--prediction_type epsilon", "the output of flow", "--prediction_type flow"]
    check_mistake([*loaded, "--prediction_type", "epsilon"], words, network=False)


@pytest.mark.parametrize("flags", [[], ["--network", "unet"]])
def test_a_run_from_before_x_prediction_is_resumed_without_it(train, flags):
    folder = train("--x_prediction", "False", steps=1)
    settings = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text("".join(line for line in settings.splitlines(True) if "x_pred" not in line))
    train("--resume_from_checkpoint", "latest", *flags, steps=2)
    assert not json.loads((folder / "unet" / "config.json").read_text())["x_prediction"]


@pytest.mark.parametrize("flags", [[], ["--network", "unet"]])
def test_a_run_on_betas_is_resumed_whatever_a_new_one_would_be(train, flags):
    folder = train("--prediction_type", "v_prediction", steps=1)
    train("--resume_from_checkpoint", "latest", *flags, steps=2)
    assert yaml.safe_load((folder / "config.yaml").read_text())["prediction_type"] == "v_prediction"


@pytest.mark.parametrize(
    ("option", "other", "differing"),
    [
        ("x_prediction", "False", "x_prediction False, not True"),
        ("skip_rescale", "True", "skip_rescale True, not False"),
        ("act_fn", "gelu", "act_fn gelu, not silu"),
    ],
)
def test_a_checkpoint_is_not_taken_for_a_network_of_equal_weights(train, option, other, differing):
    checkpoint = train(f"--{option}", other, "--checkpointing_steps", "1", steps=1) / "checkpoint-1"
    with pytest.raises(UserError, match=rf"checkpoint-1 does not fit these settings \(its unet has {differing}\)"):
        train("--resume_from_checkpoint", str(checkpoint), name="other", steps=2)


def test_a_resumed_run_may_change_its_dropout(train):
    train("--dropout", "0.1", "--checkpointing_steps", "1", steps=1)
    folder = train("--resume_from_checkpoint", "latest", "--dropout", "0", steps=2)
    assert json.loads((folder / "unet" / "config.json").read_text())["dropout"] == 0


def test_the_timesteps_of_a_network_that_predicts_the_image_stay(train, check_mistake):
    loaded = ["--pretrained_model_name_or_path", str(train(steps=1))]
    check_mistake([*loaded, "--ddpm_num_steps", "100"], ["made for 1000 timesteps", "1000."], network=False)


def test_the_timestep_distribution_is_saved_with_the_model(train):
    for flags, expected in (((), "mixed"), (("--timestep_distribution", "uniform"), "uniform")):
        folder = train("--prediction_type", "flow", *flags, "--overwrite_output_dir", steps=1)
        config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        assert config["timestep_distribution"] == expected


@pytest.mark.parametrize(
    ("prediction_type", "flags"),
    [
        ("flow", "--ddpm_beta_schedule linear"),
        ("flow", "--snr_gamma 5.0"),
        ("flow", "--variance_type learned_range"),
        ("edm", "--loss_type huber"),
        ("edm", "--beta_end 0.5"),
        ("edm", "--ddpm_num_steps 500"),
        ("edm", "--timestep_distribution uniform"),
        ("epsilon", "--timestep_distribution mixed"),
        ("epsilon", "--x_prediction True"),
        ("edm", "--x_prediction False"),
    ],
)
def test_flags_that_mean_nothing_to_the_objective_are_refused(check_mistake, prediction_type, flags):
    words = [f"{flags} means nothing to --prediction_type {prediction_type}"]
    check_mistake(["--prediction_type", prediction_type, *flags.split()], words)


@pytest.mark.parametrize("prediction_type", ["flow", "edm"])
def test_a_time_embedding_of_whole_timesteps_is_refused(check_mistake, train, prediction_type):
    options = ["--prediction_type", prediction_type, "--time_embedding"]
    check_mistake([*options, "learned"], [f"--prediction_type {prediction_type}", "'learned'", "'sinusoidal'"])
    unet = json.loads((train(*options, "fourier", steps=1) / "unet" / "config.json").read_text())
    assert unet["num_train_timesteps"] == (1 if prediction_type == "edm" else 1000)


def test_a_time_embedding_made_for_other_timesteps_is_refused(train, check_mistake):
    first = train("--time_embedding", "learned", "--ddpm_num_steps", "50", name="first", steps=1)
    loaded = ["--pretrained_model_name_or_path", str(first)]
    check_mistake(loaded, ["--ddpm_num_steps 1000", "--ddpm_num_steps 50"], network=False)


@pytest.mark.parametrize("family", ["unconditional", "vae", "pixelcnn", "dcgan"])
def test_a_checkpoint_of_gray_images_on_color_photos_says_what_to_do(family, tmp_path):
    script = importlib.import_module(f"tiny_diffusers.train_scripts.train_{family}")
    first = tmp_path / "first"
    options = ["--num_threads", "1", "--mixed_precision", "no"]  # accelerate keeps the first one of a process
    script.main(["--smoke", "--max_train_steps", "1", "--output_dir", str(first), *options])
    color = tmp_path / "photos"
    color.mkdir()
    for number in range(2):
        Image.new("RGB", (8, 8), (250, 120, number)).save(color / f"{number}.png")
    argv = [
        "--pretrained_model_name_or_path",
        str(first),
        "--dataset_name",
        str(color),
        "--output_dir",
        str(tmp_path / "second"),
    ]
    words = "makes images of 1 channel, but those of photos have 3: give --channels 1, .* or leave the flag out"
    with pytest.raises(UserError, match=words):
        script.main([*argv, *options])


@pytest.mark.parametrize(
    ("argv", "advice"),
    [
        (
            ["--ddpm_num_steps", "300"],
            "keeps 0.22 .*use --beta_start 0.00033 --beta_end 0.067, or --ddpm_beta_schedule",
        ),
        (["--beta_end", "0.001"], "use --beta_start 0.0001 --beta_end 0.02, or"),
        (["--ddpm_num_steps", "1", "--beta_end", "0.5"], "use --ddpm_beta_schedule cosine."),
    ],
)
def test_betas_that_end_before_noise_are_warned_of_with_ones_that_do_not(capsys, argv, advice):
    arguments = parse_arguments(DiffusionArguments, ["--ddpm_beta_schedule", "linear", *argv])
    build_scheduler(dataclasses.replace(arguments, **resolve_diffusion(arguments, PartialState())))
    assert re.search(advice, capsys.readouterr().err)


def test_a_stock_network_loads_in_stock_diffusers(train, tmp_path):
    from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel

    config = {"block_out_channels": [8, 8], "norm_num_groups": 4, "layers_per_block": 1, "attention_head_dim": 8}
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", **config, **blocks}))
    config = str(tmp_path / "config.json")
    folder = train("--model_config_name_or_path", config, "--prediction_type", "v_prediction", network=False, steps=1)

    stock = DiffusionPipeline.from_pretrained(folder)
    assert type(stock) is DDIMPipeline and type(stock.unet) is UNet2DModel
    # Stock DDIM takes t - T / n as the timestep after t, which is not quite the next one of `linspace`.
    stock = DDPMPipeline(stock.unet, DDPMScheduler.from_config(stock.scheduler.config))
    ours = TinyPipeline.from_pretrained(folder)
    ours.scheduler = TinyDDPMScheduler.from_config(ours.scheduler.config)
    images = [
        pipe(batch_size=2, generator=torch.Generator().manual_seed(0), num_inference_steps=10, output_type="np").images
        for pipe in (stock, ours)
    ]
    np.testing.assert_allclose(images[0], images[1], atol=1e-5)


def test_timesteps_are_drawn_for_each_image(train, monkeypatch):
    seen = []
    loss = TinyFlowMatchScheduler.training_loss
    monkeypatch.setattr(
        TinyFlowMatchScheduler,
        "training_loss",
        lambda self, output, sample, noise, timesteps, **kw: (
            seen.append(timesteps) or loss(self, output, sample, noise, timesteps, **kw)
        ),
    )
    train("--validation_split", "0", steps=2)
    assert seen and all(len(set(timesteps.tolist())) > 1 for timesteps in seen)


def test_early_stopping_saves_the_best_weights(train, read_log, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 2.5, 2.7])
    monkeypatch.setattr(Trainer, "_validate", lambda self: next(losses))
    folder = train("--early_stopping_patience", "2", "--validation_steps", "1", "--checkpoints_total_limit", "1")
    assert [line["step"] for line in read_log(folder) if "val_loss" in line] == [1, 2, 3, 4]
    saved = load_file(folder / "unet" / WEIGHTS)
    best = load_file(folder / "checkpoint-2" / "unet_ema" / WEIGHTS)
    assert all(torch.equal(saved[key], best[key]) for key in saved)


def test_a_step_that_is_not_finite_is_skipped_and_ten_in_a_row_stop_the_run(train, read_log, monkeypatch):
    losses, bad = Diffusion.losses, {3}

    def sometimes_bad(self, modules, batch):
        for name, loss in losses(self, modules, batch):
            yield name, loss * float("nan") if batch.draws.step in bad else loss

    monkeypatch.setattr(Diffusion, "losses", sometimes_bad)
    folder = train(name="one")
    assert [line["step"] for line in read_log(folder) if "skipped" in line] == [4]
    assert all(torch.isfinite(tensor).all() for tensor in load_file(folder / "unet" / WEIGHTS).values())

    bad.update(range(4, 20))
    with pytest.raises(UserError, match="10 steps in a row.*checkpoint-2"):
        train(steps=20, name="many")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--ddpm_beta_schedule", "cosin"], ["cosin", "cosine"]),
        (["--loss_type", "hubert"], ["hubert", "huber"]),
        (["--loss_type", "vlb", "--snr_gamma", "5"], ["snr_gamma=5.0", "loss_type='vlb'", "leave it out"]),
        (["--prediction_type", "epsilom"], ["epsilom", "epsilon"]),
        (["--lr_scheduler", "cosin"], ["cosin", "cosine"]),
        (["--mixed_precision", "bf61"], ["bf61", "bf16"]),
        (["--memory_format", "channels_lats"], ["channels_lats", "channels_last"]),
        (["--report_to", "tensorbord"], ["tensorbord", "tensorboard"]),
        (["--optimizer", "adamm"], ["adamm", "adam"]),
        (["--norm_num_groups", "3"], ["3", "8"]),
        (["--resolution", "9", "--block_out_channels", "8", "8"], ["9"]),
        (["--dataset_name", "no/such/folder"], ["no/such/folder"]),
        (["--classes", "11"], ["11"]),
        (["--split", "trian"], ["trian", "train"]),
        (["--model_config_name_or_path", "nowhere.json"], ["nowhere.json"]),
        (["--pretrained_model_name_or_path", "no/such/folder/here"], ["no/such/folder/here"]),
        (["--resume_from_checkpoint", "checkpoint-7"], ["checkpoint-7"]),
    ],
)
def test_each_mistake_is_one_line_before_training(check_mistake, argv, words):
    check_mistake(argv, words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers_per_block": 10**6}, "layers_per_block is too large"),
        ({"norm_eps": "x"}, "norm_eps is 'x', but 1e-05 by default"),
        ({"time_embedding_type": "x"}, "can't be loaded"),
        ({"norm_num_groups": 5}, "divisible by num_groups"),
        ({"downsample_padding": 2}, "can't be loaded"),
    ],
)
def test_a_configured_network_that_cannot_be_built_is_refused_in_one_line(check_mistake, tmp_path, changes, words):
    blocks = {
        "block_out_channels": [8, 8],
        "down_block_types": ["DownBlock2D"] * 2,
        "up_block_types": ["UpBlock2D"] * 2,
    }
    config = {"_class_name": "UNet2DModel", "norm_num_groups": 4, **blocks, **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_mistake(["--model_config_name_or_path", str(tmp_path / "config.json")], [words])


def test_a_folder_that_holds_another_run_is_refused(train):
    folder = train(steps=1)
    with pytest.raises(UserError, match="--overwrite_output_dir"):
        train()
    (folder / "mine.txt").write_text("keep")
    train("--overwrite_output_dir", steps=1)
    assert (folder / "mine.txt").exists()


def test_a_folder_that_another_process_trains_into_is_refused(train, tmp_path):
    import filelock

    (tmp_path / "run").mkdir()
    with filelock.FileLock(tmp_path / "run" / ".lock"), pytest.raises(UserError, match="another process"):
        train()


def test_a_folder_that_cannot_be_made_is_refused(train, tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match="run"):
        train()


def test_exit_status(tmp_path, capsys):
    assert launch(lambda: train_unconditional.main(["--loss_type", "hubert", "--output_dir", str(tmp_path)])) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_as_a_program(monkeypatch, capsys):
    script = train_unconditional.__file__
    monkeypatch.setattr(sys, "argv", [script, "--seeed", "1"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(script, run_name="__main__")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--seed" in error and "Traceback" not in error


@pytest.mark.exhaustive  # test_as_a_program says the same, without a second import of torch
def test_as_a_process(tmp_path):
    script = train_unconditional.__file__
    result = subprocess.run([sys.executable, script, "--seeed", "1"], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2 and "--seed" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.slow
def test_of_few_images_ten_grids_are_drawn_and_not_one_every_ten_epochs(train, monkeypatch):
    monkeypatch.setattr(time, "perf_counter", itertools.count(0, 1e-6).__next__)  # costly grids would be fewer
    few = ("--max_train_samples", "4", "--validation_split", "0", "--checkpointing_steps", "100")
    folder = train(*few, "--train_batch_size", "16", steps=50)  # 200 epochs
    assert len(list((folder / "samples").iterdir())) == 9  # and the last in samples.png


def test_color_and_range_survive_training(train, tmp_path):
    """A model that has seen one picture only gives that picture back: no channel swapped, no range shifted."""
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, :4], image[:, 4:] = (250, 120, 10), (20, 60, 220)
    (tmp_path / "images").mkdir()
    for name in "ab":
        Image.fromarray(image).save(tmp_path / "images" / f"{name}.png")
    folder = train(
        *("--dataset_name", str(tmp_path / "images"), "--validation_split", "0"),
        *("--block_out_channels", "16", "32", "--learning_rate", "1e-2", "--train_batch_size", "16"),
        *("--ema_max_decay", "0.9", "--checkpointing_steps", "1000", "--save_images_epochs", "0"),
        steps=60,
    )
    pipe = TinyPipeline.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    samples = pipe(batch_size=4, generator=generator, num_inference_steps=20, output_type="np").images
    assert np.abs(samples - image / 255).mean() < 0.1
