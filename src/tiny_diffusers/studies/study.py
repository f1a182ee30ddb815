"""
A study: trains each cell of a grid with each seed, measures all by one protocol, and shows them in a table and pictures.

A run is a folder, a log, a lock and a result, `CELL/seed-N`, `.log`, `.lock` and `.json`. Whoever holds the lock works on
it, so several processes may share a study on one file system, and the system drops the lock of one that is killed. Nothing
is kept but files: the same command goes on from there.
"""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
from PIL import UnidentifiedImageError

from ..errors import UserError, first_line, say
from ..evaluation import features
from ..evaluation.report import FIGURES
from ..files import is_disk_full, load_json, read_mapping, read_text, replace_file
from ..hardware import release_memory
from .cells import DONE, Run, Study
from .pictures import draw
from .settings import PLOTS
from .table import write_table
from .training import STOPPED, finish_training, last_line, start_training


FORMAT = 1  # of study.json
_FORM = {"asked": dict, "networks": dict, "rows": list, "main_metric": str, "plots": list}
_SHOWN = ("plots", "main_metric")  # what the table and the pictures may have otherwise than study.json
_POLL_SECONDS = 1.0  # while other processes hold all that is left


def run_study(study: Study) -> Path:
    """
    Trains and measures what is not done yet, and returns the folder with `study.json`, `README.md` and the pictures.

    Raises:
        UserError: If the folder holds another study, if a training was stopped, or if no run could be measured.
    """
    features.load(study.protocol.features, study.protocol.feature_weights)  # refuses what is not installed
    pending, waited = study.runs(_claim(study)), False
    while pending:
        done = [run for run in pending if _take(run, study)]
        pending = [run for run in pending if run not in done]
        if pending and not done:
            if not waited:
                say(f"other processes are at work on {', '.join(run.name for run in pending)}: waiting for them ...")
            waited = True
            time.sleep(_POLL_SECONDS)
    content = _write_results(study)
    rows = content["rows"]
    if all(row["state"] == "failed" for row in rows):
        raise UserError(f"No run of {study.recipe.stem} could be measured: {rows[0]['error']}")
    return study.folder


def _claim(study: Study) -> dict[str, dict[str, Any]]:
    """Begins the study, or continues the one that the folder holds; returns the networks that its budget has changed."""
    with _locked(study):
        earlier = _read(study.folder / "study.json")
        if earlier is not None:
            _check_same(study, earlier["asked"])
        study.runs({})  # refuses cells that their script does not take
        known = earlier or {"factor": None, "networks": {}, "rows": []}
        factor, networks = known["factor"], known["networks"]
        if study.arguments.budget is not None and not study.cells.keys() <= networks.keys():
            from .budget import fit_networks

            factor, networks = fit_networks(study, {**networks, **study.cells}, factor)
            release_memory()
        _write(study, {"factor": factor, "networks": networks, "rows": known["rows"]})
        return networks


@contextlib.contextmanager
def _locked(study: Study) -> Iterator[None]:
    try:
        study.folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(study.folder / ".lock").acquire()
    except OSError as error:
        raise UserError(f"--output_dir: cannot write to {study.folder} ({error.strerror}).") from error
    with lock:
        yield


def _check_same(study: Study, earlier: dict[str, Any]) -> None:
    for name, value in study.asked.items():
        if earlier.get(name) == value:
            continue
        before, now = earlier.get(name), value
        if isinstance(before, dict) and isinstance(now, dict):
            key = next(key for key in (*now, *before) if before.get(key) != now.get(key))
            name, before, now = f"{name}: {key}", before.get(key), now.get(key)
        raise UserError(
            f"{study.folder} holds another study ({name} was {before!r:.60} and is {now!r:.60}): give another "
            "--output_dir, or delete that one."
        )


def _take(run: Run, study: Study) -> bool:
    """Works on a run unless another process does; returns whether it is done."""
    run.lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = filelock.FileLock(run.lock).acquire(timeout=0)
    except filelock.Timeout:
        return False
    with lock:
        if run.is_done:
            return True
        _work(run, study)
    release_memory()
    _write_results(study)
    return True


def _work(run: Run, study: Study) -> None:
    """Trains and measures a run. One that fails is a row that says so."""
    row = {"cell": run.cell, "seed": run.seed, "data": run.data}
    try:
        if run.read().get("state") != "trained":
            say(f"{run.name}: training into {run.folder.path}, its messages go to {run.log} ...")
            _train(run)
            run.write({**row, "state": "trained"})
        say(f"{run.name}: measuring ...")
        run.write({**row, "state": "measured", **_measure(run, study)})
    except _Failure as error:
        say(f"{run.name}: failed: {error} Delete {run.result} to try again.")
        run.write({**row, "state": "failed", "error": str(error)})


class _Failure(Exception):
    """A run can't be trained or measured."""


def _train(run: Run) -> None:
    status = finish_training(start_training(run.script, run.flags, run.folder.path, run.log))
    if status in STOPPED:
        raise UserError(f"the training of {run.name} was stopped: the same command goes on from there.")
    if status < 0:
        raise _Failure(f"killed by signal {-status}")
    if status:
        raise _Failure(last_line(run.log).removeprefix("error: "))


def _measure(run: Run, study: Study) -> dict[str, Any]:
    from .measure import measure

    try:
        return measure(run, study)
    except Exception as error:  # a row that says so; of a full disk the same command goes on
        if is_disk_full(error):
            raise
        run.log_error()
        raise _Failure(first_line(error)) from error


def _write_results(study: Study) -> dict[str, Any]:
    """Writes what is known of all runs so far, of this and other processes."""
    with _locked(study):
        content = _read(study.folder / "study.json")
        rows = [read_mapping(path, load_json) for path in sorted(study.folder.glob("*/seed-*.json"))]
        order = list(study.asked["grid"])
        rows = [row for row in rows if row.get("state") in DONE]
        rows.sort(key=lambda row: (order.index(row["cell"]), row["seed"]))
        content = _write(study, {"factor": content["factor"], "networks": content["networks"], "rows": rows})
        show(content, study.folder)
        return content


def _write(study: Study, known: dict[str, Any]) -> dict[str, Any]:
    content = {
        "format": FORMAT,
        "asked": study.asked,
        "main_metric": study.main_metric,
        "plots": study.arguments.plots,
        **known,
    }
    replace_file(study.folder / "study.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    return content


def show(content: dict[str, Any], folder: Path) -> None:
    """Writes `README.md` and the pictures of what `study.json` holds."""
    pictures = draw(content, folder)
    write_table(content, pictures, folder)


def show_again(file: Path, given: Mapping[str, Any]) -> Path:
    """
    Writes `README.md` and the pictures of a `study.json`, which may be a stranger's, beside it, from that file alone.

    Args:
        file (`Path`): The file.
        given (`Mapping`): `plots` and `main_metric` that win over those of the file.

    Raises:
        UserError: If the file is none, or if anything else is given.
    """
    other = next((name for name in given if name not in _SHOWN), None)
    if other is not None:
        raise UserError(f"--{other}: of a {file.name}, only {' and '.join(f'--{n}' for n in _SHOWN)} can be given.")
    content = _read(file)
    if content is None:
        raise UserError(f"There is no file '{file}'.")
    try:
        entries = [entry for row in content["rows"] for entry in row.get("measured", [])]
        if "main_metric" in given and not any(given["main_metric"] in entry.get("figures", {}) for entry in entries):
            raise UserError(f"--main_metric {given['main_metric']}: it was not measured.")
        show({**content, **given}, file.parent)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, UnidentifiedImageError) as error:
        raise _no_study(file, error) from error
    return file.parent


def _read(file: Path) -> dict[str, Any] | None:
    """Reads a `study.json`; None if there is none."""
    if not file.exists():
        return None
    try:
        content = load_json(read_text(file))
        if content["format"] != FORMAT or not _FORM.keys() <= content.keys():
            raise ValueError("it has another format")
        for name, kind in _FORM.items():
            if not isinstance(content[name], kind):
                raise ValueError(f"its {name} is {type(content[name]).__name__}")
        if content["main_metric"] not in FIGURES or not {*content["plots"]} <= {*PLOTS}:
            raise ValueError("its main_metric or plots are unknown")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _no_study(file, error) from error
    return content


def _no_study(file: Path, error: Exception) -> UserError:
    return UserError(f"'{file}' is not a study's file ({first_line(error)}): move it, and try again.")
