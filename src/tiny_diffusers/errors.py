"""Errors and warnings for users: one line that says what was given, what is allowed and what to do."""

import contextlib
import difflib
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping


class UserError(ValueError):
    """A mistake in what was asked for. Scripts and the command line print it as one line and exit with status 2."""


def unknown(kind: str, given: object, allowed: Iterable[object], meant: Mapping[str, str] | None = None) -> UserError:
    """
    Returns the error for an unknown name, to be raised by the caller. It suggests what is meant, or the nearest known
    name.

    Args:
        kind (`str`): What the name stands for, such as `"class"` or `"--loss_type"`.
        given (`object`): The name that was given.
        allowed (`Iterable[object]`): The known names.
        meant (`dict[str, str]`, *optional*): What to give for names, in lower case, that other programs know.
    """
    allowed = [str(name) for name in allowed]
    near = difflib.get_close_matches(str(given), allowed, n=1)
    suggested = (meant or {}).get(str(given).lower()) or next(iter(near), None)
    hint = f" Did you mean '{suggested}'?" if suggested else ""
    return UserError(f"Unknown {kind} '{given}': it must be one of {', '.join(allowed)}.{hint}")


def first_line(error: BaseException) -> str:
    """Returns the first line of an exception's message, or the name of its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def refusals(prefix: str = "") -> Iterator[None]:
    """
    Turns a `ValueError` that a pipeline, scheduler or network raises itself into a [`UserError`], after `prefix`: their
    files travel, so they cannot import it. One that comes from below them is a bug and keeps its traceback.
    """
    try:
        yield
    except ValueError as error:
        trace = error.__traceback__
        while trace.tb_next is not None:
            trace = trace.tb_next
        module = trace.tb_frame.f_globals.get("__name__", "")
        rooms = tuple(f"{__package__}.{room}" for room in ("pipelines", "schedulers", "models"))
        if isinstance(error, UserError) or not module.startswith((*rooms, "diffusers")):
            raise
        raise UserError(f"{prefix}{error}") from error


class _StderrHandler(logging.Handler):
    """Prints `warning: ...` to stderr; of the processes of one launch, the main one alone does."""

    def emit(self, record: logging.LogRecord) -> None:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr, flush=True)


# The one channel for warnings: each module's `logging.getLogger(__name__)` ends here.
logger = logging.getLogger(__package__)
logger.addHandler(_StderrHandler())
logger.propagate = False
