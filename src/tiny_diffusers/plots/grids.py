"""Pictures of images: grids, strips with captions, and animations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Union

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..errors import UserError, printable


if TYPE_CHECKING:
    import torch

Images = Union["torch.Tensor", np.ndarray, Sequence[Image.Image]]

# An animation has at most this many frames, with at most this many pixels on the longer side, to keep its file small.
MAX_FRAMES = 60
MAX_FRAME_SIDE = 512
FRAME_SECONDS = 0.25
LAST_FRAME_SECONDS = 2.0

# By default a grid's longer side is between half of this and all of it, unless its images are larger.
MAX_GRID_SIDE = 1024
LABEL_FONT_SIZE = 18
CAPTION_FONT_SIZE = 13
MAX_LABEL = 40  # characters of a label of a captioned strip
MAX_STRIP_TILE = 128  # pixels that the longer side of an image in a captioned strip is enlarged to


def to_pil(images: Images) -> list[Image.Image]:
    """
    Converts a batch to PIL images.

    Args:
        images (`torch.Tensor`, `np.ndarray` or `list[PIL.Image.Image]`):
            uint8 in [0, 255] or floats in [0, 1], of shape (N, C, H, W), (N, H, W, C) with C = 1 or 3, or (N, H, W).
            If both orders are possible, channels come first. PIL images of mode `L` and `RGBA` are kept, others become
            `RGB`.

    Returns:
        `list[PIL.Image.Image]`: N images, `L` for one channel, `RGB` for three and `RGBA` for four; else the channels
        of each side by side, `L`.

    Raises:
        `ValueError`: If the shape is another one, or if floats are NaN or outside [0, 1].
    """
    if isinstance(images, (list, tuple)) and all(isinstance(image, Image.Image) for image in images):
        return [image if image.mode in ("L", "RGBA") else image.convert("RGB") for image in images]
    if hasattr(images, "detach"):  # a tensor, maybe on another device or in bfloat16, which numpy lacks
        images = images.detach().cpu()
        images = (images.float() if images.is_floating_point() else images).numpy()
    images = np.asarray(images)

    if images.ndim == 3:
        images = images[:, None]  # (N, H, W) -> (N, 1, H, W)
    if images.ndim != 4:
        raise ValueError(
            f"Images of shape {images.shape} can't be drawn: give (N, C, H, W), (N, H, W, C) or (N, H, W)."
        )
    if images.shape[1] in (1, 3) or images.shape[-1] not in (1, 3):
        *others, last = images.shape[1:]
        if (
            images.shape[1] not in (1, 3)
            and last < min(others)
            and (others[0] == others[1] or 2 * last <= min(others))
        ):
            raise ValueError(
                f"Images of shape {images.shape} look like (N, H, W, C): give {last} channels first, as (N, C, H, W)."
            )
        images = images.transpose(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)
    from ..pipelines.pipeline_tiny import to_picture  # here, as it takes torch

    return [to_picture(image) for image in to_uint8(images)]


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


def pad_to_one_size(pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """Pads pictures with white on the right and below, to the largest width and the largest height of all."""
    width, height = (max(sides) for sides in zip(*(picture.size for picture in pictures), strict=True))
    padded = [Image.new(picture.mode, (width, height), "white") for picture in pictures]
    for canvas, picture in zip(padded, pictures, strict=True):
        canvas.paste(picture)
    return padded


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
        `PIL.Image.Image`: The grid, `L` if all images are gray, `RGBA` if any is `RGBA`, else `RGB`.

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

    mode = _common_mode(images)
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


def _common_mode(images: Sequence[Image.Image]) -> str:
    """Returns the mode of a picture that shows all images."""
    modes = {image.mode for image in images}
    return "L" if modes == {"L"} else "RGBA" if "RGBA" in modes else "RGB"


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


@dataclass
class Strip:
    """
    Row of a picture of [`captioned_strips`].

    Args:
        images (batch): Images of one size, as [`to_pil`] takes.
        captions (`list[str]`): The caption under each image; it may be empty, or shorter than the images.
        label (`str`): The label to the left of the row.
        heading (`str`): The heading above the row.
    """

    images: Images
    captions: Sequence[str] = ()
    label: str = ""
    heading: str = ""


def captioned_strips(strips: Sequence[Strip], padding: int = 2) -> Image.Image:
    """
    Draws strips of images below one another, with a caption under each image. They may differ in length.

    Args:
        strips (`list[Strip]`): The strips, from top to bottom.
        padding (`int`, defaults to 2): White pixels between images and around them.

    Returns:
        `PIL.Image.Image`: The picture, `L` if all images are gray, `RGBA` if any is `RGBA`, else `RGB`.

    Raises:
        `ValueError`: If there are no images, or if their sizes differ.
    """
    rows = [to_pil(each.images) for each in strips]
    sizes = {image.size for row in rows for image in row}
    if len(sizes) != 1:
        raise ValueError(f"The images of a picture must be of one size, not {sorted(sizes)}.")
    columns = max(map(len, rows))
    ((width, height),) = sizes
    room = min(MAX_STRIP_TILE, MAX_GRID_SIDE // columns - padding)
    scale = max(1, room // max(width, height))
    width, height = width * scale, height * scale

    label_font, caption_font = ImageFont.load_default(LABEL_FONT_SIZE), ImageFont.load_default(CAPTION_FONT_SIZE)
    labels, headings = [_one_line(each.label) for each in strips], [_one_line(each.heading) for each in strips]
    captions = [list(map(_one_line, each.captions)) for each in strips]
    longest_label, longest_heading = (max(map(label_font.getlength, texts)) for texts in (labels, headings))
    left = padding + (math.ceil(longest_label) + LABEL_FONT_SIZE if longest_label else 0)
    tops, bottom = [], padding
    for heading, under in zip(headings, captions, strict=True):
        tops.append(bottom + (2 * LABEL_FONT_SIZE if heading else 0))
        bottom = tops[-1] + height + (2 * CAPTION_FONT_SIZE if under else padding)

    total_width = left + max(columns * (width + padding), math.ceil(longest_heading) + padding)
    mode = _common_mode([image for row in rows for image in row])
    picture = Image.new(mode, (total_width, bottom), "white")
    draw = ImageDraw.Draw(picture)
    for row, top, label, heading, under in zip(rows, tops, labels, headings, captions, strict=True):
        draw.text((left, top - LABEL_FONT_SIZE // 2), heading, fill="black", font=label_font, anchor="ls")
        middle = (left - padding - LABEL_FONT_SIZE // 2, top + height // 2)
        draw.text(middle, label, fill="black", font=label_font, anchor="rm")
        lefts = [left + column * (width + padding) for column in range(len(row))]
        for image, x in zip(row, lefts, strict=True):
            picture.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, top))
        widest = max(map(caption_font.getlength, under), default=0)
        every = max(1, math.ceil((widest + padding) / (width + padding)))  # so that no two captions overlap
        for x, caption in list(zip(lefts, under, strict=False))[::every]:
            position = (x + width // 2, top + height + CAPTION_FONT_SIZE // 4)
            draw.text(position, caption, fill="black", font=caption_font, anchor="ma")
    return picture


def _one_line(text: str) -> str:
    """Returns text, which may be a stranger's, as one short line."""
    text = " ".join(printable(text).split())
    return text if len(text) <= MAX_LABEL else text[: MAX_LABEL - 3] + "..."


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
