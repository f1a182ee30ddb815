"""The published models by their names."""

from pathlib import Path

import pytest
import torch

from tiny_diffusers import TinyPipeline, zoo
from tiny_diffusers.cli import main
from tiny_diffusers.errors import UserError
from tiny_diffusers.evaluation import Report


MODEL_CARDS = Path(__file__).parents[1] / "model_cards"


def test_the_names_are_the_folders():
    assert sorted(zoo.NAMES) == sorted(path.parent.name for path in MODEL_CARDS.glob("*/model_index.json"))
    assert set(zoo.IN_WHEEL) < set(zoo.NAMES)


def test_a_name_stands_for_the_folder():
    by_name, by_folder = (
        TinyPipeline.from_pretrained("digits-8"),
        TinyPipeline.from_pretrained(MODEL_CARDS / "digits-8"),
    )
    weights = by_folder.unet.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in by_name.unet.state_dict().items())


def test_a_path_may_be_a_name():
    assert TinyPipeline.from_pretrained(Path("digits-8")).unet.config.sample_size == 8


def test_a_report_by_name_goes_below_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(MODEL_CARDS.rglob("*"))
    flags = "--num_images 4 --features pixels --metrics nearest_neighbor --num_inference_steps 2".split()
    assert main(["evaluate", "digits-8", *flags, "--name", "mine"]) in (0, None)
    assert Path("evaluation/reports/mine/report.json").is_file() and sorted(MODEL_CARDS.rglob("*")) == before


def test_commands_take_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["describe", "digits-8"]) in (0, None)
    assert "TinyUNet2DModel" in capsys.readouterr().out
    assert main(["compare", "--all_settings", "mnist-32"]) in (0, None)
    assert "ylecun/mnist" in capsys.readouterr().out
    assert main(["plot", "losses", "digits-8", "mnist-32"]) in (0, None) and Path("loss_curves.png").is_file()
    assert main(["card", "digits-8"]) == 2
    assert "'digits-8' is published with the package" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["runs/digits-8", "owner/digits-8", "digits", Path("digits-8").absolute()])
def test_other_names_stay(name):
    assert zoo.find_published(name) == name


def test_a_folder_of_that_name_wins_which_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits-8").mkdir()
    found = zoo.find_published("digits-8")
    assert Path(found) == Path("digits-8") and zoo.find_published(found) == found  # and not twice
    assert caplog.messages == ["'digits-8' is the folder of that name here, not the published model."]


def test_the_published_folder_itself_needs_no_word(monkeypatch, caplog):
    monkeypatch.chdir(MODEL_CARDS)
    assert Path(zoo.find_published("digits-8")) == Path("digits-8") and not caplog.messages


def test_a_name_that_is_nearly_one_is_answered_by_it(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="Did you mean the published model 'mnist-32'"):
        TinyPipeline.from_pretrained("minst-32")


def test_what_the_wheel_lacks_is_named_with_the_way_to_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(zoo.importlib.resources, "files", lambda package: tmp_path)
    with pytest.raises(
        UserError, match="not in the wheel, which has mnist-32 and digits-8 alone: clone the repository"
    ):
        TinyPipeline.from_pretrained("mnist-32-conditional")
    assert main(["describe", "mnist-32-conditional"]) == 2
    assert "clone the repository" in capsys.readouterr().err


def test_a_name_stands_for_the_published_report():
    assert Report.load("mnist-32").source["name"] == "mnist-32"
