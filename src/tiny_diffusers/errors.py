"""
Errors, warnings and messages for users: one line that says what was given, what is allowed and what to do. Text that may
be a stranger's is spelled so that neither a terminal nor Markdown obeys it.
"""

import contextlib
import difflib
import logging
import os
import re
import signal
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TextIO


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


def not_installed(what: str, extra: str) -> UserError:
    """
    Returns the error for a package that an extra brings, to be raised by the caller.

    Args:
        what (`str`): The package, or what needs it, at the beginning of a sentence.
        extra (`str`): The extra.
    """
    return UserError(f"{what} is not installed: {install_command(extra)}.")


def install_command(extra: str) -> str:
    """Returns the command that installs an extra beside the package, quoted, as zsh takes brackets for a pattern."""
    return f"pip install 'tiny-diffusers[{extra}]'"


def first_line(error: BaseException) -> str:
    """Returns the first line of an exception's message, or the name of its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def printable(text: str) -> str:
    """Spells the control characters of a text, line breaks aside: in a stranger's name they would command the terminal."""
    return "".join(ascii(c)[1:-1] if unicodedata.category(c)[0] == "C" and c != "\n" else c for c in text)


def markdown(text: str) -> str:
    """Escapes text for one line or table cell of Markdown: no line break, HTML, link or terminal escape is left of it."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text.replace("<", "&lt;").replace("|", "\\|").replace("](", "]\\(")


def code_block(text: str, language: str) -> str:
    """Returns a block of code in Markdown, whose fence is longer than any that the text holds."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def say(message: object, file: TextIO | None = None) -> None:
    """Prints a message at once, on stdout by default; names in it may be a stranger's."""
    print(printable(str(message)), file=file, flush=True)


def exit_status(command: Callable[[], int | None], name: str) -> int:
    """
    Runs a command and returns its exit status: its own; 2 for a mistake, or for a file or folder that the system
    refuses; 130 for Ctrl-C. Each is printed as one line.

    Args:
        command (`Callable`): The command; `None` is success.
        name (`str`): What the line begins with.
    """
    try:
        with _warnings_in_one_line():
            return command() or 0
    except UserError as error:
        reason = " ".join(str(error).split())
    except OSError as error:
        reason = error.strerror or first_line(error)
        reason += f": '{error.filename}'" if error.filename is not None else ""
    except KeyboardInterrupt:
        say("stopped.", sys.stderr)
        return 128 + signal.SIGINT
    say(f"{name}: {reason}", sys.stderr)
    return 2


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Prints `UserWarning`s that traveling files raise as those of the loggers; Python prints the others."""
    package, show_as_python = os.path.dirname(__file__), warnings.showwarning

    def show(message, category, filename, lineno, file=None, line=None):
        if issubclass(category, UserWarning) and (
            filename.startswith(package) or category.__module__.startswith(f"{__package__}.")
        ):
            logger.warning(" ".join(str(message).split()))
        else:
            show_as_python(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


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
            say(f"{record.levelname.lower()}: {record.getMessage()}", sys.stderr)


# The one channel for warnings: each module's `logging.getLogger(__name__)` ends here.
logger = logging.getLogger(__package__)
logger.addHandler(_StderrHandler())
logger.propagate = False
