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
from ..training.arguments import TrainingArguments, is_open


# Train flags that a study or a search gives by itself, or that are of no use to it
OWN_FLAGS = (
    *("config", "cell", "budget", "output_dir", "overwrite_output_dir", "resume_from_checkpoint"),
    *("push_to_hub", "hub_model_id", "hub_token", "hub_private_repo"),
)
# Exit statuses of a process that was stopped from outside
STOPPED = {
    sign * number + offset for number in (signal.SIGINT, signal.SIGTERM) for sign, offset in ((-1, 0), (1, 128))
}
_NUM_VALIDATION_IMAGES = 128
_PR_SET_PDEATHSIG = 1  # of Linux's prctl


def arguments_class(script: str) -> type[TrainingArguments]:
    """Returns the dataclass of a train script's flags."""
    module = importlib.import_module(f"...train_scripts.train_{script}", __name__)
    return next(value for value in vars(module).values() if getattr(value, "SCRIPT", None) == script)


def fix_validation(arguments: TrainingArguments) -> dict[str, Any]:
    """
    Returns the flag that makes runs of some minutes comparable: each would choose its own number of validation images.
    Empty if a number was asked for, or if the length is no number of minutes.
    """
    is_chosen = arguments.max_train_minutes is not None and arguments.max_train_steps is None
    if not is_chosen or not is_open(arguments, "max_validation_samples"):
        return {}
    return {"max_validation_samples": _NUM_VALIDATION_IMAGES}


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
