"""What the tests of studies share: a recipe with a grid, its plan, and training and measuring that take no time."""

import base64
import io

import pytest
import yaml
from PIL import Image

from tiny_diffusers.studies import study as studies
from tiny_diffusers.studies.cells import plan_study


GRID = {
    "dataset_name": "digits",
    "max_train_steps": 4,
    "cells": [
        {"name": "linear", "ddpm_beta_schedule": "linear"},
        {"name": "cosine", "ddpm_beta_schedule": "cosine"},
    ],
    "study": {"seeds": [0, 1], "num_inference_steps": [2, 4], "features": "pixels", "num_images": 20},
}


@pytest.fixture
def plan(tmp_path):
    """Plans a study of GRID with changes; a value of None removes a key."""

    def build(given=None, train_flags=(), name="unconditional_x.yaml", **changes):
        recipe = {key: value for key, value in (GRID | changes).items() if value is not None}
        (tmp_path / name).write_text(yaml.safe_dump(recipe))
        return plan_study(tmp_path / name, given or {}, list(train_flags), str(tmp_path / "study"))

    return build


@pytest.fixture
def measured():
    """Makes what is measured of a run whose metric is `value`, and a tenth more for the next seed."""

    def build(value, seed):
        figure = {"value": value + seed / 10, "error": 0.5, "error_kind": "standard error over images"}
        figures, file = {"frechet_distance": figure, "recall": figure}, io.BytesIO()
        Image.new("L", (9, 9)).save(file, format="PNG")
        return {
            "parameters": 1000 * value,
            "seconds": 10.0 * value,
            "steps": 4,
            "val_loss": [[2, 1.0], [4, 0.5]],
            "measured": [{"scheduler": None, "num_inference_steps": steps, "figures": figures} for steps in (2, 4)],
            "baselines": {"real": {"frechet_distance": figure | {"value": 1.5, "error": None}}},
            "against": "20 images against 100 of digits",
            "warnings": ["few images"],
            "samples": base64.b64encode(file.getvalue()).decode(),
        }

    return build


@pytest.fixture
def work(monkeypatch, measured):
    """Replaces training and measuring; returns the list of the runs that were trained and of those measured."""
    done = {"trained": [], "measured": []}

    def train(run):
        done["trained"].append(run.name)

    def measure(run, study):
        done["measured"].append(run.name)
        return measured(len(run.cell), run.seed)

    monkeypatch.setattr(studies, "_train", train)
    monkeypatch.setattr(studies, "_measure", measure)
    monkeypatch.setattr(studies, "draw", lambda content, folder: {})  # which takes most of the time
    return done
