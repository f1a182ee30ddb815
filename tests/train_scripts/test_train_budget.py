"""`--budget`: a network that is narrow enough for the minutes that there are."""

import pytest
import torch
import yaml
from accelerate import PartialState

from tiny_diffusers import TinyUNet2DModel
from tiny_diffusers.data import ImageData, load_images
from tiny_diffusers.families import budget
from tiny_diffusers.families.budget import seconds_a_step
from tiny_diffusers.families.conditional_diffusion import ConditionalArguments
from tiny_diffusers.families.diffusion import DiffusionArguments
from tiny_diffusers.families.unets import resolve_unet
from tiny_diffusers.models.unet_tiny import PRESETS
from tiny_diffusers.train_scripts import train_conditional, train_unconditional
from tiny_diffusers.training.arguments import parse_arguments


SCRIPT = train_unconditional
WIDE = ["--block_out_channels", "64", "128", "--layers_per_block", "1"]
TRANSFORMER = [
    *("--network", "transformer", "--num_layers", "1", "--num_attention_heads", "1", "--attention_head_dim", "8"),
    *("--patch_size", "4"),
]


@pytest.fixture
def speed(monkeypatch):
    """Sets the seconds that a step takes for each channel."""

    def set_speed(seconds):
        monkeypatch.setattr(
            budget, "seconds_a_step", lambda arguments, *_: seconds * sum(arguments.block_out_channels)
        )

    return set_speed


def settings_of(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())


@pytest.mark.parametrize("script", [train_unconditional, train_conditional])
def test_the_run_has_the_network_that_fits_and_keeps_it(train, speed, capsys, script):
    speed(1.0)  # two steps in 80% of 2.5 minutes are 60 s each
    flags = ["--budget", "2.5", *WIDE, "--attention", "full", "none"]
    run = train(*flags, script=script, network=False, steps=2, name="run")
    said = "--budget 2.5: a step takes up to 192 s here, so the network becomes about 4 times narrower (16 32)"
    assert said in capsys.readouterr().out
    settings = settings_of(run)
    narrowed = ([16, 32], ["full", "none"], 2)
    assert tuple(settings[name] for name in ("block_out_channels", "attention", "max_train_steps")) == narrowed
    assert "budget" not in settings and "--block_out_channels 16 32" in (run / "README.md").read_text()

    speed(0.001)  # the machine is faster now, and the network stays
    train(*flags, "--resume_from_checkpoint", "latest", script=script, network=False, steps=3, name="run")
    assert settings_of(run)["block_out_channels"] == [16, 32]


def test_it_stands_for_the_minutes_in_place_of_a_recipes_length(speed, tmp_path):
    speed(0.0)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("script: unconditional\nnum_epochs: 7\nmax_train_steps: 5\n")
    arguments = parse_arguments(DiffusionArguments, [*WIDE, "--config", str(recipe), "--budget", "4"])
    fitted = budget.fit_to_budget(arguments, PartialState(), load_images("digits"))
    assert (fitted.max_train_steps, fitted.max_train_minutes) == (None, 4.0)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--budget", "1", "--max_train_minutes", "2"], ["--budget 1 --max_train_minutes"]),
        (["--budget", "1", "--num_epochs", "2"], ["--budget 1 --num_epochs"]),
        (["--budget", "0"], ["--budget 0"]),
    ],
)
def test_each_mistake_is_one_line(check_mistake, argv, words):
    check_mistake(argv, words, steps=None)


def test_a_recipe_cannot_ask_for_it(tmp_path, check_mistake):
    (tmp_path / "unconditional_x.yaml").write_text("budget: 3\n")
    check_mistake(["--config", str(tmp_path / "unconditional_x.yaml")], ["budget"])


def test_a_network_that_is_narrow_already_never_widens(speed, capsys):
    speed(1e6)
    arguments = parse_arguments(DiffusionArguments, ["--block_out_channels", "4", "20", "--budget", "1"])
    fitted = budget.fit_to_budget(arguments, PartialState(), load_images("digits"))
    assert fitted.block_out_channels == [4, 8]  # by 2, and by 4 nothing changes
    assert "about 2 times narrower (4 8)" in capsys.readouterr().out


def test_another_network_stays(train, capsys):
    train("--budget", "5", *TRANSFORMER, network=False, steps=1)
    assert "--budget 5: the network stays" in capsys.readouterr().out


def test_the_timed_network_takes_what_that_of_training_takes(monkeypatch):
    built, build = [], budget.build_unet
    monkeypatch.setattr(budget, "default_dtype", lambda device: torch.float32)
    monkeypatch.setattr(budget, "build_unet", lambda *args, **given: built.append(build(*args, **given)) or built[-1])
    images, values = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(4, 2)
    data = ImageData(images, None, None, "x", "train", "", conditions=values, condition_names=["age", "hat"])
    shared = {"block_out_channels": [8], "layers_per_block": 1, "num_threads": 1}
    options = {**shared, "condition_columns": "age,hat", "conditioning": "low_resolution:2"}
    assert seconds_a_step(ConditionalArguments(**options), data) > 0
    data = ImageData(images, torch.zeros(4, dtype=torch.long), {0: "a", 1: "b"}, "x", "train", "")
    assert seconds_a_step(ConditionalArguments(**shared), data) > 0
    assert seconds_a_step(DiffusionArguments(**shared), data) > 0
    taken = ("num_class_embeds", "num_conditions", "in_channels")
    assert [tuple(unet.config[name] for name in taken) for unet in built] == [
        (None, 2, 2),
        (2, None, 1),
        (None, None, 1),
    ]


@pytest.mark.parametrize(
    ("limit", "counts", "seconds"),
    [
        (0.5, [4], 16.0),  # the few images take longer than the limit: so does the batch
        (20.0, [4], 16.0),  # the batch takes no longer than in proportion, which is within the limit
        (3.0, [4, 64], 2.5),  # one second for the calls, and the batch decides
    ],
)
def test_the_whole_batch_is_timed_where_a_few_images_do_not_decide(monkeypatch, limit, counts, seconds):
    timed, times = [], {4: 1.0, 64: 2.5}
    monkeypatch.setattr(budget, "_seconds", lambda unet, data, count, dtype: timed.append(count) or times[count])
    monkeypatch.setattr(budget, "setup_torch", lambda num_threads: torch.device("cpu"))
    data = ImageData(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), None, None, "x", "train", "")
    arguments = DiffusionArguments(block_out_channels=[8], layers_per_block=1, train_batch_size=64)
    assert seconds_a_step(arguments, data, limit) == seconds
    assert timed == counts


def test_the_narrower_network_keeps_its_levels_with_attention():
    data = load_images("digits", resolution=32)
    own = DiffusionArguments()  # 64, 64 and 128 channels, with attention in the middle
    assert resolve_unet(own, data)["attention"] == ["none", "full", "none"]
    assert budget.narrow(own, data, 2) == {"block_out_channels": [32, 32, 64], "attention": ["none", "full", "none"]}
    assert budget.narrow(own, data, 1) == {}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_can_be_built_at_each_factor(preset):
    data = load_images("digits", resolution=32)
    for factor in (2, 8, 32):
        options = budget.narrow(DiffusionArguments(preset=preset), data, factor)
        with torch.device("meta"):
            TinyUNet2DModel(**{**PRESETS[preset], **options, "sample_size": 32})


def test_widths_stay_multiples_of_the_groups_and_of_the_heads():
    data = load_images("digits")
    arguments = DiffusionArguments(block_out_channels=[96, 192], norm_num_groups=32, attention_head_dim=64)
    assert budget.narrow(arguments, data, 4)["block_out_channels"] == [32, 64]  # 24 and 48
    arguments = DiffusionArguments(block_out_channels=[128, 384], attention_head_dim=64)
    assert budget.narrow(arguments, data, 4)["block_out_channels"] == [32, 128]  # 32 and 96
