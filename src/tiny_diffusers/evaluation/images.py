"""
The images that are judged: drawn from a pipeline, read from a folder, or made as a baseline, and always uint8 on disk.

Whatever is computed for many images is computed in batches whose boundaries depend on their number alone, shared out among
the processes, and written to one file: so any number of processes gives the same, and a stopped run goes on where it was.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.lib.format import open_memmap
from tqdm.auto import tqdm

from ..data import ImageData, load_images
from ..errors import UserError


if TYPE_CHECKING:
    from accelerate import PartialState
    from diffusers import DiffusionPipeline

BLUR_SIGMA = 1.0  # pixels, of the baseline of blurred images


def fill(
    path: Path,
    shape: tuple[int, ...],
    dtype: type,
    compute: Callable[[int, int], np.ndarray],
    batch_size: int,
    state: "PartialState",
    desc: str,
) -> np.ndarray:
    """
    An array on disk that all processes compute together, batch by batch; batches that an earlier run has written stay.

    Args:
        path (`Path`):
            The `.npy` file, on a disk that all processes see. It appears when it is whole.
        shape (`tuple[int, ...]`):
            Of the array, rows first.
        dtype (`type`):
            Of the array.
        compute (`Callable`):
            The rows from a first one up to a last one, as `compute(start, stop)`; a function of these alone.
        batch_size (`int`):
            Rows computed at a time.
        state (`PartialState`):
            The processes.
        desc (`str`):
            What the progress bar says.

    Returns:
        `np.ndarray`: The array, memory-mapped and read-only.
    """
    starts = range(0, shape[0], batch_size)
    part, marks = path.with_suffix(".part"), path.with_suffix(".done")
    if not path.is_file():
        if state.is_main_process and not (part.is_file() and marks.is_file()):
            path.parent.mkdir(parents=True, exist_ok=True)
            open_memmap(part, "w+", dtype, shape).flush()
            open_memmap(marks, "w+", np.bool_, (len(starts),)).flush()  # last: where it is, both are
        state.wait_for_everyone()
        rows, done = open_memmap(part, "r+"), open_memmap(marks, "r+")
        mine = [i for i in range(state.process_index, len(starts), state.num_processes) if not done[i]]
        for i in tqdm(mine, desc=desc, unit=" batches", delay=2, disable=not state.is_main_process):
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


# Where images come from


def sample(
    pipe: "DiffusionPipeline",
    shape: tuple[int, int, int],
    path: Path,
    *,
    num_images: int,
    seed: int,
    batch_size: int,
    options: dict,
    class_labels: np.ndarray | None,
    real: np.ndarray | None,
    state: "PartialState",
) -> np.ndarray:
    """
    Images of a pipeline. Image i is drawn with a generator of its own, of seed + i: neither the batches nor the processes
    have a say in it.

    Args:
        pipe (`DiffusionPipeline`): Called with `output_type="pt"`.
        shape (`tuple[int, int, int]`): (C, H, W) that its images must have, the reference's.
        path (`Path`): The file that they are kept in.
        num_images (`int`): N.
        seed (`int`): Of the first image.
        batch_size (`int`): Images drawn at a time.
        options (`dict`): Further arguments of the call.
        class_labels (`np.ndarray` of shape `(N,)`, *optional*): The classes to ask for.
        real (`np.ndarray` of shape `(N, C, H, W)`, *optional*): uint8 images to reconstruct, in place of sampling.
        state (`PartialState`): The processes.

    Returns:
        `np.ndarray` of shape `(N, C, H, W)`: uint8, memory-mapped.
    """
    pipe.set_progress_bar_config(disable=True)

    def draw(start: int, stop: int) -> np.ndarray:
        generator = [torch.Generator("cpu").manual_seed(seed + i) for i in range(start, stop)]
        labels = {} if class_labels is None else {"class_labels": class_labels[start:stop].tolist()}
        if real is None:
            output = pipe(batch_size=stop - start, generator=generator, output_type="pt", **labels, **options)
        else:
            pixels = torch.from_numpy(real[start:stop]) / 255
            output = pipe.reconstruct(pixels, generator=generator, output_type="pt", **options)
        images = to_uint8(output.images.float().cpu())
        if images.shape[1:] != shape:
            raise UserError(
                f"The model's images are {describe_shape(images.shape[1:])} and the reference's are "
                f"{describe_shape(shape)}: compare images of one size and kind."
            )
        return images

    return fill(path, (num_images, *shape), np.uint8, draw, batch_size, state, "Sampling")


def read_folder(folder: str | Path) -> ImageData:
    """
    The images of a folder of any model's samples; sub-folders, where there are any, are their classes.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: for no images, images of several sizes, and files that can't be read: a figure
            is of all images or of none.
    """
    data = load_images("digits", train_data_dir=folder)
    broken = next((note for note in data.notes if note.startswith("broken files")), None)
    if broken is not None:
        raise UserError(f"'{folder}' has images that can't be read ({broken}): repair or remove them.")
    mixed = next((note for note in data.notes if "were grey" in note), None)
    if mixed is not None:
        raise UserError(
            f"'{folder}' has grey and colour images ({mixed}): evaluate them apart, or make all of one kind."
        )
    return data


def to_uint8(images: np.ndarray | torch.Tensor) -> np.ndarray:
    """
    Images (N, C, H, W) as uint8: as they are, or from floats in [0, 1].

    Raises:
        [`~tiny_diffusers.errors.UserError`]: for another shape, values outside [0, 1], or values that are not numbers.
    """
    images = images.numpy() if isinstance(images, torch.Tensor) else np.asarray(images)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise UserError(f"Images have the shape (N, C, H, W) with C = 1 or 3: these have {images.shape}.")
    if images.dtype == np.uint8:
        return images
    if np.isnan(images).any():
        raise UserError("The images have NaN pixels: the model, or what made the images, has overflowed.")
    if not (images.min() >= -1e-3 and images.max() <= 1 + 1e-3):
        raise UserError(
            f"Images are uint8, or floats in [0, 1]: these are {images.dtype} in [{images.min():.3g}, {images.max():.3g}]."
        )
    return (images.clip(0, 1) * 255).round().astype(np.uint8)


def check(images: np.ndarray, shape: tuple[int, int, int], what: str) -> None:
    """Refuses what no metric is defined for: too few images, all of them one, and images unlike the reference's."""
    if images.shape[1:] != shape:
        raise UserError(
            f"{what} are {describe_shape(images.shape[1:])} and the reference's are {describe_shape(shape)}: compare "
            "images of one size and kind."
        )
    if len(images) < 2:
        raise UserError(f"{what} are {len(images)}: no distance is defined for less than two.")
    if all((images[i : i + 4096] == images[0]).all() for i in range(0, len(images), 4096)):
        raise UserError(
            f"{what} are all identical: {len(images):,} copies of one image have no distribution to measure."
        )


def describe_shape(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{width}x{height} {'grey' if channels == 1 else 'colour'}"


def order_of(images: np.ndarray) -> np.ndarray:
    """
    The images' numbers in the order of their hashes: random as far as their content goes, and the same for the same images
    in whatever order they come.
    """
    digests = b"".join(hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in images)
    return np.argsort(np.frombuffer(digests, dtype=">u8"), kind="stable")


def fingerprint(images: np.ndarray) -> str:
    """sha256 over the images' shape and pixels."""
    sha256 = hashlib.sha256(repr(images.shape).encode())
    for start in range(0, len(images), 4096):
        sha256.update(np.ascontiguousarray(images[start : start + 4096]))
    return sha256.hexdigest()


# Baselines: what a figure is worth. Each takes real images and their order, and draws rows from a first to a last one


def noise(images: np.ndarray, order: np.ndarray) -> Callable[[int, int], np.ndarray]:
    """Every pixel uniform in [0, 255]."""
    return lambda start, stop: _rng(start).integers(0, 256, (stop - start, *images.shape[1:]), dtype=np.uint8)


def pixel_gaussian(images: np.ndarray, order: np.ndarray) -> Callable[[int, int], np.ndarray]:
    """Each pixel from a Gaussian with that pixel's mean and variance over the images, and independent of the others."""
    total, squares = np.zeros(images.shape[1:]), np.zeros(images.shape[1:])
    for start in range(0, len(images), 4096):
        part = images[start : start + 4096].astype(np.float64)
        total += part.sum(0)
        squares += (part**2).sum(0)
    mean = total / len(images)
    std = np.sqrt(np.maximum(squares / len(images) - mean**2, 0))

    def draw(start: int, stop: int) -> np.ndarray:
        values = mean + std * _rng(start).standard_normal((stop - start, *images.shape[1:]))
        return values.round().clip(0, 255).astype(np.uint8)

    return draw


def blurred(images: np.ndarray, order: np.ndarray) -> Callable[[int, int], np.ndarray]:
    """Real images through a Gaussian filter of `BLUR_SIGMA` pixels."""
    from scipy.ndimage import gaussian_filter

    sigma = (0, 0, BLUR_SIGMA, BLUR_SIGMA)
    return lambda start, stop: (
        gaussian_filter(images[order[start:stop]].astype(np.float32), sigma).round().clip(0, 255).astype(np.uint8)
    )


BASELINES = {"noise": noise, "pixel_gaussian": pixel_gaussian, "blurred": blurred}


def _rng(start: int) -> np.random.Generator:
    return np.random.default_rng([0, start])
