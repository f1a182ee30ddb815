"""Requests of the app: their limits, their errors, and their work in a thread that reports progress and can be stopped."""

import contextlib
import functools
import logging
import math
import queue
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr
from gradio import processing_utils

from ..errors import UserError, first_line


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL import Image


logger = logging.getLogger(__name__)

MAX_IMAGES = 64  # of a request
MAX_STEPS = 250
MAX_UPLOAD_BYTES = 8 * 2**20
MAX_UPLOAD_PIXELS = 2**24
MAX_LAYERS = 4  # of an uploaded drawing
MAX_DRAWINGS = 100  # that pages have sent and no request has used yet
PREVIEW_SECONDS = 0.4  # between two previews


class Stopped(Exception):
    """A request that its user has stopped, or whose user has gone."""


class Progress(NamedTuple):
    """Progress of a request: in words, and a picture of the images as they are so far, if it was drawn anew."""

    text: str
    picture: "Image.Image | None" = None


class Task:
    """Work of one request, in a thread of its own. It is stopped at the next step of its pipeline."""

    def __init__(self):
        self._reports: queue.SimpleQueue = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._last_preview = 0.0

    def stop(self) -> None:
        self._stopped.set()

    def report(self, text: str, draw: "Callable[[], Image.Image] | None" = None) -> None:
        """Reports progress, with a picture at most every 0.4 s; ends the work if it was stopped."""
        if self._stopped.is_set():
            raise Stopped
        is_due = draw is not None and time.monotonic() - self._last_preview > PREVIEW_SECONDS
        self._reports.put(Progress(text, draw() if is_due else None))
        if is_due:
            self._last_preview = time.monotonic()

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
    """Tasks in progress, by the session that asked for them."""

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


def watch(
    pipe: "DiffusionPipeline", task: Task, arrange: "Callable[[list[Image.Image]], Image.Image] | None" = None
) -> dict:
    """
    Returns the options of a pipeline's call that report its steps, or the rows of a PixelCNN, to a task; with a picture, as
    `arrange` makes it of the images, of the predicted x_0 or the rows so far.
    """
    if pipe._network_name not in ("unet", "pixelcnn"):
        return {}  # one pass of the network has no steps
    has_rows = pipe._network_name == "pixelcnn"
    shown = "images" if has_rows else "pred_original_sample"

    def on_step_end(pipe: "DiffusionPipeline", step: int, timestep: int, tensors: dict) -> dict:
        def draw() -> "Image.Image":
            images = tensors[shown]
            return arrange(pipe._to_images(2 * images - 1 if has_rows else images, "pil"))

        progress = (
            f"row {step + 1} of {pipe._image_shape[1]}" if has_rows else f"step {step + 1} of {pipe.num_timesteps}"
        )
        task.report(progress, None if arrange is None else draw)
        return {}

    return {
        "callback_on_step_end": on_step_end,
        "callback_on_step_end_tensor_inputs": [] if arrange is None else [shown],
    }


def answers(function: Callable) -> Callable:
    """Makes a handler's mistakes one line in the page; what else goes wrong is logged, and said to have gone wrong."""

    @functools.wraps(function)
    def handler(*args, **kwargs):
        with _one_line_errors():
            return function(*args, **kwargs)

    return handler


def streams(function: Callable) -> Callable:
    """Does as [`answers`] for a handler that yields."""

    @functools.wraps(function)
    def handler(*args, **kwargs):
        with _one_line_errors():
            yield from function(*args, **kwargs)

    return handler


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except Stopped:
        raise gr.Error("Stopped.", title="Stopped", duration=3, print_exception=False) from None
    except UserError as error:
        raise gr.Error(" ".join(str(error).split()), print_exception=False) from error
    except (gr.Error, GeneratorExit):
        raise
    except Exception as error:
        logger.exception("a request of the app failed")
        raise gr.Error(f"This failed in the server: {first_line(error)}.", print_exception=False) from error


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


def check_upload(content: bytes) -> None:
    """Refuses an uploaded file that is too large, or no picture, before it is decoded."""
    import io

    from ..data.sources import open_image

    if len(content) > MAX_UPLOAD_BYTES:
        raise UserError(
            f"The file has {len(content) / 2**20:.0f} MB: give one of at most {MAX_UPLOAD_BYTES >> 20} MB."
        )
    try:
        picture = open_image(io.BytesIO(content))
    except Exception as error:  # each format has its own
        raise UserError(
            f"The file can't be read as a picture ({type(error).__name__}): give a PNG or JPEG."
        ) from error
    if picture.width * picture.height > MAX_UPLOAD_PIXELS:
        raise UserError(
            f"The picture has {picture.width} x {picture.height} pixels: give one of at most {MAX_UPLOAD_PIXELS:,}."
        )


def save_once(component: "gr.Image | gr.Gallery") -> "gr.Image | gr.Gallery":
    """
    Makes a component keep the file of a picture that it has saved before: Gradio's own saving writes over a file that a
    browser may be reading.
    """
    from PIL.Image import Image

    postprocess = component.postprocess

    def save(picture: Any) -> Any:
        if not isinstance(picture, Image):
            return picture
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "image.png"
            picture.save(file)
            return processing_utils.save_file_to_cache(file, cache_dir=component.GRADIO_CACHE)

    def save_and_postprocess(value: Any) -> Any:
        return postprocess([save(picture) for picture in value] if isinstance(value, list) else save(value))

    component.postprocess = save_and_postprocess
    return component


def checked(editor: gr.ImageEditor) -> gr.ImageEditor:
    """Makes a component check the files and the number of its pictures before they are decoded."""
    accept, preprocess, convert = editor.accept_blobs, editor.preprocess, editor.convert_and_format_image

    @functools.wraps(accept)
    def check_and_accept(data: Any) -> Any:
        index = str(data.data.get("index") or 0)
        if index != "null" and not (index.isdecimal() and int(index) < MAX_LAYERS):
            raise ValueError(f"A drawing has at most {MAX_LAYERS} layers.")
        while len(editor.blob_storage) >= MAX_DRAWINGS:
            editor.blob_storage.pop(next(iter(editor.blob_storage)))
        return accept(data)

    def check_and_preprocess(payload: Any) -> Any:
        sent = payload and editor.blob_storage.get(payload.id, payload)
        with _one_line_errors():
            if sent and len(sent.layers or ()) > MAX_LAYERS:
                raise UserError(f"The drawing has {len(sent.layers)} layers: give at most {MAX_LAYERS}.")
            return preprocess(payload)

    def check_and_convert(file: Any, flatten_on_white: bool = False) -> Any:
        if file is None:
            return None
        with _one_line_errors():
            is_content = isinstance(file, (bytes, bytearray, memoryview))
            if not is_content and Path(file.path).stat().st_size > MAX_UPLOAD_BYTES:
                raise UserError(f"The file is too large: give one of at most {MAX_UPLOAD_BYTES >> 20} MB.")
            check_upload(file if is_content else Path(file.path).read_bytes())
            try:
                return convert(file, flatten_on_white)
            except (OSError, SyntaxError, ValueError) as error:
                raise UserError(f"The file can't be read as a picture ({first_line(error)}).") from error

    editor.accept_blobs, editor.preprocess = check_and_accept, check_and_preprocess
    editor.convert_and_format_image = check_and_convert
    return editor
