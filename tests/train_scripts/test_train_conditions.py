"""Training with conditions: how they are standardized, dropped, learned, saved and shown, and what is refused."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tiny_diffusers import TinyPipeline
from tiny_diffusers.data import ImageData
from tiny_diffusers.errors import UserError
from tiny_diffusers.families import conditions
from tiny_diffusers.families.conditional_diffusion import ConditionalArguments
from tiny_diffusers.pipelines.pipeline_tiny_conditions import ConditionStatistics
from tiny_diffusers.train_scripts import (
    train_conditional,
    train_dcgan,
    train_pixelcnn,
    train_unconditional,
    train_vae,
)
from tiny_diffusers.training.batches import Batches


SCRIPT = train_conditional
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
COUNT = 64
# the families without guidance
OTHERS = {"pixelcnn": train_pixelcnn, "vae": train_vae, "dcgan": train_dcgan}


@pytest.fixture
def data(tmp_path):
    """Flags of an .npz of gray images whose value is a condition, with a label of 0 or 1 and a class."""
    rng = np.random.default_rng(0)
    values = np.linspace(40, 220, COUNT)
    images = np.broadcast_to(values[:, None, None], (COUNT, 8, 8)).astype(np.uint8)
    columns = {
        "value": values,
        "hat": rng.integers(0, 2, COUNT),
        "kind": np.array(["a", "b"])[rng.integers(0, 2, COUNT)],
    }
    np.savez(tmp_path / "values.npz", image=images, same=np.full(COUNT, 7), never=np.zeros(COUNT), **columns)
    return ("--train_data_dir", str(tmp_path / "values.npz"))


@pytest.fixture
def batches(monkeypatch):
    """The batches of the runs of a test: those of training, and the others."""
    seen = {True: [], False: []}
    assemble = Batches._assemble

    def spy(self, indices, draws, training, progress=1.0):
        batch = assemble(self, indices, draws, training, progress)
        seen[training].append((self, indices, batch))
        return batch

    monkeypatch.setattr(Batches, "_assemble", spy)
    return seen


def read(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("labels", ["none", "kind"])
def test_what_a_run_leaves(train, data, labels, capsys):
    columns = ("--condition_columns", "value,never,hat", "--random_flip")  # no image has the label `never`
    folder = train(*data, *columns, "--label_column", labels, plots=False)
    printed = capsys.readouterr()
    assert "conditions: value 40 to 220, hat 0 or 1" in printed.out
    assert "left out, as all training images or none have these labels: never" in printed.err
    assert "--random_flip with --condition_columns: the conditions stay as they are" in printed.err
    index = read(folder / "model_index.json")
    assert index["condition_statistics"]["names"] == ["value", "hat"]
    network = read(folder / "unet" / "config.json")
    assert (network["num_conditions"], network["num_class_embeds"]) == (2, 2 if labels == "kind" else None)
    assert (folder / "pipeline_tiny_conditions.py").is_file()
    assert read(folder / "run.json")["data"]["conditions"] == {"value": "40 to 220", "hat": "0 or 1"}
    card = (folder / "README.md").read_text()
    assert "conditional diffusion model" in card and "conditions={'value': 130.0, 'hat': 0.0}" in card
    assert '--condition "value=130.0" --condition "hat=0.0"' in card
    pipe = TinyPipeline.from_pretrained(folder)
    given = {"class_labels": "b"} if labels == "kind" else {}
    images = pipe(conditions={"value": [50, 90], "hat": 1}, guidance_scale=2.0, num_inference_steps=2, **given).images
    assert len(images) == 2


@pytest.mark.parametrize(
    "family", ["vae", *(pytest.param(each, marks=pytest.mark.slow) for each in ("pixelcnn", "dcgan"))]
)
def test_what_a_run_of_another_family_leaves(train, data, batches, monkeypatch, capsys, family):
    from tiny_diffusers import plots

    grids, draw = [], plots.image_grid
    monkeypatch.setattr(plots, "image_grid", lambda images, **grid: grids.append(grid) or draw(images, **grid))
    columns = ("--condition_columns", "value,never,hat", "--label_column", "kind", "--class_conditional")
    drops = ("--class_dropout_prob", "0.5") if family == "pixelcnn" else ()
    options = {"script": OTHERS[family], "network": ["--smoke"], "steps": 2}
    folder = train(*data, *columns, *drops, **options)
    printed = capsys.readouterr()
    assert "conditions: value 40 to 220, hat 0 or 1" in printed.out
    assert "left out, as all training images or none have these labels: never" in printed.err
    assert grids[-1]["row_labels"][0].startswith("value 4") and len(grids[-1]["row_labels"]) == 3
    for _, _, batch in batches[True]:
        dropped = batch.conditions.isnan().any(dim=1)
        assert torch.equal(dropped, batch.labels == 2) and dropped.any() == bool(drops)
    assert batches[False] or family == "dcgan"
    index = read(folder / "model_index.json")
    assert index["condition_statistics"]["names"] == ["value", "hat"]
    assert index["id2label"] == {"0": "a", "1": "b"} and index.get("class_dropout_prob") in (None, 0.5)
    card = (folder / "README.md").read_text()
    assert "A conditional generative model" in card and "conditions={'value': 130.0, 'hat': 0.0}" in card
    assert '--class_labels "a,b" --condition "value=130.0" --condition "hat=0.0"' in card

    loaded = (*data, "--pretrained_model_name_or_path", str(folder), "--label_column", "kind", "--class_conditional")
    with pytest.raises(UserError, match="has the conditions value, hat, and --condition_columns gives value"):
        train(*loaded, "--condition_columns", "value", name="other", **options)
    with pytest.raises(
        UserError, match="it has 2 conditions, but the arguments ask for none: give --condition_columns"
    ):
        train(*loaded, name="without", **options)


def test_the_statistics_are_those_of_the_training_images(train, data, batches):
    folder = train(*data, "--condition_columns", "value", "--class_dropout_prob", "0", steps=2)
    statistics = read(folder / "model_index.json")["condition_statistics"]
    made_by, _, _ = batches[True][0]
    values = made_by.data.conditions[made_by.train_indices, 0].double()
    assert len(values) < COUNT and statistics["means"] == [pytest.approx(values.mean().item())]
    assert statistics["deviations"] == [pytest.approx(values.std(correction=0).item())]
    assert (statistics["lows"], statistics["highs"]) == ([values.min()], [values.max()])
    for _, indices, batch in batches[True] + batches[False]:
        expected = (made_by.data.conditions[indices] - statistics["means"][0]) / statistics["deviations"][0]
        torch.testing.assert_close(batch.conditions, expected.float())


def test_they_are_dropped_with_class_and_image_and_never_in_validation(train, data, batches):
    options = ("--condition_columns", "value,hat", "--label_column", "kind", "--conditioning", "low_resolution:2")
    train(*data, *options, "--class_dropout_prob", "0.5", "--train_batch_size", "48", steps=2)
    for _, _, batch in batches[True]:
        dropped = batch.conditions.isnan()
        assert 0.25 < dropped.float().mean() < 0.75 and torch.equal(dropped[:, 0], dropped[:, 1])
        assert torch.equal(dropped[:, 0], batch.labels == 2)
        assert torch.equal(dropped[:, 0], (batch.conditioning_images == 0).flatten(1).all(dim=1))
    assert batches[False] and not any(batch.conditions.isnan().any() for _, _, batch in batches[False])


@pytest.mark.parametrize("network", ["unet", pytest.param("transformer", marks=pytest.mark.slow)])
def test_images_follow_the_values_also_between_those_of_training(train, data, network):
    sizes = {"unet": ("--block_out_channels", "16", "16"), "transformer": ("--num_layers", "1", "--patch_size", "4")}
    folder = train(
        *(*data, "--condition_columns", "value", "--label_column", "none", "--validation_split", "0"),
        *("--network", network, *sizes[network], "--learning_rate", "1e-2", "--train_batch_size", "16"),
        *("--ema_max_decay", "0.9", "--checkpointing_steps", "1000", "--save_images_epochs", "0"),
        network=network == "unet",
        steps=60,
    )
    pipe = TinyPipeline.from_pretrained(folder)
    values = np.array([51.3, 93.7, 141.1, 203.9])
    options = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 10, "output_type": "np"}
    means = pipe(conditions={"value": values}, **options).images.mean(axis=(1, 2, 3)) * 255
    assert np.corrcoef(means, values)[0, 1] > 0.9 and np.abs(means - values).max() < 60


def test_a_resumed_run_equals_an_uninterrupted_one(train, train_in_two, data):
    options = (*data, "--condition_columns", "value,hat", "--class_dropout_prob", "0.5")
    whole = train(*options, name="whole")
    resumed = train_in_two(*options, stopped_at=3, steps=6)
    for name in (WEIGHTS, "train_log.jsonl", "samples.png", "model_index.json"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes(), name


def test_fine_tuning_keeps_the_standardization_and_adds_conditions(train, data):
    data = (*data, "--label_column", "none")
    first = train(*data, "--condition_columns", "value", "--max_train_samples", "32", name="first", steps=1)
    loaded = ("--pretrained_model_name_or_path", str(first))
    second = train(*data, "--condition_columns", "value", *loaded, name="second", steps=1)
    before, after = (read(folder / "model_index.json")["condition_statistics"] for folder in (first, second))
    assert (before["means"], before["deviations"]) == (after["means"], after["deviations"])
    with pytest.raises(UserError, match="has the conditions value, and --condition_columns gives hat"):
        train(*data, "--condition_columns", "hat", *loaded, name="other")
    with pytest.raises(UserError, match="has conditions: continue with .* --condition_columns"):
        train(*data, *loaded, script=train_unconditional, name="without")

    plain = train(*data, script=train_unconditional, name="plain", steps=1)
    loaded = ("--pretrained_model_name_or_path", str(plain), "--learning_rate", "0")
    added = train(*data, "--condition_columns", "value", *loaded, name="added", steps=1)
    weights, own = (load_file(folder / WEIGHTS) for folder in (added, plain))
    assert all(torch.equal(weights[name], own[name]) for name in own)
    assert {name.split(".")[0] for name in weights.keys() - own.keys()} == {"condition_embed"}


def test_fine_tuning_takes_one_value_of_each_and_widens_the_ranges(monkeypatch):
    earlier = ConditionStatistics(["age", "hat"], [40.0, 0.5], [9.0, 0.5], [20.1, 0.0], [60.0, 1.0])
    arguments = ConditionalArguments(pretrained_model_name_or_path="runs/faces", validation_split=0)
    checkpoint = SimpleNamespace(_condition_statistics=earlier)
    monkeypatch.setattr(conditions, "load_pretrained", lambda settings, pipeline_class: checkpoint)

    def measure(*rows, names=("age", "hat")):
        values = torch.tensor(rows, dtype=torch.float32)
        images = torch.zeros(len(rows), 1, 8, 8, dtype=torch.uint8)
        data = ImageData(images, None, None, "faces", "train", "", conditions=values, condition_names=list(names))
        return conditions.measure_conditions(arguments, data)

    data, statistics = measure([70, 1], [70, 1])
    assert data.conditions.tolist() == [[70, 1], [70, 1]] and data.condition_names == ["age", "hat"]
    assert statistics == replace(earlier, highs=[70, 1]) and statistics.are_labels == [False, True]
    assert measure([30, 0], [35, 0])[1] == earlier  # a narrower range
    data, statistics = measure([30, 0, 0], [35, 0, 0], names=("age", "hat", "never"))  # a label that no image has
    assert data.condition_names == ["age", "hat"] and statistics == earlier
    with pytest.raises(UserError, match="of runs/faces, the condition 'hat' is a label of 0 or 1, and .* of 0.5"):
        measure([30, 0], [30, 0.5])
    with pytest.raises(
        UserError, match="has the conditions age, hat, and --condition_columns gives age: .*ClassLabel"
    ):
        measure([30], [35], names=("age",))


def test_a_stock_network_takes_none(train, data, tmp_path):
    (tmp_path / "stock.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    stock = ("--model_config_name_or_path", str(tmp_path / "stock.json"))
    with pytest.raises(UserError, match="stock UNet2DModel, which takes no conditions"):
        train(*data, "--condition_columns", "value", *stock, network=False)


@pytest.mark.parametrize("script", [train_conditional, *OTHERS.values()], ids=lambda script: script.__name__)
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--condition_columns", "same"], ["'same' is 7 for all training images", "leave it out"]),
        (["--condition_columns", "valu"], ["'valu'", "Did you mean 'value'"]),
        (["--condition_columns", "kind"], ["'kind'", "holds text"]),
        (["--condition_columns", "hat,hat"], ["give each column once"]),
        (["--drop_missing"], ["--drop_missing", "--condition_columns"]),
    ],
)
def test_each_mistake_is_one_line_before_training(check_mistake, data, argv, words, script):
    check_mistake([*data, *argv], words, script=script, network=script is train_conditional or [])


def test_the_baseline_of_pixelcnn_refuses_them(check_mistake, data):
    argv = [*data, "--condition_columns", "value", "--variant", "baseline"]
    check_mistake(argv, ["num_conditions 1", "no gates"], script=train_pixelcnn, network=[])


def test_the_unconditional_script_names_the_flag_that_it_lacks(check_mistake, data):
    check_mistake([*data, "--condition_columns", "value"], ["--condition_columns"], script=train_unconditional)
