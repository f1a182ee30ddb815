"""
The folder of a run: the one module that knows its file names, and that writes, finds and deletes them.

    folder = RunFolder("runs/digits")
    with folder.claim(resume=False, overwrite=False):   # creates it, locks it, refuses another run's
        folder.append_log({"step": 1, "loss": 0.5})
        folder.confirm()                                # from here on it is this run's; before, an error undoes all
        folder.publish_checkpoint(1, write)             # appears complete or not at all

A run keeps a list of the files that it has written. It deletes nothing else, and replaces nothing else.
"""

import contextlib
import errno
import fnmatch
import itertools
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import filelock
import numpy as np
import yaml
from safetensors import SafetensorError

from .errors import UserError
from .files import (
    find_damage,
    flush,
    leftovers,
    load_json,
    load_yaml,
    publish,
    read_mapping,
    read_text,
    remove,
    replace_file,
    staging_path,
)
from .paths import PATHS_FILE, keep_paths


logger = logging.getLogger(__name__)

MODEL_INDEX = "model_index.json"  # of a saved pipeline
FILE_LIST = ".files.json"  # what the run has written
_LOCK = ".lock"
MAX_STEP = 2**53  # of a line in a log
_REPLACED = ".replaced"  # holds the run that is overwritten until the new one has taken a step
_COMPONENTS = ("unet", "guidance_model", "scheduler", "pixelcnn", "vae", "generator", "discriminator")
_COMPONENT_FILES = ("config.json", "scheduler_config.json", "*.safetensors", "*.safetensors.index.json", "*.py")

# The files of a saved model and its run
_MODEL_FILES = (
    *("README.md", MODEL_INDEX, "config.yaml", "run.json", "train_log.jsonl", "pipeline_tiny*.py"),
    *("samples.png", "loss_curves.png", "training.gif", "samples/step-*.png"),
    *(f"{component}/{file}" for component in _COMPONENTS for file in _COMPONENT_FILES),
)
# Those of evaluations, which write by other processes
_REPORT_FILES = ("report.json", "report.md", "report.png", "reports/published", "reports/*/report.*")
# Those that stay on this machine
_LOCAL_FILES = (PATHS_FILE, f"reports/*/{PATHS_FILE}")

# Folders that a run writes, and those of averages that are rebuilt from its snapshots
_SNAPSHOT = "step-[1-9][0-9]{,14}"
_FOLDERS = rf"checkpoint-\d+|snapshots/{_SNAPSHOT}|ema/sigma_rel-[\d.e-]+(-step-\d+)?"

# What is read back from `run.json`
_FACTS = {"data": dict, "global_batch": int, "steps": int, "seconds": (int, float), "machine": str}


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
        self.snapshots = self.path / "snapshots"  # of the averages that others are rebuilt from
        self.averages = self.path / "ema"  # those that were rebuilt, a folder each
        self._confirmed = False

    # -------------------------------------------------------------------------------------------- claiming it

    @contextlib.contextmanager
    def claim(self, *, resume: bool, overwrite: bool, needed_bytes: int = 0) -> Iterator[None]:
        """
        Creates the folder and holds its lock. The operating system drops the lock with the process, so a killed run
        leaves none. Until [`RunFolder.confirm`] the new run may fail, and an older one is put back.

        Args:
            resume (`bool`): Continue the run that the folder holds.
            overwrite (`bool`): Replace the run that the folder holds; without both, another run is refused.
            needed_bytes (`int`): Disk space that the checkpoints need.

        Raises:
            UserError: If the folder is locked, cannot be written to, holds another run or files that this run would
                replace, or if its disk is too full.
        """
        lock = filelock.FileLock(self.path / _LOCK)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise UserError(f"--output_dir: another process is training into {self.path}.") from error
        except OSError as error:
            raise UserError(f"--output_dir: cannot write to {self.path} ({error.strerror}).") from error
        try:
            self._restore()
            self._claim(resume, overwrite, needed_bytes)
            self._remove_leftovers()
            try:
                yield
            finally:
                if not self._confirmed:
                    self._undo()
        finally:
            lock.release()

    def wait_until_free(self) -> None:
        """Waits for another process that trains into the folder, such as one that was told to stop and still saves."""
        if (self.path / _LOCK).exists():
            with filelock.FileLock(self.path / _LOCK):
                pass

    def _claim(self, resume: bool, overwrite: bool, needed_bytes: int) -> None:
        holds_run = self.config.exists() or self.model_index.exists()
        if holds_run and not resume and not overwrite:
            raise UserError(
                f"--output_dir: {self.path} holds another run; continue it with --resume_from_checkpoint latest, "
                "replace it with --overwrite_output_dir, or name another folder."
            )
        foreign = self._foreign_files()
        if foreign and not (resume and holds_run):
            raise UserError(
                f"--output_dir: {self.path} holds files that the run would replace and that no run has written "
                f"({_some(foreign)}): move them, or name another folder."
            )
        free = shutil.disk_usage(self.path).free
        if free < needed_bytes:
            raise UserError(
                f"--output_dir: {self.path} has {free / 1e6:,.0f} MB free and the checkpoints need up to "
                f"{needed_bytes / 1e6:,.0f} MB; free some, or lower --checkpoints_total_limit."
            )
        self._confirmed = resume and holds_run
        if self._confirmed:
            self._write_list(self.list_files())  # of a run of an earlier version, which has none
            return
        if holds_run:
            self._set_aside()
        self._write_list([])

    def _remove_leftovers(self) -> None:
        """Deletes what a kill has left of writing and deleting; the lock is held, so no other process is at it."""
        folders = [self.path] if self.snapshots.is_symlink() else [self.path, self.snapshots]
        for leftover in itertools.chain(*map(leftovers, folders)):
            remove(leftover)

    def confirm(self) -> None:
        """Makes the folder this run's, which has taken its first step: the run that it overwrites is deleted."""
        if not self._confirmed:
            self._confirmed = True
            remove(self.path / _REPLACED)

    def _set_aside(self) -> None:
        """Moves the files of the older run into a folder of their own, the list first."""
        names = self.list_files()
        self._write_list(names)
        for name in [FILE_LIST, *names]:
            target = self.path / _REPLACED / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                os.replace(self.path / name, target)
            self._remove_empty_parents(name)

    def _undo(self) -> None:
        """Deletes what a run has written that took no step, and puts back the one that it was to replace."""
        self._remove_listed()
        self._restore()

    def _restore(self) -> None:
        """
        Puts back the run that was to be replaced by one that took no step; there is none in most cases. The list of files
        is the first to go aside and the last to come back: where it is tells how far a killed process was.
        """
        aside = RunFolder(self.path / _REPLACED)
        if aside.path.is_symlink() or not aside.path.is_dir():
            return
        if aside._read_list() is None:
            if self._read_list() is not None:  # all that was in it is back
                remove(aside.path)
            return
        self._remove_listed()  # of the later run, which was killed
        for name in [*aside.list_files(), FILE_LIST]:
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                os.replace(aside.path / name, self.path / name)
        remove(aside.path)

    def _remove_listed(self) -> None:
        """Deletes the files on the list, and then the list."""
        for name in [*(self._read_list() or []), FILE_LIST]:
            remove(self.path / name)
            self._remove_empty_parents(name)

    def _remove_empty_parents(self, name: str) -> None:
        for parent in list(PurePosixPath(name).parents)[:-1]:
            with contextlib.suppress(OSError):  # it holds something else
                (self.path / parent).rmdir()

    # ---------------------------------------------------------------------------------------- what the run has written

    def record(self, *paths: Path) -> None:
        """
        Adds files and checkpoints that are about to be written to the list of those that are the run's. Where there is no
        list yet, as beside a pipeline that was saved by itself, it begins with what lies there.

        Raises:
            UserError: If a link leads out of the folder.
        """
        listed = self._read_list()
        listed = self.list_files() if listed is None else listed
        for path in paths:
            self.check_inside(path)
        new = [name for name in (path.relative_to(self.path).as_posix() for path in paths) if name not in listed]
        if new:
            self._write_list([*listed, *new])

    def check_inside(self, path: Path) -> None:
        """Checks that no link leads from the folder to where `path` lies."""
        real = self.path.resolve() / path.relative_to(self.path)
        if path.parent.resolve() != real.parent or path.is_symlink():
            raise UserError(f"'{path}' is a link, or lies behind one, that leads out of the folder: remove it.")

    def list_files(self) -> list[str]:
        """
        Lists the files and folders that are the run's, relative to the folder: those on its list, those of evaluations,
        and rebuilt averages. Of a run of an earlier version, which has no list, what such a run wrote.
        """
        listed = self._read_list()
        if listed is None:
            listed = [*self._match(*_MODEL_FILES, *_LOCAL_FILES), *self._match_folders()]
            if not self._is_own_card():
                listed = [name for name in listed if name != "README.md"]
        return list(dict.fromkeys([*listed, *self._match(*_REPORT_FILES, *_LOCAL_FILES), *self._list_averages()]))

    def list_shared(self) -> list[str]:
        """Lists the files of the model that are pushed, relative to the folder; links are none of them."""
        listed = self._read_list()
        names = self._match(*_MODEL_FILES) if listed is None else listed
        patterns = (*_MODEL_FILES, *_REPORT_FILES)
        shared = {name for name in names if _matches(name, patterns) and self._is_inside(self.path / name)}
        return sorted(shared | set(self._match("README.md", *_REPORT_FILES)))

    def _foreign_files(self) -> list[str]:
        """Lists the files that a run would replace and that no run has written."""
        return self._not_own([*self._match(*_MODEL_FILES), *self._match_folders()])

    def _not_own(self, names: list[str]) -> list[str]:
        """Returns the names of files that no run has written; the README.md of a repository is kept, so it is none."""
        is_run = self._read_list() is not None or self.config.exists() or self.model_index.exists()
        own = self.list_files() if is_run else []
        is_repository = any((self.path / name).exists() for name in (".git", ".gitattributes"))  # of the Hub
        return [name for name in names if name not in own and not (name == "README.md" and is_repository)]

    def _match(self, *patterns: str) -> list[str]:
        """Lists the regular files of the folder that match, relative to it; nothing behind a link."""
        found = {path for pattern in patterns for path in self.path.glob(pattern)}
        return sorted(path.relative_to(self.path).as_posix() for path in found if self._is_inside(path))

    def _match_folders(self) -> list[str]:
        """Lists the checkpoints and snapshots, relative to the folder."""
        return [
            path.relative_to(self.path).as_posix() for path in (*self.list_checkpoints(), *self._match_snapshots())
        ]

    def _is_inside(self, path: Path) -> bool:
        """Checks that a path of the folder is a regular file in it, and no link leads to it."""
        return path.is_file() and path.resolve() == self.path.resolve() / path.relative_to(self.path)

    def _read_list(self) -> list[str] | None:
        """Reads the list of the run's files, as anyone may have written it; None if there is none."""
        try:
            listed = load_json(read_text(self.path / FILE_LIST))
            names = [name for name in listed if isinstance(name, str) and _is_of_run(name)]
        except (OSError, ValueError, TypeError):
            return None
        real = self.path.resolve()
        return [name for name in names if (self.path / name).parent.resolve() == (real / name).parent]

    def _write_list(self, names: list[str]) -> None:
        replace_file(self.path / FILE_LIST, json.dumps(names, indent=0))

    def _is_own_card(self) -> bool:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return "tiny-diffusers" in read_text(self.card)
        return False

    def keep_paths(self, paths: dict[str, str]) -> None:
        """Keeps the local paths of the settings, which `config.yaml` has last names of."""
        self.record(self.path / PATHS_FILE)
        keep_paths(self.path, paths)

    def keep_foreign_card(self) -> None:
        """Renames a README.md that the run has not written, of a repository that it is trained into."""
        if self.card.exists() and "README.md" not in self.list_files():
            self.set_card_aside()

    def set_card_aside(self) -> Path:
        """Renames a README.md that is about to be replaced, and replaces no other by that."""
        names = itertools.chain(["README.original.md"], (f"README.original-{i}.md" for i in itertools.count(2)))
        free = next(self.path / name for name in names if not (self.path / name).exists())
        return self.card.rename(free)

    def place(self, write: Callable[[Path], None]) -> None:
        """
        Writes files beside the folder's own and moves each to its place: a full disk leaves those that were there. The
        index of a pipeline is the last, so that where it is, all is.
        """
        staging = staging_path(self.path / "files")
        staging.mkdir(parents=True)
        try:
            write(staging)
            names = [path.relative_to(staging) for path in staging.rglob("*") if path.is_file()]
            names.sort(key=lambda name: name.name == MODEL_INDEX)
            foreign = self._not_own([name.as_posix() for name in names if (self.path / name).exists()])
            if foreign:
                raise UserError(
                    f"{self.path} holds files that would be replaced and that no run has written ({_some(foreign)}): move "
                    "them, or name another folder."
                )
            if Path("README.md") in names:
                self.keep_foreign_card()
            self.record(*(self.path / name for name in names))
            for name in names:
                (self.path / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(staging / name, self.path / name)
        except SafetensorError as error:  # a full disk is no OSError to safetensors
            raise OSError(errno.EIO, str(error), str(self.path)) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)

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
        return read_mapping(self.config, load_yaml)

    def write_config(self, settings: dict[str, Any]) -> None:
        self.record(self.config)
        replace_file(self.config, yaml.safe_dump(settings, sort_keys=False))

    def read_facts(self) -> dict[str, Any]:
        """Reads `run.json`, the data, machine and versions of the run; empty if there is none."""
        facts = read_mapping(self.facts, load_json)
        for name, value in facts.items():
            if not isinstance(value, _FACTS.get(name, object)):
                raise UserError(f"{self.facts} is damaged ({name} is {value!r:.40}): delete it, and try again.")
        return facts

    def write_facts(self, facts: dict[str, Any]) -> None:
        self.record(self.facts)
        replace_file(self.facts, json.dumps(facts, indent=2))

    def append_log(self, line: dict[str, Any]) -> None:
        """Appends one JSON line to `train_log.jsonl`."""
        with self.log.open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")

    def trim_log(self, step: int) -> None:
        """Drops the lines after `step`, which a killed run wrote after its checkpoint: no step is logged twice."""
        self.record(self.log)
        kept = []
        for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.exists() else []:
            try:
                if load_json(line)["step"] > step:
                    break
            except (ValueError, KeyError, TypeError):  # a line that a kill has cut
                break
            kept.append(line + "\n")
        replace_file(self.log, "".join(kept))

    def grid(self, step: int) -> Path:
        """Returns the file of the sample grid of `step`."""
        return self.path / "samples" / f"step-{step:07d}.png"

    @staticmethod
    def grid_step(path: Path) -> int:
        return int(path.stem.removeprefix("step-"))

    def list_grids(self) -> list[Path]:
        """Lists the sample grids drawn during training, oldest first."""
        found = (self.path / "samples").glob("step-*.png")
        return sorted(path for path in found if re.fullmatch(r"step-\d{1,15}", path.stem, re.ASCII))

    # -------------------------------------------------------------------------------------------------- reports

    def find_report(self) -> Path:
        """
        Finds the report of the folder: the published one, its own `report.json`, or the only one in `reports/`.

        Raises:
            UserError: If it has several, and none is published.
        """
        with contextlib.suppress(OSError, UnicodeDecodeError):
            name = read_text(self.published).strip()
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

    def list_checkpoints_after(self, checkpoint: Path | None) -> list[Path]:
        """Lists the checkpoints of later steps than one of this folder; none if it is no such one."""
        checkpoints = self.list_checkpoints()
        positions = [i for i, path in enumerate(checkpoints) if checkpoint and path.resolve() == checkpoint.resolve()]
        return checkpoints[positions[0] + 1 :] if positions else []

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
            flush(self.log)
        self.record(self.checkpoint(step))
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
        own = self.list_files()
        existing = [path for path in self.list_checkpoints() if path.name in own]
        position = existing.index(newest)
        older = existing[: max(0, min(position, position + 1 - limit))] if limit is not None else []
        for path in older + existing[position + 1 :]:
            if path != keep:
                remove(path)

    # ---------------------------------------------------------------------------- snapshots, and what is rebuilt from them

    def snapshot(self, step: int) -> Path:
        """Returns the folder of the snapshot of `step`."""
        return self.snapshots / f"step-{step}"

    @staticmethod
    def snapshot_step(path: Path) -> int:
        return int(path.name.removeprefix("step-"))

    def list_snapshots(self) -> list[Path]:
        """Lists the run's published snapshots, oldest first."""
        own = self.list_files()
        return [path for path in self._match_snapshots() if path.relative_to(self.path).as_posix() in own]

    def _match_snapshots(self) -> list[Path]:
        found = [path for path in self.snapshots.glob("step-*") if re.fullmatch(_SNAPSHOT, path.name)]
        return sorted((path for path in found if path.is_dir()), key=self.snapshot_step)

    def publish_snapshot(self, step: int, write: Callable[[Path], None]) -> None:
        """Publishes the snapshot of `step`; `write` fills its folder."""
        self.record(self.snapshot(step))
        publish(self.snapshot(step), write)

    def trim_snapshots(self, step: int) -> None:
        """Deletes the snapshots after `step`, which a killed run saved after its checkpoint, or which a resume is before."""
        for path in self.list_snapshots():
            if self.snapshot_step(path) > step:
                remove(path)

    def average(self, sigma_rel: float, step: int | None = None) -> Path:
        """Returns the folder of the average of a length that is rebuilt at `step`; at the last, if None."""
        return self.averages / (f"sigma_rel-{sigma_rel:g}" + (f"-step-{step}" if step is not None else ""))

    def check_average(self, path: Path) -> None:
        """
        Checks that the folder of an average may be written.

        Raises:
            UserError: If it is none that was rebuilt here, or if a link leads out of the run's folder.
        """
        self.check_inside(path)
        if path.exists() and path.relative_to(self.path).as_posix() not in self._list_averages():
            raise UserError(f"'{path}' exists and is no average that was rebuilt here: move it, and try again.")

    def _list_averages(self) -> list[str]:
        """Lists the rebuilt averages, relative to the folder: other processes write them, each with a list of its own."""
        paths = [] if self.averages.is_symlink() else sorted(self.averages.glob("sigma_rel-*"))
        own = [path for path in paths if RunFolder(path)._read_list() is not None]
        return [name for name in (path.relative_to(self.path).as_posix() for path in own) if _is_of_run(name)]


def _is_of_run(name: str) -> bool:
    """Checks that a name on a list of files is one that a run writes: a list may be a stranger's."""
    return _matches(name, (*_MODEL_FILES, *_LOCAL_FILES)) or re.fullmatch(_FOLDERS, name, re.ASCII) is not None


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Checks that a relative name matches one of the patterns, part by part."""
    parts = name.split("/")
    return name.isprintable() and any(
        len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))
        for wanted in (pattern.split("/") for pattern in patterns)
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


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
            entry = load_json(line)
            step = int(entry["step"])
        except (ArithmeticError, ValueError, KeyError, TypeError):
            continue
        if not 0 <= step <= MAX_STEP:
            continue
        for name, value in entry.items():
            if name != "step" and isinstance(value, (int, float)) and abs(value) <= sys.float_info.max:
                series.setdefault(name, {})[step] = float(value)
    return {
        name: (np.array(sorted(values)), np.array([values[step] for step in sorted(values)]))
        for name, values in series.items()
    }
