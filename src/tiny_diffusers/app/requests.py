"""Requests of the app: their limits, their errors, and their work in a thread that reports progress and can be stopped."""

import contextlib
import functools
import html
import logging
import math
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from ..errors import UserError, first_line


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL import Image


logger = logging.getLogger(__name__)

MAX_IMAGES = 64  # of a request
MAX_STEPS = 250
REPORT_SECONDS = 0.4  # between two reports of progress: each costs gradio as much as a step of a small network


class Stopped(Exception):
    """A request that its user has stopped, or whose user has gone."""


class Progress(NamedTuple):
    """Progress of a request: in words, and a picture of the images as they are so far, if the request shows one."""

    text: str
    picture: "Image.Image | None" = None


class Task:
    """Work of one request, in a thread of its own. It is stopped at the next step of its pipeline."""

    def __init__(self):
        self._reports: queue.SimpleQueue = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._last_report = -math.inf

    def stop(self) -> None:
        self._stopped.set()

    def report(self, text: str, draw: "Callable[[], Image.Image] | None" = None) -> None:
        """Reports progress, with a picture, at most every 0.4 s; ends the work if it was stopped."""
        if self._stopped.is_set():
            raise Stopped
        if time.monotonic() - self._last_report > REPORT_SECONDS:
            self._reports.put(Progress(text, None if draw is None else draw()))
            self._last_report = time.monotonic()

    def run(self, work: "Callable[[Task], Any]") -> Iterator[Any]:
        """Runs `work(task)`; yields its progress, and at last its result."""

        def target() -> None:
            try:
                self._reports.put((work(self), None))
            except BaseException as error:  # handed to the request, which raises it
                self._reports.put((None, error))

        threading.Thread(target=target, daemon=True).start()
        try:
            while isinstance(report := self._reports.get(), Progress):
                yield report
        finally:
            self.stop()  # where the request was given up while the work goes on
        result, error = report
        if error is not None:
            raise error
        yield result


class Tasks:
    """Tasks of a tab that are in progress, by the session that asked for them."""

    def __init__(self):
        self._tasks: defaultdict[str | None, set[Task]] = defaultdict(set)
        self._lock = threading.Lock()

    def run(self, request: gr.Request | None, work: Callable[[Task], Any]) -> Iterator[Any]:
        """Runs work as [`Task.run`]; [`Tasks.stop`] stops it."""
        session, task = getattr(request, "session_hash", None), Task()
        with self._lock:
            self._tasks[session].add(task)
        try:
            yield from task.run(work)
        finally:
            with self._lock:
                self._tasks[session].discard(task)
                if not self._tasks[session]:
                    del self._tasks[session]

    def stop(self, request: gr.Request) -> None:
        """Stops the tasks of a session: its user has clicked Stop, or has gone."""
        with self._lock:
            for task in self._tasks.get(request.session_hash, ()):
                task.stop()

    def stop_by(self, button: gr.Button, events: Sequence[gr.events.Dependency], status: gr.Markdown) -> None:
        """Makes a button stop what a session's events have begun, and take those that wait out of the queue."""

        def stop(request: gr.Request) -> str:
            self.stop(request)
            return "Stopped."

        button.click(stop, None, status, cancels=events, queue=False, show_progress="hidden", api_name=False)


def progress_outputs(progress: Progress, doing: str, count: int, status: int = 1) -> tuple:
    """
    Returns the outputs of a handler that show its progress: of `count` outputs the first, which is a picture, and the one
    of the index `status`; the others stay as they are.
    """
    outputs = [gr.skip()] * count
    outputs[status] = f"{doing}: {progress.text}"
    if progress.picture is not None:
        outputs[0] = progress.picture
    return tuple(outputs)


def watch(
    pipe: "DiffusionPipeline",
    task: Task,
    arrange: "Callable[[list[Image.Image]], Image.Image] | None" = None,
    num_batches: int = 1,
) -> dict:
    """
    Returns the options of a pipeline's calls that report their steps, or the rows of a PixelCNN, to a task; with a picture,
    as `arrange` makes it of the images of a batch, of the predicted x_0 or the rows so far.
    """
    if pipe._network_name not in ("unet", "pixelcnn"):
        return {}  # one pass of the network has no steps
    has_rows = pipe._network_name == "pixelcnn"
    shown = "images" if has_rows else "pred_original_sample"
    batch = 0

    def on_step_end(pipe: "DiffusionPipeline", step: int, timestep: int, tensors: dict) -> dict:
        def draw() -> "Image.Image":
            images = tensors[shown]
            return arrange(pipe._to_images(2 * images - 1 if has_rows else images, "pil"))

        nonlocal batch
        batch += step == 0
        steps = f"row {step + 1} of {pipe._image_shape[1]}" if has_rows else f"step {step + 1} of {pipe.num_timesteps}"
        text = f"batch {batch} of {num_batches}, {steps}" if num_batches > 1 else steps
        task.report(text, None if arrange is None else draw)
        return {}

    return {
        "callback_on_step_end": on_step_end,
        "callback_on_step_end_tensor_inputs": [] if arrange is None else [shown],
    }


def answers(function: Callable) -> Callable:
    """Makes a handler's mistakes one line in the page; what else goes wrong is logged, and said to have gone wrong."""

    @functools.wraps(function)
    def handler(*args, **kwargs):
        with one_line_errors():
            return function(*args, **kwargs)

    return handler


def streams(function: Callable) -> Callable:
    """Does as [`answers`] for a handler that yields."""

    @functools.wraps(function)
    def handler(*args, **kwargs):
        with one_line_errors():
            yield from function(*args, **kwargs)

    return handler


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    try:
        yield
    except Stopped:
        raise gr.Error("Stopped.", title="Stopped", duration=3, print_exception=False) from None
    except UserError as error:
        raise _shown(str(error)) from error
    except (gr.Error, GeneratorExit):
        raise
    except Exception as error:
        logger.exception("a request of the app failed")
        raise _shown(f"This failed in the server: {first_line(error)}.") from error


def _shown(message: str) -> gr.Error:
    """Returns an error as one line; the page would take its text for HTML, and names in it may be a stranger's."""
    return gr.Error(html.escape(" ".join(message.split()), quote=False), print_exception=False)


def whole(name: str, value: object, low: int, high: int) -> int:
    """Checks that a client's value is a whole number within bounds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value % 1:
        raise UserError(f"{name}: {value!r:.40} is not a whole number.")
    if not low <= value <= high:
        raise UserError(f"{name}: {value:.0f} is not from {low:,} to {high:,}.")
    return int(value)


def number(name: str, value: object, low: float, high: float) -> float:
    """Checks that a client's value is a number within bounds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{name}: {value!r:.40} is not a number.")
    if not low <= value <= high:
        raise UserError(f"{name}: {value:g} is not from {low:g} to {high:g}.")
    return float(value)


def spell(value: float) -> str:
    """Spells a number as shortly as gives the very same number back."""
    return f"{value:.0f}" if value % 1 == 0 and abs(value) < 1e15 else repr(value)
