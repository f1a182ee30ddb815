"""
Images to measure: samples of a pipeline, a folder, or a baseline. They are uint8, or float32 in [0, 255] if their values
are not of 8 bits.

Long computations run in batches, which the processes share; they write to one file and mark each row that is done. So
results are independent of the number of processes, and a stopped run resumes, with any batch size.
"""

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from diffusers import DiffusionPipeline
from filelock import FileLock
from numpy.lib.format import open_memmap
from PIL import Image

from .. import plots
from ..data import ImageData, denormalize, load_images, normalize
from ..data.images import spell_values
from ..errors import UserError
from ..files import find_damage, publish
from ..pipelines.pipeline_tiny import image_generators
from ..pipelines.pipeline_tiny_conditions import FarValueWarning
from ..progress import progress_bar


IMAGE_TYPES = (ImageData, np.ndarray, torch.Tensor, list, tuple)  # are measured as they are, in place of a pipeline
BLUR_SIGMA = 1.0  # pixels, of the blurred baseline
_ROWS = 4096  # images read at a time


def fill(
    entry: Path,
    shape: tuple[int, ...],
    dtype: type,
    compute: Callable[[int, int], np.ndarray],
    *,
    batch_size: int,
    state: PartialState,
    desc: str,
) -> np.ndarray:
    """
    Computes an array on disk, batch by batch, in all processes together. Rows of an earlier run are kept.

    Args:
        entry (`Path`): Folder of the array in the cache, on a disk that all processes see. It appears once the array is
            complete, sealed with its checksum. A damaged one is computed again.
        shape (`tuple[int, ...]`): Shape of the array, rows first.
        dtype (`type`): Dtype of the array.
        compute (`Callable`): `compute(start, stop)` returns these rows, and depends on nothing else.
        batch_size (`int`): Number of rows computed at a time.
        state (`PartialState`): The processes.
        desc (`str`): Label of the progress bar.

    Returns:
        `np.ndarray`: The array, memory-mapped. What is written to it stays in memory, and torch can take it.
    """
    file, part, marks = entry / "array.npy", entry.with_suffix(".part"), entry.with_suffix(".done")
    with contextlib.ExitStack() as stack:
        missing = False
        if state.is_main_process:
            entry.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(entry.with_suffix(".lock")))  # another evaluation may compute the same
            missing = find_damage(entry) is not None or not _fits(file, shape, dtype)
            if missing and not (_fits(part, shape, dtype) and _fits(marks, shape[:1], np.bool_)):
                marks.unlink(missing_ok=True)
                open_memmap(part, "w+", dtype, shape).flush()
                open_memmap(marks, "w+", np.bool_, shape[:1]).flush()  # last: if it exists, both do
        (missing,) = broadcast_object_list([missing])
        if missing:
            rows, done = open_memmap(part, "r+"), open_memmap(marks, "r+")
            slices = [slice(start, min(start + batch_size, shape[0])) for start in range(0, shape[0], batch_size)]
            mine = [s for s in slices[state.process_index :: state.num_processes] if not done[s].all()]
            for s in progress_bar(mine, desc=desc, unit=" batches", delay=2, disable=not state.is_main_process):
                rows[s] = compute(s.start, s.stop)
                rows.flush()
                done[s] = True
            done.flush()
            state.wait_for_everyone()
            if state.is_main_process:
                publish(entry, lambda staging: os.replace(part, staging / file.name))
                marks.unlink()
            state.wait_for_everyone()
    return np.load(file, mmap_mode="c")


def _fits(path: Path, shape: tuple[int, ...], dtype: type) -> bool:
    """Checks that a file holds an array of this shape and dtype."""
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return array.shape == tuple(shape) and array.dtype == dtype


# Samples and folders


def sample(
    pipe: DiffusionPipeline,
    shape: tuple[int, int, int],
    dtype: type,
    entry: Path,
    *,
    num_images: int,
    seed: int,
    batch_size: int,
    options: dict,
    state: PartialState,
    class_labels: np.ndarray | None = None,
    conditioning_images: Callable[[int, int], torch.Tensor] | None = None,
    conditions: torch.Tensor | None = None,
    real: np.ndarray | None = None,
) -> np.ndarray:
    """
    Draws images from a pipeline. Image i has its own generator with the seed `seed + i`, so it is independent of batch
    size and process count.

    Args:
        pipe (`DiffusionPipeline`): Called with `output_type="pt"`.
        shape (`tuple[int, int, int]`): (C, H, W) of the reference, which the images must have.
        dtype (`type`): `np.uint8`, or `np.float32` for images that are not of 8 bits.
        entry (`Path`): Folder in the cache that keeps the images.
        num_images (`int`): N.
        seed (`int`): Seed of the first image.
        batch_size (`int`): Number of images drawn at a time.
        options (`dict`): Further arguments of the call.
        state (`PartialState`): The processes.
        class_labels (`np.ndarray` of shape `(N,)`, *optional*): The class of each image.
        conditioning_images (`Callable`, *optional*): `conditioning_images(start, stop)` returns those of these images,
            (stop - start, K, h, w) in [0, 1].
        conditions (`torch.Tensor` of shape `(N, D)`, *optional*): The conditions of each image, in the data's units.
        real (`np.ndarray` of shape `(N, C, H, W)`, *optional*): Images in [0, 255] to reconstruct, instead of sampling.

    Returns:
        `np.ndarray` of shape `(N, C, H, W)`: The images in [0, 255], memory-mapped.
    """
    pipe.set_progress_bar_config(disable=True)

    def draw(start: int, stop: int) -> np.ndarray:
        generator = image_generators(seed, stop - start, first=start)
        given = {} if class_labels is None else {"class_labels": class_labels[start:stop].tolist()}
        if conditioning_images is not None:
            given["image"] = conditioning_images(start, stop)
        if conditions is not None:
            given["conditions"] = conditions[start:stop]
        options_of_images = {"generator": generator, "output_type": "pt", **given, **options}
        with warnings.catch_warnings():  # far values are counted in the report
            warnings.simplefilter("ignore", FarValueWarning)
            if real is None:
                output = pipe(batch_size=stop - start, **options_of_images)
            else:
                output = pipe.reconstruct(torch.from_numpy(real[start:stop]) / 255, **options_of_images)
        images = output.images.float().cpu()
        images = to_uint8(images) if dtype == np.uint8 else (255 * images).numpy()
        check_shape(images.shape[1:], shape, "The model's images")
        return images

    return fill(entry, (num_images, *shape), dtype, draw, batch_size=batch_size, state=state, desc="Sampling")


def read_folder(
    folder: str | Path, channels: int | None = None, value_range: tuple[float, float] | None = None
) -> ImageData:
    """
    Reads a folder of any model's images, pictures or .npy files. Sub-folders, if there are any, are classes.

    Args:
        folder (`str` or `Path`): The folder.
        channels (`int`, *optional*): Channels of the reference, as in [`~tiny_diffusers.data.load_images`].
        value_range (`tuple[float, float]`, *optional*): Values of the reference, as in
            [`~tiny_diffusers.data.load_images`].

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If there are no images, their sizes differ, gray and color are mixed, or
            any file cannot be read, as metrics of a part of the images would mislead.
    """
    if not Path(folder).is_dir():
        raise UserError(f"There is no folder '{folder}': give a folder of images.")
    data = load_images(train_data_dir=folder, channels=channels, value_range=value_range)
    for note in data.notes:
        if note.startswith("broken files"):
            raise UserError(f"'{folder}' has images that cannot be read ({note}): repair or remove them.")
        if "were gray" in note:
            raise UserError(f"'{folder}' mixes gray and color images ({note}): separate them, or convert them.")
    return data


def as_levels(data: ImageData) -> ImageData:
    """Scales images of a value range to float32 in [0, 255], and notes it; 8-bit images stay as they are."""
    if data.value_range is None:
        return data
    images = ((normalize(data.images, data.value_range) + 1) * 127.5).clamp_(0, 255)  # rounding may leave the range
    note = f"{spell_values(data.value_range)} measured as 0 to 255, not rounded"
    return replace(data, images=images, value_range=None, notes=[*data.notes, note])


def round_to_8_bits(data: ImageData) -> ImageData:
    """Scales images of a value range to uint8."""
    return replace(data, images=denormalize(normalize(data.images, data.value_range)), value_range=None)


def as_pictures(images: np.ndarray) -> np.ndarray:
    """Rounds images in [0, 255] to uint8, to be shown."""
    return images.round().astype(np.uint8)


def to_uint8(images: np.ndarray | torch.Tensor | Sequence[Image.Image]) -> np.ndarray:
    """
    Converts images (N, C, H, W) to uint8; uint8 images stay as they are, floats must be in [0, 1]. PIL images become
    gray if all of them are, else RGB.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If the shape is wrong, sizes differ, or values are NaN or out of range.
    """
    if isinstance(images, (list, tuple)):
        images = _stack(images)
    elif isinstance(images, torch.Tensor):
        images = images.detach().cpu()
        images = (images.float() if images.is_floating_point() else images).numpy()  # NumPy has no bfloat16
    images = np.asarray(images)
    if images.ndim != 4 or (images.shape[1] not in (1, 3) and images.shape[3] in (1, 3)):
        raise UserError(f"Images must have the shape (N, C, H, W), channels first: these have {images.shape}.")
    return plots.to_uint8(images)


def _stack(images: Sequence[Image.Image]) -> np.ndarray:
    """Stacks PIL images of one size: uint8 (N, C, H, W)."""
    kinds = sorted({type(image).__name__ for image in images if not isinstance(image, Image.Image)})
    sizes = sorted({image.size for image in images if isinstance(image, Image.Image)})
    if kinds or len(sizes) != 1:
        given = f"items of type {', '.join(kinds)}" if kinds else f"images of sizes {sizes}"
        raise UserError(f"A list of images must hold PIL images of one size: this one has {given}.")
    mode = "L" if all(image.mode in ("1", "L") for image in images) else "RGB"
    pixels = np.stack([np.asarray(image.convert(mode)) for image in images])  # (N, H, W) or (N, H, W, 3)
    return pixels[:, None] if mode == "L" else pixels.transpose(0, 3, 1, 2)


def check(images: np.ndarray, shape: tuple[int, int, int], what: str) -> None:
    """Checks that metrics are defined for images: of the reference's shape, at least two, and not all identical."""
    check_shape(images.shape[1:], shape, what)
    if len(images) < 2:
        raise UserError(f"{what} are {len(images)}: metrics need at least two.")
    if all((images[i : i + _ROWS] == images[0]).all() for i in range(0, len(images), _ROWS)):
        raise UserError(f"{what} are all identical: {len(images):,} copies of one image have no distribution.")


def check_shape(given: tuple[int, int, int], shape: tuple[int, int, int], what: str) -> None:
    """Checks that images of the shape `given` have the reference's (C, H, W)."""

    def describe(channels: int, height: int, width: int) -> str:
        kind = {1: "gray", 3: "color"}.get(channels, f"of {channels} channels")
        return f"{height}x{width} {kind}"

    if given != shape:
        raise UserError(f"{what} are {describe(*given)} and the reference's are {describe(*shape)}: they must agree.")


def order_of(images: np.ndarray) -> np.ndarray:
    """
    Returns the positions that sort the images by their hashes. This order is random with respect to their content, and
    independent of the order that they come in.
    """
    return np.argsort(_hashes(images), kind="stable")


def count_shared(images: np.ndarray, others: np.ndarray) -> int:
    """Returns how many of the images, pixel by pixel, are among others too."""
    return int(np.isin(_hashes(images), _hashes(others)).sum())


def _hashes(images: np.ndarray) -> np.ndarray:
    """Returns a hash of each image: (N,)."""
    digests = b"".join(hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in images)
    return np.frombuffer(digests, dtype=">u8")


def digest(*key: object) -> str:
    """Returns the name of a cache entry: a hash of everything that its values depend on."""
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:32]


def fingerprint(images: np.ndarray) -> str:
    """Returns the sha256 of the images' shape and pixels."""
    sha256 = hashlib.sha256(repr(images.shape).encode())
    for start in range(0, len(images), _ROWS):
        sha256.update(np.ascontiguousarray(images[start : start + _ROWS]))
    return sha256.hexdigest()


# Baselines, which give the metrics a scale. Each takes real images and their order, and returns a function that draws
# the images from `start` to `stop`.


def noise(images: np.ndarray, order: np.ndarray) -> Callable[[int, int], np.ndarray]:
    """Draws every pixel uniformly from [0, 255]."""
    return lambda start, stop: _rng(start).integers(0, 256, (stop - start, *images.shape[1:]), dtype=np.uint8)


def pixel_gaussian(images: np.ndarray, order: np.ndarray) -> Callable[[int, int], np.ndarray]:
    """Draws each pixel independently from a Gaussian with that pixel's mean and variance over the real images."""
    total, squares = np.zeros(images.shape[1:]), np.zeros(images.shape[1:])
    for start in range(0, len(images), _ROWS):
        part = images[start : start + _ROWS].astype(np.float64)
        total += part.sum(0)
        squares += (part**2).sum(0)
    mean = total / len(images)
    std = np.sqrt(np.maximum(squares / len(images) - mean**2, 0))

    def draw(start: int, stop: int) -> np.ndarray:
        return _clip(mean + std * _rng(start).standard_normal((stop - start, *images.shape[1:])), images.dtype)

    return draw


def blurred(images: np.ndarray, order: np.ndarray) -> Callable[[int, int], np.ndarray]:
    """Blurs real images with a Gaussian filter of `BLUR_SIGMA` pixels."""
    from scipy.ndimage import gaussian_filter

    sigma = (0, 0, BLUR_SIGMA, BLUR_SIGMA)

    def draw(start: int, stop: int) -> np.ndarray:
        return _clip(gaussian_filter(images[order[start:stop]].astype(np.float32), sigma), images.dtype)

    return draw


BASELINES = {"noise": noise, "pixel_gaussian": pixel_gaussian, "blurred": blurred}


def _clip(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Clips values to [0, 255], rounded if the images are."""
    return (values.round() if dtype == np.uint8 else values).clip(0, 255).astype(dtype)


def _rng(start: int) -> np.random.Generator:
    return np.random.default_rng([0, start])
