"""Every recipe fits its script, cell by cell, and runs."""

import dataclasses
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image

from tiny_diffusers import TinyPipeline, train_scripts
from tiny_diffusers.data import ImageData
from tiny_diffusers.families.dcgan import DCGANArguments, build_dcgan
from tiny_diffusers.families.diffusion import DiffusionArguments, build_scheduler, resolve_diffusion
from tiny_diffusers.families.unets import build_unet
from tiny_diffusers.families.vae import VAEArguments, build_vae
from tiny_diffusers.studies.training import arguments_class
from tiny_diffusers.training.arguments import load_cells, parse_arguments
from tiny_diffusers.training.recipes import script_of, shipped_recipes


RECIPES = list(shipped_recipes().values())
SAMPLE = {recipe.stem.partition("_")[0]: recipe for recipe in RECIPES}.values()  # one for each script
CELLS = [(recipe, cell) for recipe in RECIPES for cell in load_cells(recipe)[1] or [None]]


def script_name(recipe, cell):
    """Returns the script of a cell, or of the recipe: unconditional_no_attention.yaml is for train_unconditional.py."""
    return script_of(recipe, load_cells(recipe)[1].get(cell, {}).get("script"))


def flags(recipe, cell):
    return ["--config", str(recipe), *(["--cell", cell] if cell else [])]


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A local data set of two classes, in place of those that would have to be fetched."""
    monkeypatch.setenv("TINY_DIFFUSERS_CACHE", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    for name in ("cat", "frog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(12):
            pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return str(tmp_path / "images")


def test_there_are_recipes_and_each_says_what_it_tries():
    assert len(RECIPES) >= 7
    for recipe in RECIPES:
        assert recipe.read_text(encoding="utf-8").startswith("# "), recipe.name


@pytest.mark.parametrize(("recipe", "cell"), CELLS, ids=[f"{recipe.stem}-{cell}" for recipe, cell in CELLS])
def test_each_cell_is_what_its_script_takes(recipe, cell):
    arguments = parse_arguments(arguments_class(script_name(recipe, cell)), flags(recipe, cell))
    if cell:
        assert Path(arguments.output_dir) == Path("runs", recipe.stem, cell)
    # its names and sizes go together, too
    size = arguments.resolution or 32
    images, names = torch.zeros(1, 3, size, size, dtype=torch.uint8), dict(enumerate("abcdefghij"))
    data = ImageData(images, None, names, "stand-in", "train", "")
    if isinstance(arguments, DiffusionArguments):
        arguments = dataclasses.replace(arguments, **resolve_diffusion(arguments, PartialState()))
        build_scheduler(arguments)
    with torch.device("meta"):
        if isinstance(arguments, DiffusionArguments):
            build_unet(arguments, data, 10 if "class_dropout_prob" in vars(arguments) else None)
        elif isinstance(arguments, VAEArguments):
            build_vae(arguments, data)
        elif isinstance(arguments, DCGANArguments):
            build_dcgan(arguments, data)


def test_cells_of_a_recipe_differ():
    for recipe in RECIPES:
        changes = [sorted(map(str, cell.items())) for cell in load_cells(recipe)[1].values()]
        assert len(set(map(tuple, changes))) == len(changes), recipe.name


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(recipe, id=recipe.stem, marks=pytest.mark.slow if recipe in SAMPLE else pytest.mark.exhaustive)
        for recipe in RECIPES
    ],
)
def test_each_recipe_runs(recipe, stand_in, tmp_path):
    cell = next(iter(load_cells(recipe)[1]), None)
    argv = [*flags(recipe, cell), "--smoke", "--dataset_name", stand_in, "--output_dir", str(tmp_path / "run")]
    script = importlib.import_module(f"{train_scripts.__name__}.train_{script_name(recipe, cell)}")
    script.main([*argv, "--mixed_precision", "no", "--num_threads", "1"])
    assert (tmp_path / "run" / "samples.png").is_file()
    assert "max_train_steps: 20\n" in (tmp_path / "run" / "config.yaml").read_text()
    TinyPipeline.from_pretrained(tmp_path / "run")
