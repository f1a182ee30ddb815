"""
Images to measure, always uint8: samples of a pipeline, a folder, or a baseline.

Long computations run in batches whose boundaries depend only on the number of images. The processes share the batches
and write to one file, so results are independent of the number of processes, and a stopped run resumes.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from numpy.lib.format import open_memmap

from .. import plots
from ..data import ImageData, load_images
from ..errors import UserError
from ..pipelines.pipeline_tiny import image_generators
from ..progress import progress_bar


IMAGE_TYPES = (ImageData, np.ndarray, torch.Tensor)  # are measured as they are, in place of a pipeline
BLUR_SIGMA = 1.0  # pixels, of the blurred baseline
_ROWS = 4096  # images read at a time


def fill(
    path: Path,
    shape: tuple[int, ...],
    dtype: type,
    compute: Callable[[int, int], np.ndarray],
    *,
    batch_size: int,
    state: PartialState,
    desc: str,
) -> np.ndarray:
    """
    Computes an array on disk, batch by batch, in all processes together. Batches of an earlier run are kept.

    Args:
        path (`Path`): The `.npy` file, on a disk that all processes see. It appears once it is complete.
        shape (`tuple[int, ...]`): Shape of the array, rows first.
        dtype (`type`): Dtype of the array.
        compute (`Callable`): `compute(start, stop)` returns these rows, and depends on nothing else.
        batch_size (`int`): Number of rows computed at a time.
        state (`PartialState`): The processes.
        desc (`str`): Label of the progress bar.

    Returns:
        `np.ndarray`: The array, memory-mapped and read-only.
    """
    starts = range(0, shape[0], batch_size)
    part, marks = path.with_suffix(".part"), path.with_suffix(".done")
    if not path.is_file():
        if state.is_main_process and not (part.is_file() and marks.is_file()):
            path.parent.mkdir(parents=True, exist_ok=True)
            open_memmap(part, "w+", dtype, shape).flush()
            open_memmap(marks, "w+", np.bool_, (len(starts),)).flush()  # last: if it exists, both do
        state.wait_for_everyone()
        rows, done = open_memmap(part, "r+"), open_memmap(marks, "r+")
        mine = [i for i in range(state.process_index, len(starts), state.num_processes) if not done[i]]
        for i in progress_bar(mine, desc=desc, unit=" batches", delay=2, disable=not state.is_main_process):
            stop = min(starts[i] + batch_size, shape[0])
            rows[starts[i] : stop] = compute(starts[i], stop)
            rows.flush()
            done[i] = True
        done.flush()
        state.wait_for_everyone()
        if state.is_main_process:
            os.replace(part, path)
            marks.unlink()
    state.wait_for_everyone()
    return np.load(path, mmap_mode="r")


# Samples and folders


def sample(
    pipe: DiffusionPipeline,
    shape: tuple[int, int, int],
    path: Path,
    *,
    num_images: int,
    seed: int,
    batch_size: int,
    options: dict,
    state: PartialState,
    class_labels: np.ndarray | None = None,
    real: np.ndarray | None = None,
) -> np.ndarray:
    """
    Draws images from a pipeline. Image i has its own generator with the seed `seed + i`, so it is independent of batch
    size and process count.

    Args:
        pipe (`DiffusionPipeline`): Called with `output_type="pt"`.
        shape (`tuple[int, int, int]`): (C, H, W) of the reference, which the images must have.
        path (`Path`): The file that keeps the images.
        num_images (`int`): N.
        seed (`int`): Seed of the first image.
        batch_size (`int`): Number of images drawn at a time.
        options (`dict`): Further arguments of the call.
        state (`PartialState`): The processes.
        class_labels (`np.ndarray` of shape `(N,)`, *optional*): The class of each image.
        real (`np.ndarray` of shape `(N, C, H, W)`, *optional*): uint8 images to reconstruct, instead of sampling.

    Returns:
        `np.ndarray` of shape `(N, C, H, W)`: uint8, memory-mapped.
    """
    pipe.set_progress_bar_config(disable=True)

    def draw(start: int, stop: int) -> np.ndarray:
        generator = image_generators(seed, stop - start, first=start)
        labels = {} if class_labels is None else {"class_labels": class_labels[start:stop].tolist()}
        if real is None:
            output = pipe(batch_size=stop - start, generator=generator, output_type="pt", **labels, **options)
        else:
            pixels = torch.from_numpy(real[start:stop]) / 255
            output = pipe.reconstruct(pixels, generator=generator, output_type="pt", **options)
        images = to_uint8(output.images.float().cpu())
        check_shape(images, shape, "The model's images")
        return images

    return fill(path, (num_images, *shape), np.uint8, draw, batch_size=batch_size, state=state, desc="Sampling")


def read_folder(folder: str | Path) -> ImageData:
    """
    Reads a folder of any model's images. Sub-folders, if there are any, are classes.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If there are no images, their sizes differ, grey and colour are mixed, or
            any file cannot be read, as metrics of a part of the images would mislead.
    """
    if not Path(folder).is_dir():
        raise UserError(f"There is no folder '{folder}': give a folder of images.")
    data = load_images(train_data_dir=folder)
    for note in data.notes:
        if note.startswith("broken files"):
            raise UserError(f"'{folder}' has images that cannot be read ({note}): repair or remove them.")
        if "were grey" in note:
            raise UserError(f"'{folder}' mixes grey and colour images ({note}): separate them, or convert them.")
    return data


def to_uint8(images: np.ndarray | torch.Tensor) -> np.ndarray:
    """
    Converts images (N, C, H, W) to uint8; uint8 images stay as they are, floats must be in [0, 1].

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If the shape is wrong, or values are NaN or out of range.
    """
    images = images.numpy() if isinstance(images, torch.Tensor) else np.asarray(images)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise UserError(f"Images must have the shape (N, C, H, W) with C = 1 or 3: these have {images.shape}.")
    return plots.to_uint8(images)


def check(images: np.ndarray, shape: tuple[int, int, int], what: str) -> None:
    """Checks that metrics are defined for images: of the reference's shape, at least two, and not all identical."""
    check_shape(images, shape, what)
    if len(images) < 2:
        raise UserError(f"{what} are {len(images)}: metrics need at least two.")
    if all((images[i : i + _ROWS] == images[0]).all() for i in range(0, len(images), _ROWS)):
        raise UserError(f"{what} are all identical: {len(images):,} copies of one image have no distribution.")


def check_shape(images: np.ndarray, shape: tuple[int, int, int], what: str) -> None:
    """Checks that images have the reference's (C, H, W)."""

    def describe(channels: int, height: int, width: int) -> str:
        return f"{width}x{height} {'grey' if channels == 1 else 'colour'}"

    if images.shape[1:] != shape:
        raise UserError(
            f"{what} are {describe(*images.shape[1:])} and the reference's are {describe(*shape)}: they must agree."
        )


def order_of(images: np.ndarray) -> np.ndarray:
    """
    Returns the positions that sort the images by their hashes. This order is random with respect to their content, and
    independent of the order that they come in.
    """
    digests = b"".join(hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in images)
    return np.argsort(np.frombuffer(digests, dtype=">u8"), kind="stable")


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
        values = mean + std * _rng(start).standard_normal((stop - start, *images.shape[1:]))
        return values.round().clip(0, 255).astype(np.uint8)

    return draw


def blurred(images: np.ndarray, order: np.ndarray) -> Callable[[int, int], np.ndarray]:
    """Blurs real images with a Gaussian filter of `BLUR_SIGMA` pixels."""
    from scipy.ndimage import gaussian_filter

    sigma = (0, 0, BLUR_SIGMA, BLUR_SIGMA)

    def draw(start: int, stop: int) -> np.ndarray:
        values = gaussian_filter(images[order[start:stop]].astype(np.float32), sigma)
        return values.round().clip(0, 255).astype(np.uint8)

    return draw


BASELINES = {"noise": noise, "pixel_gaussian": pixel_gaussian, "blurred": blurred}


def _rng(start: int) -> np.random.Generator:
    return np.random.default_rng([0, start])
