"""Flags, recipes, and what a mistake in them is answered with."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest

from tiny_diffusers.errors import UserError
from tiny_diffusers.families.diffusion import DiffusionArguments
from tiny_diffusers.flags import flag
from tiny_diffusers.paths import keep_paths
from tiny_diffusers.runs import RunFolder
from tiny_diffusers.training.arguments import (
    command_line,
    parse_arguments,
    read_settings,
    saved_settings,
    split_paths,
)
from tiny_diffusers.training.settings import warn_of_changes


# The flags of diffusers' own train_unconditional.py, each with a value it takes there.
DIFFUSERS_FLAGS = """
--dataset_name x --dataset_config_name x --model_config_name_or_path x --train_data_dir x --output_dir x
--overwrite_output_dir --cache_dir x --resolution 64 --center_crop --random_flip --train_batch_size 16
--eval_batch_size 16 --dataloader_num_workers 0 --num_epochs 100 --save_images_epochs 10 --save_model_epochs 10
--gradient_accumulation_steps 1 --learning_rate 1e-4 --lr_scheduler cosine --lr_warmup_steps 500 --adam_beta1 0.95
--adam_beta2 0.999 --adam_weight_decay 1e-6 --adam_epsilon 1e-08 --use_ema --ema_inv_gamma 1.0 --ema_power 0.75
--ema_max_decay 0.9999 --push_to_hub --hub_token x --hub_model_id x --hub_private_repo --logger tensorboard
--logging_dir logs --local_rank -1 --mixed_precision no --prediction_type epsilon --ddpm_num_steps 1000
--ddpm_num_inference_steps 1000 --ddpm_beta_schedule linear --checkpointing_steps 500 --checkpoints_total_limit 3
--resume_from_checkpoint latest --enable_xformers_memory_efficient_attention
"""


def test_all_flags_of_diffusers_script_are_taken():
    arguments = parse_arguments(DiffusionArguments, DIFFUSERS_FLAGS.split())
    assert arguments.report_to == "tensorboard" and arguments.resolution == 64 and arguments.use_ema


def test_command_line_wins_over_the_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 2e-4\nblock_out_channels: [8, 16]\nuse_ema: false\nrandom_flip: true\n")
    arguments = parse_arguments(DiffusionArguments, ["--learning_rate", "0.5", "--config", str(recipe)])
    assert arguments.learning_rate == 0.5
    assert arguments.block_out_channels == [8, 16]
    assert arguments.random_flip and not arguments.use_ema


def test_saved_arguments_read_back(tmp_path):
    arguments = parse_arguments(DiffusionArguments, ["--seed", "7", "--classes", "1,2", "--attention", "none", "full"])
    RunFolder(tmp_path).write_config(saved_settings(arguments))
    again = parse_arguments(DiffusionArguments, ["--config", str(tmp_path / "config.yaml")])
    assert dataclasses.replace(again, config=None) == arguments


def test_settings_are_shared_without_paths_and_the_paths_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("data/pets", "runs/first", "cache"):
        (tmp_path / folder).mkdir(parents=True)
    argv = ["--dataset_name", "data/pets", "--pretrained_model_name_or_path", "runs/first", "--cache_dir", "/x/cache"]
    argv += ["--model_config_name_or_path", "me/config", "--output_dir", "runs/second"]
    arguments = parse_arguments(DiffusionArguments, argv)
    settings, paths = split_paths(arguments)
    assert paths == {
        "train_data_dir": str(tmp_path / "data" / "pets"),
        "pretrained_model_name_or_path": str(tmp_path / "runs" / "first"),
        "cache_dir": "/x/cache",
    }
    assert (settings.train_data_dir, settings.pretrained_model_name_or_path) == ("pets", "first")
    assert (settings.model_config_name_or_path, settings.output_dir) == ("me/config", "runs/second")
    shared = "--train_data_dir pets --cache_dir cache --output_dir runs/second --pretrained_model_name_or_path first"
    assert sorted(shared.split()) == sorted(set(command_line(arguments).split()) & set(shared.split()))

    RunFolder(tmp_path).write_config(saved_settings(arguments))
    keep_paths(tmp_path, paths)
    again = parse_arguments(DiffusionArguments, ["--config", str(tmp_path / "config.yaml")])
    assert (again.train_data_dir, again.cache_dir) == (str(tmp_path / "data" / "pets"), "/x/cache")
    assert split_paths(again) == (dataclasses.replace(settings, config=again.config), paths)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lerning_rate", "1"], ["--lerning_rate", "Did you mean '--learning_rate'"]),
        (["--seed", "x"], ["--seed", "'x'"]),
        (["stray"], ["stray"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
    ],
)
def test_mistakes_are_named(argv, words):
    with pytest.raises(UserError) as error:
        parse_arguments(DiffusionArguments, argv)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("lerning_rate: 1", ["lerning_rate", "Did you mean 'learning_rate'"]),
        ("- 1", ["name: value"]),
        ("a: [", ["not valid YAML"]),
        ("seed: many", ["seed"]),
        ("overwrite_output_dir: true", ["overwrite_output_dir", "cannot ask for"]),
        ("push_to_hub: true", ["push_to_hub", "cannot ask for"]),
    ],
)
def test_mistakes_in_a_recipe_are_named(tmp_path, content, words):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(content)
    with pytest.raises(UserError) as error:
        parse_arguments(DiffusionArguments, ["--config", str(recipe)])
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


GRID = """
learning_rate: 2e-4
train_batch_size: 32
cells:
  - {name: small, block_out_channels: [8, 16]}
  - {name: fast, learning_rate: 1e-2}
"""


@pytest.mark.parametrize(
    ("flag_name", "value", "suggested"),
    [
        ("variance_type", "fixed_smal", "fixed_small"),
        ("lr_scheduler", "piecewise_constant", "constant"),
        ("train_batch_size", "1" + "0" * 400, "at most"),
    ],
)
def test_no_error_offers_what_is_refused(flag_name, value, suggested):
    with pytest.raises(UserError, match=suggested) as error:
        parse_arguments(DiffusionArguments, [f"--{flag_name}", value])
    offered = str(error.value).partition("it must be")[2]
    assert value not in re.findall(r"\w+", offered)


def test_a_recipe_that_is_no_utf_8_is_refused(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes("license: \u00e9\n".encode("latin-1"))
    with pytest.raises(UserError, match="recipe.yaml is not valid YAML"):
        parse_arguments(DiffusionArguments, ["--config", str(recipe)])


def test_a_cell_changes_what_the_recipe_shares(tmp_path):
    recipe = tmp_path / "grid.yaml"
    recipe.write_text(GRID)
    small = parse_arguments(DiffusionArguments, ["--config", str(recipe), "--cell", "small"])
    fast = parse_arguments(DiffusionArguments, ["--config", str(recipe), "--cell", "fast", "--train_batch_size", "4"])
    assert (small.learning_rate, small.train_batch_size, small.block_out_channels) == (2e-4, 32, [8, 16])
    assert (fast.learning_rate, fast.train_batch_size, fast.block_out_channels) == (1e-2, 4, None)
    assert {Path(cell.output_dir).as_posix() for cell in (small, fast)} == {"runs/grid/small", "runs/grid/fast"}

    RunFolder(tmp_path).write_config(saved_settings(small))  # the values of a cell, not its name
    again = parse_arguments(DiffusionArguments, ["--config", str(tmp_path / "config.yaml")])
    assert (again.learning_rate, again.block_out_channels, again.cell) == (2e-4, [8, 16], None)


def test_smoke_shrinks_a_recipe_and_the_command_line_still_wins(tmp_path):
    recipe = tmp_path / "large.yaml"
    recipe.write_text("preset: plain-512\nmax_train_steps: 100000\nlearning_rate: 2e-4\n")
    arguments = parse_arguments(DiffusionArguments, ["--config", str(recipe), "--smoke", "--train_batch_size", "2"])
    assert (arguments.max_train_steps, arguments.block_out_channels) == (20, [8, 8])
    assert (arguments.learning_rate, arguments.train_batch_size) == (2e-4, 2)
    assert Path(arguments.output_dir) == Path("runs", "smoke", "large")


@pytest.mark.parametrize(
    ("content", "argv", "words"),
    [
        (GRID, [], ["several experiments", "--cell: small, fast"]),
        (GRID, ["--cell", "smal"], ["smal", "Did you mean 'small'"]),
        ("seed: 1", ["--cell", "small"], ["has no cells"]),
        (GRID + "  - {name: fast}", ["--cell", "fast"], ["its own name"]),
        ("cells: [1]", ["--cell", "a"], ["its own name"]),
        ("cells: {a: 1}", ["--cell", "a"], ["must be a list"]),
        ("cells: [{name: a, lerning_rate: 1}]", ["--cell", "a"], ["Did you mean 'learning_rate'"]),
        ("cells: [{name: a, cell: b}]", ["--cell", "a"], ["Unknown key", "cell"]),
        ("preset: plain-256\ncells: [{name: a, preset: null}]", ["--cell", "a"], ["'preset' has no value", "'a'"]),
        (None, ["--cell", "small"], ["--cell small", "--config"]),
    ],
)
def test_mistakes_in_a_grid_are_named(tmp_path, content, argv, words):
    if content is not None:
        (tmp_path / "recipe.yaml").write_text(content)
        argv = ["--config", str(tmp_path / "recipe.yaml"), *argv]
    with pytest.raises(UserError) as error:
        parse_arguments(DiffusionArguments, argv)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


class TestWhatWinsOverAnEarlierRun:
    """What is given on the command line, directly or not, wins over what an earlier run resolved."""

    @pytest.fixture
    def config(self, tmp_path):
        asked = parse_arguments(DiffusionArguments, ["--learning_rate", "0.5", "--norm_num_groups", "8"])
        resolved = {"max_train_steps": 16, "ema_start_step": 1, "resolution": 8}
        resolved |= {"block_out_channels": [64, 64], "attention": ["none", "full"], "patch_size": 1}
        settings = dataclasses.replace(asked, **resolved, resolved=list(resolved))
        RunFolder(tmp_path).write_config(saved_settings(settings))
        return str(tmp_path / "config.yaml")

    def parse(self, config, *argv):
        return parse_arguments(DiffusionArguments, ["--config", config, *argv])

    def test_without_flags_it_is_the_same_run(self, config):
        again = self.parse(config, "--seed", "1")
        assert (again.max_train_steps, again.resolution, again.block_out_channels) == (16, 8, [64, 64])

    @pytest.mark.parametrize("length", [("--num_epochs", "4"), ("--max_train_minutes", "2")])
    def test_another_length_replaces_its_steps(self, config, length):
        again = self.parse(config, *length)
        assert again.max_train_steps is None and vars(again)[length[0].removeprefix("--")] == float(length[1])
        assert again.block_out_channels == [64, 64] and again.learning_rate == 0.5

    @pytest.mark.parametrize(
        "flag", [("--resolution", "32"), ("--preset", "plain-256"), ("--dataset_name", "x"), ("--patch_size", "2")]
    )
    def test_what_decides_the_network_voids_its_options_but_what_was_asked_for(self, config, flag):
        again = self.parse(config, *flag)
        assert again.block_out_channels is None and again.attention is None
        assert again.norm_num_groups == 8 and again.max_train_steps == 16

    def test_a_folder_replaces_a_dataset(self, config):
        assert self.parse(config, "--dataset_name", "x", "--split", "test").train_data_dir is None
        assert self.parse(config, "--train_data_dir", "x").dataset_name == "digits"

    def test_epochs_win_over_the_steps_of_smoke(self):
        arguments = parse_arguments(DiffusionArguments, ["--smoke", "--num_epochs", "5"])
        assert (arguments.max_train_steps, arguments.num_epochs, arguments.block_out_channels) == (None, 5, [8, 8])


def test_arguments_are_never_written_to():
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse_arguments(DiffusionArguments, []).seed = 1


def test_a_new_option_of_a_network_is_its_field_and_its_use(monkeypatch):
    """Nothing else has to name it: it is a flag, it reaches the network, and a loaded network is checked for it."""
    from tiny_diffusers.data import load_images
    from tiny_diffusers.families import unets
    from tiny_diffusers.training.family import check_network_flags

    @dataclasses.dataclass(frozen=True)
    class WiderArguments(unets.UNetArguments):
        widening: int | None = flag(None, "A new option.")

    @dataclasses.dataclass(frozen=True)
    class Arguments(WiderArguments, DiffusionArguments):
        pass

    seen = {}
    monkeypatch.setattr(unets, "TinyUNet2DModel", lambda **options: seen.update(options) or 1 / 0)
    arguments = parse_arguments(Arguments, ["--widening", "3"])
    with pytest.raises(ZeroDivisionError):
        unets.build_unet(arguments, load_images("digits"))
    assert seen["widening"] == 3
    with pytest.raises(UserError, match=r"--widening 3 \(it has 2\)"):
        check_network_flags(arguments, {"widening": 2})


@pytest.mark.parametrize("network", ["unet", "conditional unet", "transformer", "vae", "pixelcnn"])
def test_every_option_is_an_argument_of_its_network(network):
    from tiny_diffusers import TinyPixelCNNModel, TinyTransformer2DModel, TinyUNet2DModel, TinyVAEModel
    from tiny_diffusers.families import pixelcnn, transformers, unets, vae

    options, network_class = {
        "unet": (unets.UNetArguments, TinyUNet2DModel),
        "conditional unet": (unets.ConditionalUNetArguments, TinyUNet2DModel),
        "transformer": (transformers.TransformerArguments, TinyTransformer2DModel),
        "vae": (vae.VAENetworkArguments, TinyVAEModel),
        "pixelcnn": (pixelcnn.PixelCNNNetworkArguments, TinyPixelCNNModel),
    }[network]
    names = {field.name for field in dataclasses.fields(options)}
    assert names and names <= inspect.signature(network_class).parameters.keys()


def test_a_changed_setting_warns_on_resume_only_if_it_changes_the_run(capsys):
    earlier = saved_settings(parse_arguments(DiffusionArguments, []))
    quiet = [
        "--license",
        "mit",
        "--cache_dir",
        "x",
        "--eval_batch_size",
        "3",
        "--logging_steps",
        "1",
        "--num_epochs",
        "3",
    ]
    warn_of_changes(parse_arguments(DiffusionArguments, quiet), earlier, [])
    assert capsys.readouterr().err == ""
    changed = parse_arguments(DiffusionArguments, ["--max_train_samples", "9", "--dropout", "0.5"])
    warn_of_changes(changed, earlier, [])
    assert capsys.readouterr().err.splitlines() == [
        "warning: --max_train_samples is 9, but was None in the run that is resumed.",
        "warning: --dropout is 0.5, but was None in the run that is resumed.",
    ]


def test_what_was_resolved_stays_so_over_generations(tmp_path):
    asked = parse_arguments(DiffusionArguments, ["--num_epochs", "3"])
    resolved = {"max_train_steps": 16, "block_out_channels": [64, 64], "output_dir": "runs/x"}
    settings = dataclasses.replace(asked, **resolved, resolved=list(resolved))
    for generation in ("one", "two", "three"):
        RunFolder(tmp_path).write_config(saved_settings(settings))
        settings = parse_arguments(DiffusionArguments, ["--config", str(tmp_path / "config.yaml"), "--seed", "1"])
        assert settings.resolved == list(resolved), generation
    again = parse_arguments(DiffusionArguments, ["--config", str(tmp_path / "config.yaml"), "--dataset_name", "x"])
    assert again.block_out_channels is None and again.output_dir is None and again.resolved == ["max_train_steps"]


def test_a_flag_at_its_default_is_asked_for_if_it_is_given():
    from tiny_diffusers.families.vae import VAEArguments
    from tiny_diffusers.training.family import check_network_flags

    check_network_flags(parse_arguments(VAEArguments, []), {"latent_dim": 4})
    with pytest.raises(UserError, match=r"--latent_dim 64 \(it has 4\)"):
        check_network_flags(parse_arguments(VAEArguments, ["--latent_dim", "64"]), {"latent_dim": 4})


def test_the_settings_of_an_earlier_run_are_checked_as_flags_are(tmp_path):
    path = tmp_path / "config.yaml"
    assert read_settings(path, DiffusionArguments) == {}
    path.write_text(
        "learning_rate: 1e-3\nblock_out_channels: [8, 16]\nmixed_precision: no\ndropout: null\nunheard_of: 1\n"
    )
    expected = {"learning_rate": 1e-3, "block_out_channels": [8, 16], "mixed_precision": "no", "dropout": None}
    assert read_settings(path, DiffusionArguments) == expected
    for text in ("max_train_steps: x", "block_out_channels: [[8]]", "learning_rate: {a: 1}", "optimizer: rm"):
        path.write_text(text)
        with pytest.raises(UserError, match="config.yaml"):
            read_settings(path, DiffusionArguments)
