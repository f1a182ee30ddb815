"""A tiny study as it is run: killed and continued, shared by two processes, with a cell that diverges."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tiny_diffusers.cli import main


pytestmark = pytest.mark.slow

RECIPE = {
    "dataset_name": "digits",
    "max_train_steps": 6,
    "max_train_samples": 64,
    "train_batch_size": 8,
    "eval_batch_size": 4,
    "checkpointing_steps": 2,
    "validation_steps": 3,
    "block_out_channels": [8, 8],
    "norm_num_groups": 4,
    "attention": "none",
    "mid_attention": "none",
    "layers_per_block": 1,
    "ddpm_num_inference_steps": 2,
    "mixed_precision": "no",
    "num_threads": 1,
    "prediction_type": "epsilon",
    "cells": [
        {"name": "linear", "ddpm_beta_schedule": "linear"},
        {"name": "cosine", "ddpm_beta_schedule": "cosine"},
    ],
    "study": {
        "num_inference_steps": [2, 3],
        "features": "pixels",
        "metrics": ["kernel_distance"],
        "num_images": 24,
    },
}
# after ten steps in a row whose loss is not finite a run stops
DIVERGING = {"name": "diverging", "max_train_steps": 14, "learning_rate": 1e30, "optimizer": "sgd"}
COMMAND = ["study", "unconditional_x.yaml", "--output_dir", "study"]


def write_recipe(folder, cells=RECIPE["cells"]):
    (folder / "unconditional_x.yaml").write_text(yaml.safe_dump(RECIPE | {"cells": cells}))


def start(folder):
    """Starts the study in a process of its own."""
    write_recipe(folder)
    command = [sys.executable, "-m", "tiny_diffusers.cli", *COMMAND]
    environment = os.environ | {"TINY_DIFFUSERS_CACHE": str(folder / "cache")}
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)


def figures(folder):
    """Returns what a study has measured, without the seconds, which a kill may lose."""
    rows = json.loads((folder / "study" / "study.json").read_text())["rows"]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    write_recipe(folder, [*RECIPE["cells"], DIVERGING])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TINY_DIFFUSERS_CACHE", str(folder / "cache"))
        assert main(COMMAND) == 0
    return folder


def test_a_cell_that_diverges_is_a_row_that_says_so(uninterrupted):
    rows = figures(uninterrupted)
    assert [(row["cell"], row["state"]) for row in rows] == [
        ("linear", "measured"),
        ("cosine", "measured"),
        ("diverging", "failed"),
    ]
    assert "not finite" in rows[2]["error"]
    assert "diverging, seed 0, **failed**" in (uninterrupted / "study" / "README.md").read_text()


@pytest.mark.exhaustive
def test_killed_again_and_again_it_ends_as_if_left_alone(uninterrupted, tmp_path):
    """SIGKILL once a run trains, SIGTERM once the next one does, SIGKILL once one is measured."""
    moments = [
        ("linear/seed-0/checkpoint-2", signal.SIGKILL),
        ("linear/seed-0/reports/*", signal.SIGKILL),
        ("cosine/seed-0/train_log.jsonl", signal.SIGTERM),
    ]
    for pattern, number in moments:
        process = start(tmp_path)
        while process.poll() is None and not list((tmp_path / "study").glob(pattern)):
            time.sleep(0.01)
        process.send_signal(number)
        process.wait()
    assert start(tmp_path).wait() == 0, (tmp_path / "log").read_text()
    assert figures(tmp_path) == figures(uninterrupted)[:2]


def test_two_processes_share_a_study(uninterrupted, tmp_path):
    processes = [start(tmp_path) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0], (tmp_path / "log").read_text()
    assert figures(tmp_path) == figures(uninterrupted)[:2]
    assert (tmp_path / "log").read_text().count(": training into") == 2
