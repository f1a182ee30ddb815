"""Executes the notebooks at a tiny size, from their first cell to their last: `-m docs`."""

import os
import sys
from pathlib import Path

import pytest


pytestmark = pytest.mark.docs

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def jupytext():
    return pytest.importorskip("jupytext", reason="the extra [notebooks] is not installed")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, jupytext, tmp_path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("NOTEBOOK_STEPS", "2")
    monkeypatch.setenv("TINY_DIFFUSERS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # of !tiny-diffusers
    notebook = jupytext.read(path)
    NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [str(output) for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [output for output in outputs if "error: " in output] == []  # a command after ! that fails stops nothing


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_the_pair_of_its_script_and_holds_no_outputs(path, jupytext):
    cells, script = jupytext.read(path).cells, jupytext.read(path.with_suffix(".py")).cells
    assert [cell.source for cell in cells] == [cell.source for cell in script]
    assert not any(cell.get("outputs") for cell in cells)
