"""
The folder of a run: the one module that knows its file names, and that writes, finds and deletes them.

    folder = RunFolder("runs/digits")
    with folder.claim(resume=False, overwrite=False):   # creates it, locks it, refuses another run's
        folder.append_log({"step": 1, "loss": 0.5})
        folder.publish_checkpoint(1, write)             # appears complete or not at all

Files appear by one rename, after they are flushed to the disk. A checkpoint is sealed with a manifest of sizes and
checksums, so that a damaged one is recognized, named and skipped. Nothing that is read back can run code.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import yaml
from safetensors import SafetensorError

from .errors import UserError
from .paths import PATHS_FILE


logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"  # of a checkpoint
MODEL_INDEX = "model_index.json"  # of a saved pipeline
STAGING = ".staging-"
_LEFT_AFTER = 3600  # seconds after which a folder that is being written was left by a killed writer

# These stay on this machine when a folder is pushed: checkpoints to resume from, trackers' files, what tools leave.
NOT_PUSHED = ["checkpoint-*/*", "logs/*", "*.lock", "*.tmp", "*__pycache__/*", ".*", "*/.*"]
# `export` copies these beside the exported pipeline.
EXPORTED = (
    *("README.md", "*.png", "*.gif", "*.jsonl", "config.yaml", "run.json", "report.json", "report.md"),
    *("reports/published", "reports/*/report.*"),
)
# `--overwrite_output_dir` deletes these and the checkpoints.
_DELETED = (
    *("config.yaml", "run.json", "train_log.jsonl", MODEL_INDEX, "README.md"),
    *("*.png", "samples/step-*.png", "*.gif", "*.py", "report.json", "report.md"),
    *("reports/published", "reports/*/report.*", f"reports/*/{PATHS_FILE}", PATHS_FILE),
)


# What is read back from `run.json`
_FACTS = {"data": dict, "global_batch": int, "seconds": (int, float)}
_MAX_YAML_VALUES = 100_000


class RunFolder:
    """
    The folder of one run.

    Args:
        path (`str` or `Path`): The folder; constructing touches nothing.
    """

    def __init__(self, path: str | Path):
        self.path = Path(os.path.expanduser(path))
        self.card = self.path / "README.md"
        self.config = self.path / "config.yaml"
        self.facts = self.path / "run.json"
        self.log = self.path / "train_log.jsonl"
        self.samples = self.path / "samples.png"
        self.animation = self.path / "training.gif"
        self.loss_curves = self.path / "loss_curves.png"
        self.report = self.path / "report.json"  # of an earlier version, or of a report's own folder
        self.reports = self.path / "reports"  # a folder each
        self.published = self.reports / "published"  # the name of the one that the card shows
        self.model_index = self.path / MODEL_INDEX

    # -------------------------------------------------------------------------------------------- claiming it

    @contextlib.contextmanager
    def claim(self, *, resume: bool, overwrite: bool, needed_bytes: int = 0) -> Iterator[None]:
        """
        Creates the folder and holds its lock. The operating system drops the lock with the process, so a killed run
        leaves none.

        Args:
            resume (`bool`): Continue the run that the folder holds.
            overwrite (`bool`): Delete the run that the folder holds; without both, another run is refused.
            needed_bytes (`int`): Disk space that the checkpoints need.

        Raises:
            UserError: If the folder is locked, cannot be written to, holds another run, or its disk is too full.
        """
        lock = filelock.FileLock(self.path / ".lock")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise UserError(f"--output_dir: another process is training into {self.path}.") from error
        except OSError as error:
            raise UserError(f"--output_dir: cannot write to {self.path} ({error.strerror}).") from error
        try:
            holds_run = (self.config.exists() or self.model_index.exists()) and not resume
            if holds_run and not overwrite:
                raise UserError(
                    f"--output_dir: {self.path} holds another run; continue it with --resume_from_checkpoint latest, "
                    "replace it with --overwrite_output_dir, or name another folder."
                )
            if holds_run:
                files = [path for pattern in _DELETED for path in self.path.glob(pattern)]
                for path in [*self._components(), *files, *self.list_checkpoints()]:
                    _remove(path)
            self._remove_leftovers()
            free = shutil.disk_usage(self.path).free
            if free < needed_bytes:
                raise UserError(
                    f"--output_dir: {self.path} has {free / 1e6:,.0f} MB free and the checkpoints need up to "
                    f"{needed_bytes / 1e6:,.0f} MB; free some, or lower --checkpoints_total_limit."
                )
            yield
        finally:
            lock.release()

    def _remove_leftovers(self) -> None:
        """Deletes what a kill has left of writing and deleting; the lock is held, so no other process is at it."""
        for leftover in self.path.glob(STAGING + "*"):
            _remove(leftover)

    def _components(self) -> list[Path]:
        """Lists the folders of the saved pipeline's components."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            index = json.loads(self.model_index.read_text(encoding="utf-8"))
            names = [name for name, entry in index.items() if isinstance(entry, list) and name.isidentifier()]
            return [self.path / name for name in names if name != "_class_name" and (self.path / name).is_dir()]
        return []

    @contextlib.contextmanager
    def writing(self, step: Callable[[], int]) -> Iterator[None]:
        """Turns a failed write, on a full or removed disk, into a `UserError` that names the step."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{self.path} could not be written to at step {step()} ({error}); its checkpoints are intact, the last is "
                f"{self.last_checkpoint_name()}. Make room and continue with --resume_from_checkpoint latest."
            ) from error

    # ------------------------------------------------------------------------------- settings, facts, log, grids

    def read_config(self) -> dict[str, Any]:
        """Reads `config.yaml`, the settings of the run, as anyone may have written them; empty if there is none."""
        return _read(self.config, load_yaml)

    def write_config(self, settings: dict[str, Any]) -> None:
        replace_file(self.config, yaml.safe_dump(settings, sort_keys=False))

    def read_facts(self) -> dict[str, Any]:
        """Reads `run.json`, the data, machine and versions of the run; empty if there is none."""
        facts = _read(self.facts, json.loads)
        for name, value in facts.items():
            if not isinstance(value, _FACTS.get(name, object)):
                raise UserError(f"{self.facts} is damaged ({name} is {value!r:.40}): delete it, and try again.")
        return facts

    def write_facts(self, facts: dict[str, Any]) -> None:
        replace_file(self.facts, json.dumps(facts, indent=2))

    def append_log(self, line: dict[str, Any]) -> None:
        """Appends one JSON line to `train_log.jsonl`."""
        with self.log.open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")

    def trim_log(self, step: int) -> None:
        """Drops the lines after `step`, which a killed run wrote after its checkpoint: no step is logged twice."""
        kept = []
        for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.exists() else []:
            try:
                if json.loads(line)["step"] > step:
                    break
            except (ValueError, KeyError, TypeError):  # a line that a kill has cut
                break
            kept.append(line + "\n")
        replace_file(self.log, "".join(kept))

    def grid(self, step: int) -> Path:
        """Returns the file of the sample grid of `step`."""
        return self.path / "samples" / f"step-{step:07d}.png"

    def list_grids(self) -> list[Path]:
        """Lists the sample grids drawn during training, oldest first."""
        return sorted((self.path / "samples").glob("step-*.png"))

    # -------------------------------------------------------------------------------------------------- reports

    def find_report(self) -> Path:
        """
        Finds the report of the folder: the published one, its own `report.json`, or the only one in `reports/`.

        Raises:
            UserError: If it has several, and none is published.
        """
        with contextlib.suppress(OSError, UnicodeDecodeError):
            name = self.published.read_text(encoding="utf-8").strip()
            report = self.reports / Path(name).name / "report.json"
            if report.is_file():
                return report
        found = sorted(self.reports.glob("*/report.json"))
        if self.report.is_file() or not found:
            return self.report
        if len(found) > 1:
            names = ", ".join(path.parent.name for path in found)
            raise UserError(
                f"{self.path} has {len(found)} reports ({names}) and none is published: name one, such as "
                f"{found[0]}, or evaluate with --publish."
            )
        return found[0]

    def publish_report(self, name: str) -> None:
        """Chooses the report that the card shows and that stands for the folder."""
        replace_file(self.published, name + "\n")

    # ---------------------------------------------------------------------------------------------- checkpoints

    def checkpoint(self, step: int) -> Path:
        """Returns the folder of the checkpoint of `step`."""
        return self.path / f"checkpoint-{step}"

    def list_checkpoints(self) -> list[Path]:
        """Lists the published `checkpoint-N` folders, oldest first."""
        found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in self.path.glob("checkpoint-*")]
        return [path for _, path in sorted((int(match[1]), path) for match, path in found if match and path.is_dir())]

    def last_checkpoint_name(self) -> str:
        return next((path.name for path in reversed(self.list_checkpoints())), "none")

    def find_checkpoint(self, name: str) -> Path | None:
        """
        Finds the checkpoint to resume from. A damaged one is skipped with a warning.

        Args:
            name (`str`): `"latest"`, a folder's name in the run folder, or a path.

        Returns:
            `Path` or None: None if `name` is `"latest"` and there is none yet.

        Raises:
            UserError: If the named checkpoint does not exist or is damaged, or if all are damaged.
        """
        checkpoints = self.list_checkpoints()
        if name != "latest":
            path = next((path for path in (Path(name), self.path / name) if path.is_dir()), None)
            if path is None:
                have = ", ".join(path.name for path in checkpoints) or "none"
                raise UserError(f"--resume_from_checkpoint: there is no checkpoint '{name}'; {self.path} has: {have}.")
            reason = find_damage(path)
            if reason:
                raise UserError(
                    f"--resume_from_checkpoint: {path} is damaged ({reason}); use 'latest' or an earlier one."
                )
            return path
        for path in reversed(checkpoints):
            reason = find_damage(path)
            if reason is None:
                return path
            logger.warning(f"{path.name} is damaged ({reason}): the one before it is used.")
        if checkpoints:
            raise UserError(f"Every checkpoint in {self.path} is damaged: start again with --overwrite_output_dir.")
        return None

    def publish_checkpoint(self, step: int, write: Callable[[Path], None]) -> Path:
        """Publishes the checkpoint of `step`, after the log lines before it are flushed; `write` fills its folder."""
        if self.log.exists():
            _fsync(self.log)
        publish(self.checkpoint(step), write)
        return self.checkpoint(step)

    def prune(self, newest: Path, limit: int | None, keep: Path | None = None) -> None:
        """
        Deletes the checkpoints that `newest`, just published, makes superfluous: older ones beyond `limit`; later ones,
        which a resume has skipped as damaged or gone back behind; and leftovers of crashed writes.

        Args:
            newest (`Path`): The checkpoint that was just published.
            limit (`int`, *optional*): Number of checkpoints to keep; None for all.
            keep (`Path`, *optional*): The best checkpoint, which stays in any case.
        """
        self._remove_leftovers()
        existing = self.list_checkpoints()
        position = existing.index(newest)
        older = existing[: max(0, min(position, position + 1 - limit))] if limit is not None else []
        for path in older + existing[position + 1 :]:
            if path != keep:
                _remove(path)


# Atomic writing


def publish(directory: Path, write: Callable[[Path], None]) -> None:
    """
    Makes the folder `directory` appear complete or not at all.

    Args:
        directory (`Path`): The folder to publish; an older one of that name is replaced.
        write (`Callable[[Path], None]`): Writes the content into the staging folder that it is given.

    Raises:
        OSError: If the disk is full, or another process has published the same folder meanwhile.
    """
    staging, old = _staging(directory), _staging(directory)
    staging.mkdir(parents=True)
    for leftover in directory.parent.glob(STAGING + "*"):
        with contextlib.suppress(OSError):  # its writer is done, after all
            if time.time() - leftover.stat().st_mtime > _LEFT_AFTER:
                _remove(leftover)
    try:
        write(staging)
        seal(staging)
        if directory.exists():  # a damaged checkpoint of the same step, or the same one again
            os.replace(directory, old)
        os.replace(staging, directory)
        _fsync(directory.parent)
    finally:
        with contextlib.suppress(OSError):  # another process has published, or there is nothing to put back
            os.replace(old, directory)
        for leftover in (staging, old):  # on a full disk, half a checkpoint is in everyone's way
            shutil.rmtree(leftover, ignore_errors=True)


def _staging(path: Path) -> Path:
    """Returns a name beside `path` that is this writer's own, for what is not published yet or no longer."""
    return path.with_name(f"{STAGING}{path.name}-{uuid.uuid4().hex[:8]}")


def seal(folder: Path) -> None:
    """Writes the manifest of a folder and flushes everything to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)} for path in files
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2))
    for path in [*files, folder / MANIFEST]:
        _fsync(path)
    for parent in sorted({path.parent for path in files} | {folder}, reverse=True):
        _fsync(parent)


def find_damage(directory: Path) -> str | None:
    """Checks a sealed folder against its manifest; returns what is wrong with it, or None."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in manifest.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"its {MANIFEST} cannot be read"
    if not expected:
        return f"its {MANIFEST} is empty"
    for name, (size, sha256) in expected.items():
        path = directory / name
        try:
            if not path.resolve().is_relative_to(directory.resolve()):
                return f"its {MANIFEST} names a file outside the folder"
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if _sha256(path) != sha256:
                return f"{name} does not match its checksum"
        except (OSError, ValueError) as error:  # a bad sector, or no valid file name
            return f"{name!r} cannot be read ({error})"
    return None


def replace_file(path: Path, text: str) -> None:
    """Makes the text file `path` appear complete or not at all."""
    staging = path.with_name(STAGING + path.name)
    staging.write_text(text, encoding="utf-8")
    _fsync(staging)
    os.replace(staging, path)


def _remove(path: Path) -> None:
    """Deletes a file or a folder; of a folder, a kill leaves all or nothing under its name."""
    if path.is_dir():
        gone = path if path.name.startswith(STAGING) else path.rename(_staging(path))
        shutil.rmtree(gone, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    if path.is_file():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    elif hasattr(os, "O_DIRECTORY"):  # Windows opens no folders; its renames are durable without
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# Reading


def read_log(path: str | Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """
    Reads the series of a training log.

    A line that a kill has cut is skipped, and if a resumed run has logged a step again the later value counts.

    Args:
        path (`str` or `Path`):
            A file of JSON lines such as `{"step": 10, "loss": 0.5, "lr": 1e-4}` or `{"step": 100, "val_loss": 0.4}`.

    Returns:
        `dict[str, tuple[np.ndarray, np.ndarray]]`: name -> (steps, values), steps increasing, finite values only.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no training log '{path}': give the output folder of a run.")
    series: dict[str, dict[int, float]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            step = int(entry["step"])
        except (ValueError, KeyError, TypeError):
            continue
        for name, value in entry.items():
            if name != "step" and isinstance(value, (int, float)) and math.isfinite(value):
                series.setdefault(name, {})[step] = float(value)
    return {
        name: (np.array(sorted(values)), np.array([values[step] for step in sorted(values)]))
        for name, values in series.items()
    }


class _Loader(yaml.SafeLoader):
    """YAML 1.2's booleans, true and false: `mixed_precision: no` is a word."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":bool")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")


def load_yaml(text: str) -> Any:
    """
    Parses YAML.

    Raises:
        yaml.YAMLError: If it is not valid, or if its aliases expand to more values than any settings have.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _count_values(node, {}) > _MAX_YAML_VALUES:
            raise yaml.YAMLError(f"it expands to more than {_MAX_YAML_VALUES:,} values")
        return loader.construct_document(node)
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    finally:
        loader.dispose()


def _count_values(node: yaml.Node, counts: dict[yaml.Node, int]) -> int:
    """Counts the values of a document with each alias expanded; `counts` keeps those of the nodes that are done."""
    if node not in counts:
        counts[node] = _MAX_YAML_VALUES  # while its parts are counted: an alias of a node within itself has no end
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        pairs = (part if isinstance(part, tuple) else (part,) for part in parts)
        counts[node] = 1 + sum(_count_values(part, counts) for pair in pairs for part in pair)
    return counts[node]


def _read(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """Reads names and values that a run has left; empty if there is no such file."""
    try:
        return dict(parse(path.read_text(encoding="utf-8")) or {}) if path.exists() else {}
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())}): delete it, and try again.") from error
