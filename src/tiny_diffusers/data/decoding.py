"""Decodes the images of a source to one tensor, all of one size: uint8, or float32 with the values of the files."""

import contextlib
import io
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch

from ..errors import UserError
from ..progress import progress_bar
from .decoders import DecodingOptions, decode_image, read_array, read_content
from .folders import abbreviate, relative_name
from .images import ImageData, compute_fingerprint
from .sources import RefusedImageError, Source, open_image


_MAX_BROKEN_SHARE = 0.01
_MEMORY_SHARE = 0.25  # of the free memory, for the images of one dataset
_READ_BATCH, _DECODE_BATCH = 1024, 64  # rows per read, and per task of a thread


def decode_source(
    source: Source,
    resolution: tuple[int, int] | None,
    center_crop: bool,
    channels: int | None,
    conditioning_channels: int | None = None,
    value_range: tuple[float, float] | Literal["measured"] | None = None,
    scratch: Path | None = None,
) -> ImageData:
    """
    Decodes the selected rows of a source in parallel, keeps their order and skips broken images.

    Args:
        source ([`Source`]): The encoded images. Those with conditioning images are cropped at their center, so that both
            show the same.
        resolution (`tuple[int, int]`, *optional*): Height and width of the images.
        center_crop, channels, conditioning_channels, value_range: As in [`load_images`].
        scratch (`Path`, *optional*): Folder for images that do not fit in memory. Defaults to the system's temporary
            folder.

    Returns:
        [`ImageData`]: The decoded images, with notes on what was converted, resized and skipped.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If the images differ in size and `resolution` is None, if they do not have
            the channels, if all their values are equal, if more than 1% of them are broken, or if they fit neither in
            memory nor on the disk.
    """
    is_paired = source.read_conditioning is not None
    needs_floats = value_range is None and _holds_floats(source)
    keeps_values = value_range is not None or needs_floats
    options = DecodingOptions(resolution, center_crop or is_paired, channels, keeps_values, needs_floats=needs_floats)
    images, kept, notes = _decode_images(source, "images", options, scratch)
    if keeps_values:
        value_range = _limit_values(images, source.name, value_range, notes)
    conditioning_images = None
    if is_paired:
        pairs = replace(source, read=source.read_conditioning, rows=source.rows[kept])
        what = "conditioning images"
        options = DecodingOptions(resolution, center_crop=True, channels=conditioning_channels)
        conditioning_images, intact, notes_of_pairs = _decode_images(pairs, what, options, scratch)
        if len(intact) < len(kept):
            images, kept = images[intact], [kept[index] for index in intact]
        if conditioning_images.shape[2:] != images.shape[2:]:
            sizes = ["x".join(map(str, array.shape[2:])) for array in (conditioning_images, images)]
            raise UserError(
                f"The conditioning images of '{source.name}' have {sizes[0]} pixels, and its images {sizes[1]}: make them "
                "equally large, or set `resolution`."
            )
        notes += notes_of_pairs
        conditioning_images = torch.from_numpy(conditioning_images)
    images = torch.from_numpy(images)
    labels = None if source.labels is None else torch.from_numpy(source.labels[kept])
    conditions = None if source.conditions is None else torch.from_numpy(source.conditions[kept])
    data = ImageData(
        images=images,
        labels=labels,
        id2label=None if labels is None else dict(enumerate(source.class_names)),
        name=source.name,
        split=source.split,
        fingerprint="",
        notes=source.notes + notes,
        conditioning_images=conditioning_images,
        value_range=value_range,
        conditions=conditions,
        condition_names=source.condition_names,
    )
    return replace(data, fingerprint=compute_fingerprint(data))


def _holds_floats(source: Source) -> bool:
    """Checks that the first image that can be read has floating-point values, which have no fixed range."""
    for row in source.rows[: 1 + int(_MAX_BROKEN_SHARE * len(source.rows))].tolist():
        with contextlib.suppress(Exception):  # Pillow raises almost any exception for a damaged file
            (encoded,) = source.read([row])
            array = read_array(encoded)
            if array is not None:
                return array.dtype.kind == "f"
            return open_image(io.BytesIO(read_content(encoded))).mode == "F"
    return False


def _limit_values(
    images: np.ndarray, name: str, value_range: tuple[float, float] | Literal["measured"] | None, notes: list[str]
) -> tuple[float, float]:
    """Clips images to the given range, or measures theirs, and returns it. Adds to `notes` what was done."""
    parts = [slice(start, start + _READ_BATCH) for start in range(0, len(images), _READ_BATCH)]
    low = min((float(images[part].min()) for part in parts), default=0.0)
    high = max((float(images[part].max()) for part in parts), default=0.0)
    is_measured = value_range in (None, "measured")
    limits = (low, high) if is_measured else value_range
    darkest, brightest = np.clip([low, high], *limits)
    if darkest == brightest:
        within = "" if is_measured else f" in the value range, which {limits[0]:g} to {limits[1]:g} clips"
        raise UserError(f"All values of the images of '{name}' are {darkest:g}{within}: there is nothing to learn.")
    if is_measured:
        notes.append(f"values from {low:g} to {high:g}, kept as measured (value_range sets other limits)")
    elif low < limits[0] or high > limits[1]:
        count = sum(int(((images[part] < limits[0]) | (images[part] > limits[1])).sum()) for part in parts)
        share = f"{100 * count / images.size:.3g}%"
        notes.append(f"values from {low:g} to {high:g}, {share} of them clipped to {limits[0]:g} to {limits[1]:g}")
        for part in parts:
            images[part] = images[part].clip(*limits)
    return limits


def _decode_images(
    source: Source, what: str, options: DecodingOptions, scratch: Path | None
) -> tuple[np.ndarray, list[int], list[str]]:
    """Decodes one image of each row: (N, C, H, W). Also returns the positions of the N rows, and the notes."""
    name, total = source.name, len(source.rows)
    channels = options.channels
    dtype = np.float32 if options.keeps_values else np.uint8
    storage = None
    kept, broken = [], []  # positions in `source.rows`; names of files
    changes = Counter()
    wide = {}  # index in `kept` -> bits that the image needs
    for position, image, said in _decode_rows(source, options):
        if image is None:
            broken.append(said)
            continue
        if storage is None:
            size = image.shape[1:]
            depth = channels or (3 if len(image) == 1 else len(image))  # color may follow gray
            storage = _allocate((total, depth, *size), dtype, scratch)
        if len(image) not in ((1, 3) if depth == 3 else (depth,)):
            asked = "" if channels is None else f", and {channels} are asked for"
            raise UserError(
                f"Some {what} of '{name}' have {len(image)} channels{asked or f' and others {depth}'}: pictures are read as "
                "1 to 4, arrays and files of several pages as those that they have."
            )
        if image.shape[1:] != size:
            sizes = ", ".join("x".join(map(str, each)) for each in (size, image.shape[1:]))
            raise UserError(
                f"The {what} of '{name}' differ in size ({sizes}; height x width): resize them to one size, or set "
                "`resolution`."
            )
        storage[len(kept)] = image  # a gray image is repeated over the channels
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
        for index, (_, image, _) in zip(again, _decode_rows(rest, replace(options, bits=bits)), strict=True):
            storage[index] = image
        wider = "16 bits a pixel" if bits == 16 else f"{bits}-bit values in wider pixels"
        changes[f"had {wider}, {'kept' if bits == 8 else 'scaled to 8 (value_range keeps them)'}"] = len(wide)

    gray = changes.pop("gray", 0)
    if channels is None and gray == len(kept):
        images = _allocate((len(kept), 1, *size), dtype, scratch)
        images[:] = storage[: len(kept), :1]
    else:
        images = storage[: len(kept)]
        if gray and channels != 1:
            changes["were gray, converted to RGB"] = gray

    notes = [f"{count:,} of {len(kept):,} {what} {change}" for change, count in sorted(changes.items())]
    if broken:
        notes.append(f"broken files skipped, {len(broken):,}: {abbreviate(broken)}")
    return images, kept, notes


def _allocate(shape: tuple[int, ...], dtype: type = np.uint8, scratch: Path | None = None) -> np.ndarray:
    """Allocates an array, in a temporary file if it takes more than `_MEMORY_SHARE` of the free memory."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size <= _MEMORY_SHARE * psutil.virtual_memory().available:
        return np.empty(shape, dtype)
    directory = scratch if scratch is not None and os.access(scratch, os.W_OK) else Path(tempfile.gettempdir())
    # Checked beforehand, since writing to a mapped file on a full disk kills the process.
    if 2 * size > shutil.disk_usage(directory).free:
        raise UserError(
            f"{size / 1e9:.1f} GB of decoded images fit neither in memory nor, with their copy in the cache, in "
            f"'{directory}': lower `resolution` or `max_samples`, or set TINY_DIFFUSERS_CACHE to a folder with space."
        )
    return np.memmap(tempfile.TemporaryFile(dir=directory), dtype, "w+", shape=shape)


def _decode_rows(
    source: Source, options: DecodingOptions
) -> Iterator[tuple[int, np.ndarray | None, list[str | int] | str]]:
    """Yields each row's position, image (C, H, W) and changes; for a broken image its position, None and its name."""

    def decode(positions: range, encoded: list[dict | None]) -> list[tuple]:
        results = []
        for position, image in zip(positions, encoded, strict=True):
            try:
                results.append((position, *decode_image(image, options)))
            except UserError:
                raise
            except Exception as error:  # Pillow raises almost any exception for a damaged file
                path = image and image.get("path")
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
