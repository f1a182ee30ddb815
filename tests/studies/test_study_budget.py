"""Networks that a study narrows so that they train in the minutes that it has."""

import json

import pytest

from tiny_diffusers.errors import UserError
from tiny_diffusers.families import budget
from tiny_diffusers.studies import study as studies
from tiny_diffusers.studies.budget import fit_networks
from tiny_diffusers.studies.cells import parse_flags


CELLS = [
    {"name": "wide", "block_out_channels": [64, 128]},
    {"name": "half", "block_out_channels": [32, 64]},
]
NARROWED = {
    "wide": {"block_out_channels": [32, 64], "attention": ["none", "full"]},
    "half": {"block_out_channels": [16, 32], "attention": ["none", "full"]},
}


@pytest.fixture(autouse=True)
def seconds(monkeypatch):
    """A step takes 10 ms for each channel."""
    monkeypatch.setattr(budget, "seconds_a_step", lambda arguments, *_: sum(arguments.block_out_channels) / 100)


def fit(study):
    return fit_networks(study, study.cells)


def widths(networks):
    return {cell: options.get("block_out_channels") for cell, options in networks.items()}


def test_all_widths_are_divided_by_one_factor(plan, capsys):
    # 500 steps in 80% of 10 minutes are 0.96 s each
    assert fit(plan({"budget": 10.0}, cells=CELLS)) == (2, NARROWED)
    assert "about 2 times narrower" in capsys.readouterr().out


def test_what_fits_stays(plan):
    assert fit(plan({"budget": 100.0}, cells=CELLS)) == (1, {"wide": {}, "half": {}})


def test_the_runs_have_the_networks_and_the_minutes(plan, work):
    study = plan({"budget": 10.0}, cells=CELLS)
    text = (studies.run_study(study) / "README.md").read_text()
    assert "Narrower networks" in text and "10 minutes each" in text
    networks = json.loads((study.folder / "study.json").read_text())["networks"]
    run = study.runs(networks)[0]
    arguments = parse_flags(run.script, run.flags)
    assert (arguments.block_out_channels, arguments.max_train_minutes) == ([32, 64], 10.0)


def test_with_steps_the_networks_fit_and_every_run_takes_these(plan, work):
    # 250 steps in 80% of 5 minutes are 0.96 s each
    study = plan({"budget": 5.0}, ["--max_train_steps=250"], cells=CELLS)
    text = (studies.run_study(study) / "README.md").read_text()
    assert "for a budget of 5 minutes" in text and "minutes each" not in text and "`max_train_steps 250`" in text
    networks = json.loads((study.folder / "study.json").read_text())["networks"]
    assert widths(networks) == {"wide": [32, 64], "half": [16, 32]}
    for run in study.runs(networks):
        arguments = parse_flags(run.script, run.flags)
        assert (arguments.max_train_steps, arguments.max_train_minutes) == (250, None)


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        ({"budget": 5.0}, ["--num_epochs=2"]),
        ({"budget": 5.0}, ["--max_train_steps=250", "--max_train_minutes=2"]),
        ({"max_train_minutes": 5.0}, ["--max_train_steps=250"]),
    ],
)
def test_two_lengths_are_refused(plan, given, flags):
    with pytest.raises(UserError, match="both are the length of a run"):
        plan(given, flags, cells=CELLS)


def test_a_recipe_may_have_the_budget_of_such_networks(plan):
    section = {"seeds": [0], "features": "pixels", "num_images": 20, "budget": 5.0}
    study = plan({}, ["--max_train_steps=250"], cells=CELLS, study=section)
    assert (study.arguments.budget, study.num_steps) == (5.0, 250)
    study = plan({"max_train_minutes": 2.0}, cells=CELLS, study=section)
    assert (study.arguments.budget, study.arguments.max_train_minutes) == (None, 2.0)


def test_a_cell_that_joins_later_is_divided_by_the_same_factor(plan, work):
    for cells in (["wide"], ["half"]):
        study = plan({"budget": 10.0, "cells": cells}, cells=CELLS)
        studies.run_study(study)
    content = json.loads((study.folder / "study.json").read_text())
    assert (content["factor"], content["networks"]) == (2, NARROWED)


def test_only_unets_that_are_built_from_options_become_narrower(plan, capsys):
    cells = [*CELLS, {"name": "patches", "network": "transformer"}]
    factor, networks = fit(plan({"budget": 10.0}, cells=cells))
    assert factor == 2 and widths(networks) == {"wide": [32, 64], "half": [16, 32], "patches": None}
    assert "the networks of patches stay" in capsys.readouterr().out


def test_the_networks_of_other_families_stay(plan, capsys):
    study = plan(
        {"budget": 1.0, "num_inference_steps": None}, name="vae_x.yaml", cells=[{"name": "a"}], study={"seeds": 0}
    )
    assert fit(study) == (None, {"a": {}})
    assert "the networks of a stay" in capsys.readouterr().out


def test_different_cells_stay_different(plan, capsys):
    cells = [{"name": "a", "block_out_channels": [208, 240]}, {"name": "b", "block_out_channels": [104, 120]}]
    factor, networks = fit(plan({"budget": 0.1}, cells=cells))
    assert factor == 16 and widths(networks) == {"a": [16, 16], "b": [8, 8]}  # divided by 32, both have 8 and 8
    assert "fewer than 500 steps may fit" in capsys.readouterr().out


def test_a_cell_that_would_be_the_same_as_another_does_not_join(plan, work):
    cells = [{"name": "a", "block_out_channels": [64, 64]}, {"name": "b", "block_out_channels": [60, 60]}]
    studies.run_study(plan({"budget": 8.0, "cells": ["a"]}, cells=cells))
    with pytest.raises(UserError, match="2 times narrower.*two of these cells"):
        studies.run_study(plan({"budget": 8.0}, cells=cells))
