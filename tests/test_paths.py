"""What is shared names no path of this machine, and what is kept beside it finds the folder again."""

from pathlib import Path

import pytest

from tiny_diffusers.paths import keep_paths, kept_paths, local_path, public_command, public_name, restore_paths


@pytest.fixture
def pets(tmp_path, monkeypatch):
    (tmp_path / "data" / "pets").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data" / "pets"


def test_a_local_folder_is_its_last_name_and_a_hub_id_stays(pets):
    for name in (pets, "data/pets", "./data/pets/", "data/../data/pets", "/nowhere/pets", "../pets", "~/nowhere/pets"):
        assert public_name(name) == "pets"
    for name in ("ylecun/mnist", "digits", "ylecun/mnist-v1.0"):
        assert public_name(name) == name and local_path(name) is None
    assert local_path("data/pets") == pets


def test_a_command_is_shown_without_paths(pets):
    words = ["tiny-diffusers", "evaluate", "data/pets", f"--images={pets}", "--output", "/tmp/a b", "--split", "test"]
    assert public_command(words) == "tiny-diffusers evaluate pets --images=pets --output 'a b' --split test"


def test_kept_paths_take_the_place_of_the_names_that_were_not_changed(tmp_path):
    keep_paths(tmp_path, {"train_data_dir": "/data/pets"})
    assert restore_paths(tmp_path, {"train_data_dir": "pets", "seed": 1}) == {
        "train_data_dir": "/data/pets",
        "seed": 1,
    }
    assert restore_paths(tmp_path, {"train_data_dir": "cars"}) == {"train_data_dir": "cars"}
    keep_paths(tmp_path, {})
    assert list(tmp_path.iterdir()) == [] and kept_paths(tmp_path) == {}


@pytest.mark.parametrize("content", ["{", "[]", "1", '{"train_data_dir": 1}', b"\xff".decode("latin-1")])
def test_a_damaged_file_keeps_nothing(tmp_path, content):
    keep_paths(tmp_path, {"a": "b"})
    (hidden,) = tmp_path.iterdir()
    assert hidden.name.startswith(".")  # hidden files are not pushed
    Path(hidden).write_bytes(content.encode("latin-1"))
    assert kept_paths(tmp_path) == {}
