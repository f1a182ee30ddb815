"""Every picture: grids of samples, denoising strips, loss curves."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Union

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .errors import UserError


if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Images = Union["torch.Tensor", np.ndarray, Sequence[Image.Image]]

# An animation's frames are no longer than this on their longer side, and no more in number: it is meant to be shared.
MAX_FRAME_SIDE = 512
MAX_FRAMES = 60
FRAME_SECONDS = 0.25
LAST_FRAME_SECONDS = 2.0

# A grid's longest side comes to between half of this and all of it, unless its images are too large to begin with.
MAX_GRID_SIDE = 1024
LABEL_FONT_SIZE = 18

# Each training loss's points, and its smoothed curve.
LOSS_COLOURS = (("#a9c7e8", "#1f5fa8"), ("#b9dcb4", "#2f7d32"))


def to_pil(images: Images) -> list[Image.Image]:
    """
    A batch as PIL images.

    Args:
        images (`torch.Tensor`, `np.ndarray` or `list[PIL.Image.Image]`):
            uint8 in [0, 255] or floats in [0, 1], of shape (N, C, H, W), (N, H, W, C) or (N, H, W), with C of 1 or 3.
            Where both readings are possible, the channels come first. PIL images of mode `L` are kept, others become
            `RGB`.

    Returns:
        `list[PIL.Image.Image]`: N images, `L` for one channel and `RGB` for three.

    Raises:
        `ValueError`: for another shape, or floats outside [0, 1].
    """
    if isinstance(images, (list, tuple)) and all(isinstance(image, Image.Image) for image in images):
        return [image if image.mode == "L" else image.convert("RGB") for image in images]
    if hasattr(images, "detach"):  # a tensor; numpy knows neither its device nor bfloat16
        images = images.detach().cpu()
        images = (images.float() if images.is_floating_point() else images).numpy()
    images = np.asarray(images)

    if images.ndim == 3:
        images = images[:, None]  # (N, H, W) -> (N, 1, H, W)
    if images.ndim == 4 and images.shape[1] in (1, 3):
        images = images.transpose(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"Images of shape {images.shape} can't be drawn: give (N, C, H, W), (N, H, W, C) or (N, H, W), C = 1 or 3."
        )
    if images.dtype != np.uint8:
        if not (images.min() >= -1e-3 and images.max() <= 1 + 1e-3):  # written so that NaN is refused too
            raise ValueError(
                f"Float images must lie in [0, 1], and these lie in [{images.min():.3g}, {images.max():.3g}]: "
                "those in [-1, 1] become drawable by `(images / 2 + 0.5).clip(0, 1)`."
            )
        images = (images.clip(0, 1) * 255).round().astype(np.uint8)
    return [Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image) for image in images]


def image_grid(
    images: Images,
    columns: int | None = None,
    scale: int | None = None,
    padding: int = 2,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
) -> Image.Image:
    """
    Images side by side, row after row, enlarged without smoothing so that every pixel is seen.

    Args:
        images (`torch.Tensor`, `np.ndarray` or `list[PIL.Image.Image]`):
            What [`to_pil`] takes, all of one size.
        columns (`int`, *optional*):
            Images in a row. Defaults to the least number that makes the grid no taller than it is wide in images.
        scale (`int`, *optional*):
            How many times each image is enlarged. Defaults to the most that keeps the grid's longest side within
            1024 pixels, and at least 1.
        padding (`int`, defaults to 2):
            Pixels of white between images and around them, after the enlargement.
        row_labels (`list[str]`, *optional*):
            A text to the left of each row.
        column_labels (`list[str]`, *optional*):
            A text above each column; an empty one leaves its column without.

    Returns:
        `PIL.Image.Image`: The grid, `L` where all images are grey and `RGB` otherwise.

    Raises:
        `ValueError`: for no images, images of different sizes, and a wrong number of labels.
    """
    images = to_pil(images)
    if not images:
        raise ValueError("A grid needs at least one image.")
    if len({image.size for image in images}) > 1:
        raise ValueError(f"A grid's images must be of one size; these are {sorted({i.size for i in images})}.")
    columns = math.ceil(math.sqrt(len(images))) if columns is None else min(columns, len(images))
    if columns < 1:
        raise ValueError(f"A grid needs at least one column, not {columns}.")
    rows = math.ceil(len(images) / columns)
    if row_labels is not None and len(row_labels) != rows:
        raise ValueError(f"{len(row_labels)} labels were given for {rows} rows.")
    if column_labels is not None and len(column_labels) != columns:
        raise ValueError(f"{len(column_labels)} labels were given for {columns} columns.")

    width, height = images[0].size
    if scale is None:
        room = min(
            (MAX_GRID_SIDE - padding * (columns + 1)) // (columns * width),
            (MAX_GRID_SIDE - padding * (rows + 1)) // (rows * height),
        )
        scale = max(1, room)
    width, height = width * scale, height * scale

    font = ImageFont.load_default(LABEL_FONT_SIZE) if row_labels or column_labels else None
    left = top = 0  # the room that labels take
    if row_labels is not None:
        left = math.ceil(max(font.getlength(label) for label in row_labels)) + LABEL_FONT_SIZE
    if column_labels is not None:
        top = 2 * LABEL_FONT_SIZE
    mode = "L" if all(image.mode == "L" for image in images) else "RGB"
    grid = Image.new(
        mode,
        (left + columns * (width + padding) + padding, top + rows * (height + padding) + padding),
        "white",
    )
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        corner = (left + padding + column * (width + padding), top + padding + row * (height + padding))
        grid.paste(image.resize((width, height), Image.Resampling.NEAREST), corner)

    draw = ImageDraw.Draw(grid)
    for row, label in enumerate(row_labels or ()):
        middle = top + padding + row * (height + padding) + height // 2
        draw.text((left - LABEL_FONT_SIZE // 2, middle), label, fill="black", font=font, anchor="rm")
    for column, label in enumerate(column_labels or ()):
        edge = left + padding + column * (width + padding)
        draw.text((edge, top - LABEL_FONT_SIZE // 2), label, fill="black", font=font, anchor="ls")
    return grid


def strip(
    states: Sequence[Images],
    row_labels: Sequence[str] | None = None,
    scale: int | None = None,
    padding: int = 2,
) -> Image.Image:
    """
    The way from noise to images: a row for each image of the batch, a column for each state.

    Args:
        states (`list` of batches):
            K batches of the same N images, in the order of time, each as [`to_pil`] takes them.
        row_labels (`list[str]`, *optional*):
            A text to the left of each of the N rows.
        scale (`int`, *optional*):
            As for [`image_grid`].
        padding (`int`, defaults to 2):
            As for [`image_grid`].

    Returns:
        `PIL.Image.Image`: N rows of K images.

    Raises:
        `ValueError`: for no states, and states of different numbers of images.
    """
    batches = [to_pil(state) for state in states]
    if not batches or len({len(batch) for batch in batches}) > 1:
        raise ValueError(f"A strip needs states of equally many images; these have {[len(b) for b in batches]}.")
    images = [image for row in zip(*batches, strict=True) for image in row]  # K batches of N -> N rows of K
    return image_grid(images, len(batches), scale, padding, row_labels)


def animation(pictures: Sequence[str | Path], output: str | Path) -> Path:
    """
    Shows pictures of one size one after another, such as a run's sample grids; the last one stays for longer.

    Args:
        pictures (`list[str]` or `list[Path]`):
            The pictures' files, in order. Of more than 60, as many are shown, evenly spaced, the last among them.
        output (`str` or `Path`):
            The GIF to write.

    Returns:
        `Path`: `output`.
    """
    shown = np.linspace(len(pictures) - 1, 0, min(len(pictures), MAX_FRAMES)).round().astype(int)[::-1]
    frames = []
    for i in shown:
        with Image.open(pictures[i]) as picture:
            picture.thumbnail((MAX_FRAME_SIDE, MAX_FRAME_SIDE), Image.Resampling.BOX)
            frames.append(picture.convert("L" if picture.mode == "L" else "RGB"))
    durations = [1000 * FRAME_SECONDS] * (len(frames) - 1) + [1000 * LAST_FRAME_SECONDS]
    frames[0].save(output, save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return Path(output)


def read_log(path: str | Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """
    The series of a training log.

    A line that was cut short when a run was killed is passed over, and where a resumed run has logged a step again the
    later value counts.

    Args:
        path (`str` or `Path`):
            A file of JSON lines such as `{"step": 10, "loss": 0.5, "lr": 1e-4}` or `{"step": 100, "val_loss": 0.4}`.

    Returns:
        `dict[str, tuple[np.ndarray, np.ndarray]]`: name -> (steps, values), steps increasing, finite values only.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no training log '{path}': give the train_log.jsonl of a run's output folder.")
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


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """The mean over a centred window of `window` values, over those of them that exist at the ends; it has no lag."""
    window = min(window, len(values))
    ones = np.ones(window)
    return np.convolve(values, ones, "same") / np.convolve(np.ones_like(values), ones, "same")


def loss_curves(log: str | Path, output: str | Path, title: str | None = None) -> Path:
    """
    Draws the training losses of a run (of each network, where there are several) and its validation loss over its steps,
    on a logarithmic axis.

    Args:
        log (`str` or `Path`):
            The run's `train_log.jsonl`, as [`read_log`] takes it.
        output (`str` or `Path`):
            The picture to write; its suffix names the format.
        title (`str`, *optional*):
            A line above the curves.

    Returns:
        `Path`: `output`.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: for a log that isn't there or has no loss in it.
    """
    series = read_log(log)
    losses = [name for name in series if name.endswith("loss") and name != "val_loss"]
    if not losses and "val_loss" not in series:
        raise UserError(f"'{log}' has no loss in it yet: nothing to draw.")

    figure, axes = _loss_axes(title)
    for name, (light, dark) in zip(losses, LOSS_COLOURS, strict=False):
        steps, values = series[name]
        if len(values) > 20:
            axes.plot(steps, values, color=light, linewidth=0.8)
            values = smooth(values, max(5, len(values) // 30))
        axes.plot(steps, values, color=dark, linewidth=1.8, label=name.removesuffix("loss").strip("_") or "training")
    if "val_loss" in series:
        steps, values = series["val_loss"]
        best = values.argmin()
        label = f"validation (lowest: {values[best]:.3g} at step {steps[best]:,})"
        axes.plot(steps, values, color="#d9622b", linewidth=1.8, marker="o", markersize=3.5, label=label)
    return _save_curves(figure, axes, output)


def compare_losses(logs: Mapping[str, str | Path], output: str | Path) -> Path:
    """
    Draws one loss of several runs over their steps: the validation loss where all have one, else the training loss.
    Losses of different kinds (an l2 and a Huber, diffusion and a VAE) lie on one axis, but say nothing of each other.

    Args:
        logs (`dict[str, str]`):
            A run's name in the legend -> its `train_log.jsonl`.
        output (`str` or `Path`):
            The picture to write; its suffix names the format.

    Returns:
        `Path`: `output`.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: for a log that isn't there, or runs that have no loss in common.
    """
    runs = {name: read_log(log) for name, log in logs.items()}
    key = next((key for key in ("val_loss", "loss") if all(key in series for series in runs.values())), None)
    if key is None:
        raise UserError(f"{', '.join(runs)} have no loss in common that could be drawn.")
    figure, axes = _loss_axes({"val_loss": "validation loss", "loss": "training loss"}[key])
    for name, series in runs.items():
        steps, values = series[key]
        if len(values) > 20:
            values = smooth(values, max(5, len(values) // 30))
        axes.plot(steps, values, linewidth=1.8, label=name)
    return _save_curves(figure, axes, output)


def _loss_axes(title: str | None) -> tuple["Figure", "Axes"]:
    # A Figure of its own draws by Agg: neither pyplot's global state nor a display is touched.
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save_curves(figure: "Figure", axes: "Axes", output: str | Path) -> Path:
    axes.legend(frameon=False)
    output = Path(output)
    figure.savefig(output)
    return output
