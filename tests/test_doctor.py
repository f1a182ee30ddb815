import importlib.metadata
import sys

import pytest
import torch
from PIL import Image

from tiny_diffusers import hardware
from tiny_diffusers.cli import main


REQUIREMENTS = [
    "numpy>=1.26",
    'torch>=2.6; python_version >= "3.10"',
    'no-such-package>=2; extra == "eval"',
    'pillow>=1; extra == "onnx"',
    'tiny-diffusers[eval]; extra == "onnx"',
]


@pytest.fixture
def requirements(monkeypatch):
    found = list(REQUIREMENTS)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: found)
    return found


def rows(capsys) -> dict[str, str]:
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["| | |", "| --- | --- |"]
    return {name.strip(): value.strip() for _, name, value, _ in (line.split("|") for line in lines[2:])}


def test_it_tells_the_versions_and_what_an_extra_lacks(requirements, capsys):
    assert main(["doctor"]) == 0
    told = rows(capsys)
    assert told["numpy"] == importlib.metadata.version("numpy")
    assert told["extra [eval]"].startswith("no-such-package is missing (>=2 is needed); pip install")
    assert told["extra [onnx]"] == "installed"
    assert "threads" in told["device"] and "GiB" in told["processor"]


@pytest.mark.parametrize(("dtype", "said"), [(torch.bfloat16, True), (torch.float32, False)])
def test_it_tells_that_a_training_on_a_cpu_measures_bfloat16(requirements, monkeypatch, capsys, dtype, said):
    monkeypatch.setattr(hardware, "default_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(hardware, "default_dtype", lambda device: dtype)
    main(["doctor"])
    told = rows(capsys)["device"]
    assert str(dtype).removeprefix("torch.") in told and ("if it is measured to be faster" in told) == said


def test_a_version_that_is_too_low_is_named(requirements, capsys):
    requirements.append("torch>=99")
    assert main(["doctor"]) == 1
    assert rows(capsys)["torch"].endswith("(>=99 is needed)")


@pytest.mark.parametrize(
    ("module", "extra", "command"),
    [
        ("gradio", "app", ["app", "{folder}"]),
        ("efficientnet_lite_pytorch", "eval", ["evaluate", "--images", "{folder}", "--dataset_name", "digits"]),
    ],
)
def test_a_command_that_lacks_an_extra_says_how_to_install_it(module, extra, command, monkeypatch, capsys, tmp_path):
    for name in [name for name in sys.modules if name.startswith("tiny_diffusers.app.")]:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(sys.modules["tiny_diffusers.app"], name.rpartition(".")[2], raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    Image.new("L", (8, 8)).save(tmp_path / "0.png")
    assert main([word.format(folder=tmp_path) for word in command]) == 2
    assert capsys.readouterr().err.endswith(f"is not installed: pip install 'tiny-diffusers[{extra}]'.\n")
