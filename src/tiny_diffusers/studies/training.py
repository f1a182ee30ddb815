"""The train scripts as a study or a search uses them: their flags, and runs in processes of their own."""

import contextlib
import ctypes
import importlib
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..flags import as_flags
from ..runs import RunFolder
from ..training.arguments import TrainingArguments


_PR_SET_PDEATHSIG = 1  # of Linux's prctl


def arguments_class(script: str) -> type[TrainingArguments]:
    """Returns the dataclass of a train script's flags."""
    module = importlib.import_module(f"...train_scripts.train_{script}", __name__)
    return next(value for value in vars(module).values() if getattr(value, "SCRIPT", None) == script)


def start_training(script: str, flags: Mapping[str, Any], output_dir: Path, log: Path) -> subprocess.Popen:
    """
    Starts a train script in a new process: a new run, or the continuation of the one that `output_dir` holds.

    SIGTERM makes it save a checkpoint and stop. On Linux it gets that signal when the process that started it ends, in
    whatever way; a run that is still saving its checkpoint is waited for.

    Args:
        script (`str`): As in `tiny-diffusers train SCRIPT`.
        flags (`Mapping[str, Any]`): Flag -> value, as a recipe holds them.
        output_dir (`Path`): Folder of the run.
        log (`Path`): The file that its messages are appended to.

    Returns:
        `subprocess.Popen`: The process. Its exit status is 0 if the run is complete, and 2 for a mistake, which is the
        last line of the log.
    """
    RunFolder(output_dir).wait_until_free()
    own = {"output_dir": str(output_dir), "resume_from_checkpoint": "latest"}
    command = [sys.executable, "-m", "tiny_diffusers.cli", "train", script, *as_flags({**flags, **own})]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, preexec_fn=_end_with_parent()
        )


def finish_training(process: subprocess.Popen) -> int:
    """Waits for a train script and returns its exit status; if the wait is interrupted, stops the script first."""
    try:
        return process.wait()
    except BaseException:
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise


def last_line(log: Path) -> str:
    """Returns the last line of a log that is not empty: of a script that failed, its error."""
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _end_with_parent() -> Callable[[], None] | None:
    """Returns what a new process calls, so that it gets SIGTERM when this one ends; None where there is no such call."""
    if not sys.platform.startswith("linux"):
        return None
    with contextlib.suppress(OSError, AttributeError):
        prctl = ctypes.CDLL(None).prctl
        return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    return None
