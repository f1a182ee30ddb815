"""What a user reads when something is wrong: one line that says what was given, what is allowed and what to do."""

import difflib
import logging
import os
import sys
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what was asked for. Scripts and the command line print it as one line and exit with status 2."""


def unknown(kind: str, given: object, allowed: Iterable[object]) -> UserError:
    """
    Returns the error for an unknown name, to be raised by the caller. It suggests the nearest known name.

    Args:
        kind (`str`): What the name stands for, such as `"class"` or `"--loss_type"`.
        given (`object`): The name that was given.
        allowed (`Iterable[object]`): The known names.
    """
    allowed = [str(name) for name in allowed]
    near = difflib.get_close_matches(str(given), allowed, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return UserError(f"Unknown {kind} '{given}': it must be one of {', '.join(allowed)}.{hint}")


def first_line(error: BaseException) -> str:
    """Returns the first line of an exception's message, or the name of its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class _StderrHandler(logging.Handler):
    """Prints `warning: ...` to stderr; of the processes of one launch, the main one alone does."""

    def emit(self, record: logging.LogRecord) -> None:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr, flush=True)


# The one channel for warnings: each module's `logging.getLogger(__name__)` ends here.
logger = logging.getLogger(__package__)
logger.addHandler(_StderrHandler())
logger.propagate = False
