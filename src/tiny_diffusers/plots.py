"""All pictures: grids of images, denoising strips, animations and loss curves."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Union

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .errors import UserError
from .runs import read_log


if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes

Images = Union["torch.Tensor", np.ndarray, Sequence[Image.Image]]

# An animation has at most this many frames, with at most this many pixels on the longer side, to keep its file small.
MAX_FRAMES = 60
MAX_FRAME_SIDE = 512
FRAME_SECONDS = 0.25
LAST_FRAME_SECONDS = 2.0

# By default a grid's longer side is between half of this and all of it, unless its images are larger.
MAX_GRID_SIDE = 1024
LABEL_FONT_SIZE = 18

# For each training loss: the colour of its values and of its smoothed curve.
LOSS_COLOURS = (("#a9c7e8", "#1f5fa8"), ("#b9dcb4", "#2f7d32"))
VALIDATION_COLOUR = "#d9622b"


def to_pil(images: Images) -> list[Image.Image]:
    """
    Converts a batch to PIL images.

    Args:
        images (`torch.Tensor`, `np.ndarray` or `list[PIL.Image.Image]`):
            uint8 in [0, 255] or floats in [0, 1], of shape (N, C, H, W), (N, H, W, C) or (N, H, W), with C = 1 or 3.
            If both orders are possible, channels come first. PIL images of mode `L` are kept, others become `RGB`.

    Returns:
        `list[PIL.Image.Image]`: N images, `L` for one channel and `RGB` for three.

    Raises:
        `ValueError`: If the shape is another one, or if floats are NaN or outside [0, 1].
    """
    if isinstance(images, (list, tuple)) and all(isinstance(image, Image.Image) for image in images):
        return [image if image.mode == "L" else image.convert("RGB") for image in images]
    if hasattr(images, "detach"):  # a tensor, maybe on another device or in bfloat16, which numpy lacks
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
    images = to_uint8(images)
    return [Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image) for image in images]


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Converts floats in [0, 1] to uint8 and keeps uint8 images; raises a [`UserError`] for NaN and other values."""
    if images.dtype == np.uint8:
        return images
    low, high = images.min(), images.max()
    if np.isnan(low):
        raise UserError("The images have NaN pixels: an overflow in the model, or in whatever produced them.")
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise UserError(
            f"Images must be uint8, or floats in [0, 1]: these are {images.dtype} in [{low:.3g}, {high:.3g}]. Convert "
            "images in [-1, 1] with `(images / 2 + 0.5).clip(0, 1)`."
        )
    return (images.clip(0, 1) * 255).round().astype(np.uint8)


def image_grid(
    images: Images,
    columns: int | None = None,
    scale: int | None = None,
    padding: int = 2,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
) -> Image.Image:
    """
    Arranges images in rows, enlarged without smoothing so that each pixel is visible.

    Args:
        images (`torch.Tensor`, `np.ndarray` or `list[PIL.Image.Image]`): Images of one size, as [`to_pil`] takes.
        columns (`int`, *optional*): Images per row. Defaults to the smallest number with no more rows than columns.
        scale (`int`, *optional*): Factor by which each image is enlarged. By default it is the largest that keeps the
            grid within 1024 pixels on its longer side, and at least 1.
        padding (`int`, defaults to 2): White pixels between images and around them, after the enlargement.
        row_labels (`list[str]`, *optional*): A label to the left of each row.
        column_labels (`list[str]`, *optional*): A label above each column; it may be empty.

    Returns:
        `PIL.Image.Image`: The grid, `L` if all images are grey and `RGB` otherwise.

    Raises:
        `ValueError`: If there are no images, if their sizes differ, or if the number of labels is wrong.
    """
    images = to_pil(images)
    if not images:
        raise ValueError("A grid needs at least one image.")
    if len({image.size for image in images}) > 1:
        raise ValueError(f"A grid's images must be of one size, not {sorted({image.size for image in images})}.")
    columns = math.ceil(math.sqrt(len(images))) if columns is None else min(columns, len(images))
    if columns < 1:
        raise ValueError(f"A grid needs at least one column, not {columns}.")
    rows = math.ceil(len(images) / columns)
    for labels, count, kind in ((row_labels, rows, "rows"), (column_labels, columns, "columns")):
        if labels is not None and len(labels) != count:
            raise ValueError(f"{len(labels)} labels were given for {count} {kind}.")

    width, height = images[0].size
    if scale is None:
        sides = ((columns, width), (rows, height))
        scale = max(1, min((MAX_GRID_SIDE - padding * (count + 1)) // (count * side) for count, side in sides))
    width, height = width * scale, height * scale

    font = ImageFont.load_default(LABEL_FONT_SIZE) if row_labels or column_labels else None
    left = top = 0  # pixels taken by labels
    if row_labels is not None:
        left = math.ceil(max(font.getlength(label) for label in row_labels)) + LABEL_FONT_SIZE
    if column_labels is not None:
        top = 2 * LABEL_FONT_SIZE
    lefts = [left + padding + column * (width + padding) for column in range(columns + 1)]  # and the grid's width
    tops = [top + padding + row * (height + padding) for row in range(rows + 1)]  # and the grid's height

    mode = "L" if all(image.mode == "L" for image in images) else "RGB"
    grid = Image.new(mode, (lefts[-1], tops[-1]), "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        grid.paste(image.resize((width, height), Image.Resampling.NEAREST), (lefts[column], tops[row]))

    draw = ImageDraw.Draw(grid)
    for row, label in enumerate(row_labels or ()):
        middle = tops[row] + height // 2
        draw.text((left - LABEL_FONT_SIZE // 2, middle), label, fill="black", font=font, anchor="rm")
    for column, label in enumerate(column_labels or ()):
        draw.text((lefts[column], top - LABEL_FONT_SIZE // 2), label, fill="black", font=font, anchor="ls")
    return grid


def strip(
    states: Sequence[Images], row_labels: Sequence[str] | None = None, scale: int | None = None, padding: int = 2
) -> Image.Image:
    """
    Arranges the states of sampling, from noise to images: a row for each image of the batch, a column for each state.

    Args:
        states (`list` of batches): K batches of the same N images in order of time, each as [`to_pil`] takes.
        row_labels (`list[str]`, *optional*): A label to the left of each of the N rows.
        scale (`int`, *optional*): As in [`image_grid`].
        padding (`int`, defaults to 2): As in [`image_grid`].

    Returns:
        `PIL.Image.Image`: N rows of K images.

    Raises:
        `ValueError`: If there are no states, or if they differ in the number of images.
    """
    batches = [to_pil(state) for state in states]
    if not batches or len({len(batch) for batch in batches}) > 1:
        raise ValueError(f"A strip needs states of equally many images, not of {[len(batch) for batch in batches]}.")
    images = [image for row in zip(*batches, strict=True) for image in row]  # K batches of N -> N rows of K
    return image_grid(images, len(batches), scale, padding, row_labels)


def animation(pictures: Sequence[str | Path], output: str | Path) -> Path:
    """
    Saves pictures of one size, such as the sample grids of a run, as an animated GIF. The last one is shown longest.

    Args:
        pictures (`list[str]` or `list[Path]`): The picture files, in order. Of more than 60, only 60 evenly spaced
            ones are shown, with the first and the last.
        output (`str` or `Path`): The GIF to write.

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


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """
    Computes the means (N,) of values (N,) over a centred window of `window` values, so the result has no lag. At the
    ends the window is cut off.
    """
    window = min(window, len(values))
    ones = np.ones(window)
    return np.convolve(values, ones, "same") / np.convolve(np.ones_like(values), ones, "same")


def loss_curves(log: str | Path, output: str | Path, title: str | None = None) -> Path:
    """
    Plots the losses of a run over its steps on a logarithmic axis: the training loss (of each network, if there are
    several) and the validation loss.

    Args:
        log (`str` or `Path`): The run's `train_log.jsonl`, as read by [`~tiny_diffusers.runs.read_log`].
        output (`str` or `Path`): The picture to write; its suffix determines the format.
        title (`str`, *optional*): Title of the plot.

    Returns:
        `Path`: `output`.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If the log does not exist or has no loss.
    """
    series = read_log(log)
    losses = [name for name in series if name.endswith("loss") and name != "val_loss"]
    if not losses and "val_loss" not in series:
        raise UserError(f"'{log}' has no loss in it yet: there is nothing to plot.")

    axes = _loss_axes(title)
    for name, (light, dark) in zip(losses, LOSS_COLOURS, strict=False):
        steps, values = series[name]
        smoothed = _smooth_if_long(values)
        if smoothed is not values:
            axes.plot(steps, values, color=light, linewidth=0.8)
        label = name.removesuffix("loss").strip("_") or "training"
        axes.plot(steps, smoothed, color=dark, linewidth=1.8, label=label)
    if "val_loss" in series:
        steps, values = series["val_loss"]
        best = values.argmin()
        label = f"validation (lowest: {values[best]:.3g} at step {steps[best]:,})"
        axes.plot(steps, values, color=VALIDATION_COLOUR, linewidth=1.8, marker="o", markersize=3.5, label=label)
    return _save(axes, output)


def compare_losses(logs: Mapping[str, str | Path], output: str | Path) -> Path:
    """
    Plots one loss of several runs over their steps: the validation loss if all runs have it, else the training loss.

    All losses share one axis, but losses of different kinds (l2 and Huber, a diffusion model's and a VAE's) cannot be
    compared.

    Args:
        logs (`dict[str, str]`): A run's name in the legend -> its `train_log.jsonl`.
        output (`str` or `Path`): The picture to write; its suffix determines the format.

    Returns:
        `Path`: `output`.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If a log does not exist, or if the runs have no loss in common.
    """
    runs = {name: read_log(log) for name, log in logs.items()}
    titles = {"val_loss": "validation loss", "loss": "training loss"}
    key = next((key for key in titles if all(key in series for series in runs.values())), None)
    if key is None:
        raise UserError(f"{', '.join(runs)} have no loss in common: there is nothing to plot.")
    axes = _loss_axes(titles[key])
    for name, series in runs.items():
        steps, values = series[key]
        axes.plot(steps, _smooth_if_long(values), linewidth=1.8, label=name)
    return _save(axes, output)


def _smooth_if_long(values: np.ndarray) -> np.ndarray:
    """Smooths more than 20 values, and returns fewer as they are."""
    return smooth(values, max(5, len(values) // 30)) if len(values) > 20 else values


def _loss_axes(title: str | None) -> "Axes":
    # Unlike pyplot, a Figure created directly has no global state and needs no display.
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes = Figure(figsize=(8, 4.5), dpi=120, layout="constrained").subplots()
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _save(axes: "Axes", output: str | Path) -> Path:
    axes.legend(frameon=False)
    axes.figure.savefig(output)
    return Path(output)
