"""Flags, recipes, and what a mistake in them is answered with."""

from pathlib import Path

import pytest

from tiny_diffusers.errors import UserError
from tiny_diffusers.training.arguments import parse_arguments, save_arguments
from tiny_diffusers.training.diffusion import DiffusionArguments


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
    save_arguments(arguments, tmp_path / "config.yaml")
    again = parse_arguments(DiffusionArguments, ["--config", str(tmp_path / "config.yaml")])
    again.config = None
    assert again == arguments


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


def test_a_cell_changes_what_the_recipe_shares(tmp_path):
    recipe = tmp_path / "grid.yaml"
    recipe.write_text(GRID)
    small = parse_arguments(DiffusionArguments, ["--config", str(recipe), "--cell", "small"])
    fast = parse_arguments(DiffusionArguments, ["--config", str(recipe), "--cell", "fast", "--train_batch_size", "4"])
    assert (small.learning_rate, small.train_batch_size, small.block_out_channels) == (2e-4, 32, [8, 16])
    assert (fast.learning_rate, fast.train_batch_size, fast.block_out_channels) == (1e-2, 4, None)
    assert {Path(cell.output_dir).as_posix() for cell in (small, fast)} == {"runs/grid/small", "runs/grid/fast"}

    save_arguments(small, tmp_path / "config.yaml")  # what a cell settled, not its name
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
