"""Decodes the images of a source to one uint8 tensor: 8-bit grey or RGB, all of one size."""

import io
import math
import os
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image, ImageOps

from ..errors import UserError
from ..progress import progress_bar
from .folders import abbreviate, relative_name
from .images import ImageData, compute_fingerprint
from .sources import RefusedImageError, Source, open_image


_MAX_BROKEN_SHARE = 0.01
_MEMORY_SHARE = 0.25  # of the free memory, for the images of one dataset
_BITS = (8, 10, 12, 14, 16)  # of cameras and scanners, whose values are stored in 16 bits
_READ_BATCH, _DECODE_BATCH = 1024, 64  # rows per read, and per task of a thread


def decode_source(
    source: Source,
    resolution: int | None,
    center_crop: bool,
    channels: int | None,
    conditioning_channels: int | None = None,
    scratch: Path | None = None,
) -> ImageData:
    """
    Decodes the selected rows of a source in parallel, keeps their order and skips broken images.

    Args:
        source ([`Source`]): The encoded images. Those with conditioning images are cropped at their centre, so that both
            show the same.
        resolution, center_crop, channels, conditioning_channels: As in [`load_images`].
        scratch (`Path`, *optional*): Folder for images that do not fit in memory. Defaults to the system's temporary
            folder.

    Returns:
        [`ImageData`]: The decoded images, with notes on what was converted, resized and skipped.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If the images are not square or differ in size and `resolution` is None,
            if more than 1 % of them are broken, or if they fit neither in memory nor on the disk.
    """
    is_paired = source.read_conditioning is not None
    options = (resolution, center_crop or is_paired)
    images, kept, notes = _decode_images(source, "images", *options, channels, scratch)
    conditioning_images = None
    if is_paired:
        pairs = replace(source, read=source.read_conditioning, rows=source.rows[kept])
        what = "conditioning images"
        options = (*options, conditioning_channels)
        conditioning_images, intact, notes_of_pairs = _decode_images(pairs, what, *options, scratch)
        if len(intact) < len(kept):
            images, kept = images[intact], [kept[index] for index in intact]
        if conditioning_images.shape[2:] != images.shape[2:]:
            sizes = [f"{array.shape[3]}x{array.shape[2]}" for array in (conditioning_images, images)]
            raise UserError(
                f"The conditioning images of '{source.name}' have {sizes[0]} pixels, and its images {sizes[1]}: make them "
                "equally large, or set `resolution`."
            )
        notes += notes_of_pairs
        conditioning_images = torch.from_numpy(conditioning_images)
    images = torch.from_numpy(images)
    labels = None if source.labels is None else torch.from_numpy(source.labels[kept])
    conditions = None if source.conditions is None else torch.from_numpy(source.conditions[kept])
    return ImageData(
        images=images,
        labels=labels,
        id2label=None if labels is None else dict(enumerate(source.class_names)),
        name=source.name,
        split=source.split,
        fingerprint=compute_fingerprint(images, labels, conditioning_images, conditions, source.condition_names),
        notes=source.notes + notes,
        conditioning_images=conditioning_images,
        conditions=conditions,
        condition_names=source.condition_names,
    )


def _decode_images(
    source: Source, what: str, resolution: int | None, center_crop: bool, channels: int | None, scratch: Path | None
) -> tuple[np.ndarray, list[int], list[str]]:
    """Decodes one image of each row: uint8 (N, C, H, W). Also returns the positions of the N rows, and the notes."""
    name, total = source.name, len(source.rows)
    storage = None
    kept, broken = [], []  # positions in `source.rows`; names of files
    changes = Counter()
    wide = {}  # index in `kept` -> bits that the image needs
    options = (resolution, center_crop, channels)
    for position, image, said in _decode_rows(source, *options, 8):
        if image is None:
            broken.append(said)
            continue
        height, width = image.shape[1:]
        if storage is None:
            if height != width:
                raise UserError(
                    f"The {what} of '{name}' are not square ({width}x{height}): make them square, or set `resolution`."
                )
            side = width
            storage = _allocate((total, channels or 3, side, side), scratch)
        if (height, width) != (side, side):
            raise UserError(
                f"The {what} of '{name}' differ in size ({side}x{side}, {width}x{height}): resize them to one size, "
                "or set `resolution`."
            )
        storage[len(kept)] = image  # a grey image is repeated over the channels
        wide |= {len(kept): change for change in said if isinstance(change, int)}
        kept.append(position)
        changes.update(change for change in said if isinstance(change, str))

    if len(broken) > _MAX_BROKEN_SHARE * total:
        raise UserError(
            f"{len(broken):,} of {total:,} {what} of '{name}' are broken, more than {_MAX_BROKEN_SHARE:.0%}: "
            f"{abbreviate(broken)}. Repair or remove them."
        )

    # One scale for the whole set: 12-bit values in 16-bit pixels would be nearly black if scaled by 65535.
    if wide:
        bits = max(wide.values())
        again = [index for index, needed in wide.items() if needed < bits]
        rest = replace(source, rows=source.rows[[kept[index] for index in again]])
        for index, (_, image, _) in zip(again, _decode_rows(rest, *options, bits), strict=True):
            storage[index] = image
        said = f"had {bits}-bit values in wider pixels, {'kept' if bits == 8 else 'scaled to 8'}"
        changes["had 16 bits a pixel, scaled to 8" if bits == 16 else said] = len(wide)

    grey = changes.pop("grey", 0)
    if channels is None and grey == len(kept):
        images = _allocate((len(kept), 1, side, side), scratch)
        images[:] = storage[: len(kept), :1]
    else:
        images = storage[: len(kept)]
        if grey and channels != 1:
            changes["were grey, converted to RGB"] = grey

    notes = [f"{count:,} of {len(kept):,} {what} {change}" for change, count in sorted(changes.items())]
    if broken:
        notes.append(f"broken files skipped, {len(broken):,}: {abbreviate(broken)}")
    return images, kept, notes


def _allocate(shape: tuple[int, ...], scratch: Path | None = None) -> np.ndarray:
    """Allocates a uint8 array, in a temporary file if it takes more than `_MEMORY_SHARE` of the free memory."""
    size = math.prod(shape)
    if size <= _MEMORY_SHARE * psutil.virtual_memory().available:
        return np.empty(shape, np.uint8)
    directory = scratch if scratch is not None and os.access(scratch, os.W_OK) else Path(tempfile.gettempdir())
    # Checked beforehand, since writing to a mapped file on a full disk kills the process.
    if 2 * size > shutil.disk_usage(directory).free:
        raise UserError(
            f"{size / 1e9:.1f} GB of decoded images fit neither in memory nor, with their copy in the cache, in "
            f"'{directory}': lower `resolution` or `max_samples`, or set TINY_DIFFUSERS_CACHE to a folder with space."
        )
    return np.memmap(tempfile.TemporaryFile(dir=directory), np.uint8, "w+", shape=shape)


def _decode_rows(source: Source, *options) -> Iterator[tuple[int, np.ndarray | None, list[str] | str]]:
    """Yields each row's position, image (C, H, W) and changes; for a broken image its position, None and its name."""

    def decode(positions: range, encoded: list[dict | None]) -> list[tuple]:
        results = []
        for position, image in zip(positions, encoded, strict=True):
            try:
                results.append((position, *_decode_image(image, *options)))
            except Exception as error:  # Pillow raises almost any exception for a damaged file
                path = image and image["path"]
                name = relative_name(Path(str(path)), source.folder) if path else f"row {source.rows[position]}"
                results.append((position, None, f"{name} ({error})" if isinstance(error, RefusedImageError) else name))
        return results

    total = len(source.rows)
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        progress_bar(total=total, desc=f"Decoding {source.name}", unit=" images", delay=2) as progress,
    ):
        for start in range(0, total, _READ_BATCH):
            positions = range(start, min(start + _READ_BATCH, total))
            encoded = source.read(source.rows[positions].tolist())
            chunks = range(0, len(positions), _DECODE_BATCH)
            parts = [(positions[i : i + _DECODE_BATCH], encoded[i : i + _DECODE_BATCH]) for i in chunks]
            for results in pool.map(decode, *zip(*parts, strict=True)):
                yield from results
                progress.update(len(results))


def _decode_image(
    encoded: dict, resolution: int | None, center_crop: bool, channels: int | None, bits: int
) -> tuple[np.ndarray, list[str | int]]:
    """
    Decodes an image to uint8 (1 or 3, H, W). Also returns what was changed: for values of more than 8 bits, or in
    wider pixels, the number of bits that they need. They are scaled by the larger of this and `bits`.
    """
    content, path = encoded["bytes"], encoded["path"]
    if content is None:
        content = (Path(path) if isinstance(path, str) else path).read_bytes()
    image = open_image(io.BytesIO(content))
    try:
        has_frames = getattr(image, "n_frames", 1) > 1
    except Exception:  # a frame beyond the first is damaged
        image, has_frames = open_image(io.BytesIO(content)), True
    image, changes = _to_grey_or_rgb(ImageOps.exif_transpose(image), bits)
    if has_frames:
        changes.append("have several frames or pages: the first was taken")
    if channels == 1 and image.mode == "RGB":
        image = image.convert("L")
        changes.append("were in colour, converted to grey")

    if resolution is not None:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        if image.width != image.height and center_crop:
            changes.append("were not square: their centre was taken")
        elif image.width != image.height:
            position = zlib.crc32(content) / 2**32  # pseudo-random, but depends only on this file's bytes
            left, top = int(position * (image.width - side + 1)), int(position * (image.height - side + 1))
            changes.append("were not square: a square at a random position was taken (center_crop takes the centre)")
        if side != resolution:
            changes.append(f"were {'enlarged' if side < resolution else 'reduced'} to {resolution}x{resolution}")
        box = (left, top, left + side, top + side)
        image = image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box)

    if image.mode == "L":
        return np.asarray(image)[None], [*changes, "grey"]
    return np.asarray(image).transpose(2, 0, 1), changes  # (H, W, C) -> (C, H, W)


def read_picture(path: Path) -> Image.Image:
    """Reads a picture as training images are read: upright, "L" or "RGB", laid on white, and of 8 bits."""
    return _to_grey_or_rgb(ImageOps.exif_transpose(open_image(io.BytesIO(path.read_bytes()))), 8)[0]


def _to_grey_or_rgb(image: Image.Image, bits: int) -> tuple[Image.Image, list[str | int]]:
    """Converts an image of any mode to "L" or "RGB". Also returns what was changed, as [`_decode_image`] does."""
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image, []
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise RefusedImageError("integers of more than 16 bits")
        needed = next(each for each in _BITS if values.max() < 2**each)
        levels = np.rint(values * 255 / (2 ** max(bits, needed) - 1)).astype(np.uint8)
        return Image.fromarray(levels), [needed]
    if image.mode == "F":
        raise RefusedImageError("floating-point values have no fixed range")

    grey = image.mode in ("1", "L", "LA", "La")
    changes = []
    if image.mode == "P":
        changes.append("had a palette, converted to RGB")
    elif not grey and image.mode not in ("RGB", "RGBA", "RGBa"):
        changes.append(f"were {image.mode}, converted to RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)  # equals `alpha_composite`, in a third of its memory
        image = white
        changes.append("had an alpha channel, laid on white")
    return image.convert("L" if grey else "RGB"), changes
