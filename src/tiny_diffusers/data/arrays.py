"""Reads images from NumPy files: an .npy of images, or an .npz with images and labels."""

import re
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import psutil

from ..errors import UserError, first_line, unknown
from .conditions import parse_conditions
from .decoders import has_gray_or_rgb
from .sources import (
    LABEL_NAMES,
    SPLITS,
    Source,
    index_labels,
    max_classes,
    select_splits,
    unknown_split,
    unread_labels,
)


def read_arrays(
    file: Path,
    name: str,
    split: str,
    image_column: str | None,
    label_column: str | None,
    conditioning_column: str | None,
    condition_columns: tuple[str, ...] = (),
) -> Source:
    """
    Reads an .npy or .npz file of images, of numbers of any kind.

    Images are the first array of shape (N, H, W), (N, H, W, C) or (N, C, H, W), where C = 1 or 3 comes before other
    numbers. Labels are the first one of N integers or strings; one named "label", "labels" or "y" comes before others.
    Arrays that are named by splits, such as `x_train` and `y_test`, are read as these splits.

    Args:
        file (`Path`): The file.
        name (`str`): The file as the user spelled it.
        split, image_column, label_column, conditioning_column (`str`), condition_columns (`tuple[str]`): As in
            [`load_images`]. Columns are the names of arrays, and those of another split stand for this one's:
            `edges_train` for `edges_test`. Conditions are named without the split.

    Returns:
        [`Source`]: The images of the split: as arrays, or encoded as PGM or PPM where these formats can hold them.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If the file cannot be read, if it holds no images or is larger than
            memory, or if the split or an array does not exist.
    """
    wanted, arrays = _choose_split(_read_file(file, name), name, split)
    image_column, label_column, conditioning_column = (
        None if column is None else _find_column(arrays, column, f"{kind}_column of '{name}'")
        for kind, column in (("image", image_column), ("label", label_column), ("conditioning", conditioning_column))
    )
    measured = _find_conditions(arrays, condition_columns, name)

    image_columns = _choose_images(arrays, image_column, conditioning_column, name)
    images, paired = arrays[image_columns[0]], arrays.get(conditioning_column)
    if paired is not None and not (_is_images(paired) and len(paired) == len(images)):
        raise UserError(
            f"conditioning_column '{conditioning_column}' of '{name}' holds no images, one for each of "
            f"'{image_columns[0]}': its arrays are {_shapes(arrays)}."
        )
    conditions, condition_names = _read_conditions(arrays, measured, len(images), name)
    label_columns = _choose_labels(arrays, label_column, images, measured.values(), name)

    notes = []
    for kind, columns in (("image", image_columns), ("label", label_columns)):
        if len(columns) > 1:
            notes.append(f"{kind}_column: '{columns[0]}' was chosen from {', '.join(columns)}")
    if not label_columns:
        notes += unread_labels(each for each in arrays if LABEL_NAMES & set(_words(each)))
    labels, class_names = index_labels(arrays[label_columns[0]].ravel().tolist()) if label_columns else (None, None)
    rows = select_splits({wanted: np.arange(len(images))}, split, name)
    return Source(
        name=file.stem,
        split=split,
        columns=list(arrays),
        read=_reader(images),
        rows=rows,
        labels=None if labels is None else labels[rows],
        class_names=class_names,
        notes=notes,
        read_conditioning=None if paired is None else _reader(paired),
        conditions=None if conditions is None else conditions[rows],
        condition_names=condition_names,
    )


def _choose_split(arrays: dict[str, np.ndarray], name: str, split: str) -> tuple[str, dict[str, np.ndarray]]:
    """Returns the split without its slice, and the arrays that are named by it."""
    by_split = {}
    for each, array in arrays.items():
        by_split.setdefault(next((SPLITS[word] for word in _words(each) if word in SPLITS), "train"), {})[each] = array
    wanted = re.match(r"\w*", split).group()
    wanted = SPLITS.get(wanted, wanted)
    if wanted not in by_split:
        raise unknown_split(name, split, by_split)
    return wanted, by_split[wanted]


def _shapes(arrays: dict[str, np.ndarray]) -> str:
    return ", ".join(f"{each} {array.shape}" for each, array in arrays.items())


def _choose_images(
    arrays: dict[str, np.ndarray], image_column: str | None, conditioning_column: str | None, name: str
) -> list[str]:
    """Returns the arrays that may be the images, best first: the one that is asked for, or all that look like some."""
    columns = [
        each
        for each, array in arrays.items()
        if _is_images(array) and image_column in (None, each) and each != conditioning_column
    ]
    if not columns:
        raise UserError(
            f"'{name}' has no image column{f' {image_column}' if image_column else ''}: its arrays are {_shapes(arrays)}. "
            "Images are numbers of shape (N, H, W), (N, H, W, C) or (N, C, H, W)."
        )
    return sorted(columns, key=lambda each: not _has_gray_or_rgb(arrays[each]))


def _choose_labels(
    arrays: dict[str, np.ndarray], label_column: str | None, images: np.ndarray, taken: Collection[str], name: str
) -> list[str]:
    """Returns the arrays that may be the labels, best first; none if no array looks like some and none is asked for."""
    if label_column is not None:
        if not _is_labels(arrays[label_column], images):
            raise UserError(
                f"label_column '{label_column}' of '{name}' holds neither integers nor strings, one for each image: its "
                f"arrays are {_shapes(arrays)}."
            )
        return [label_column]
    columns = [each for each, array in arrays.items() if _is_labels(array, images) and each not in taken]
    named = {each for each in columns if LABEL_NAMES & set(_words(each))}
    distinct = {each: len(np.unique(arrays[each])) for each in columns}
    columns = [each for each in columns if distinct[each] <= max_classes(len(images), each in named)]
    return sorted(columns, key=lambda each: each not in named)


def _find_conditions(arrays: dict[str, np.ndarray], condition_columns: tuple[str, ...], name: str) -> dict[str, str]:
    """Returns the array of each condition, by its name without a split."""
    found = {
        _without_split(column) or column: _find_column(arrays, column, f"condition_columns of '{name}'")
        for column in condition_columns
    }
    if len(found) < len(condition_columns):
        raise UserError(
            f"condition_columns of '{name}': two of {', '.join(condition_columns)} have one name without their split: give "
            "one of them."
        )
    return found


def _read_conditions(
    arrays: dict[str, np.ndarray], measured: dict[str, str], num_images: int, name: str
) -> tuple[np.ndarray | None, list[str] | None]:
    """Returns the conditions (N, D) and their names; None if none are asked for."""
    for column in measured.values():
        if arrays[column].ndim not in (1, 2) or len(arrays[column]) != num_images:
            raise UserError(
                f"condition column '{column}' of '{name}' holds no values, one or a row of them for each image: its "
                f"arrays are {_shapes(arrays)}."
            )
    if not measured:
        return None, None
    return parse_conditions({column: _list_values(arrays[each]) for column, each in measured.items()}, name)


def _reader(images: np.ndarray) -> Callable[[list[int]], list[dict]]:
    """Returns what reads the images of an array by their numbers."""
    largest = _find_largest_value(images)
    if largest is None:
        return lambda numbers: [{"array": images[row]} for row in numbers]
    return lambda numbers: [{"bytes": _encode(images[row], largest), "path": None} for row in numbers]


def _find_column(arrays: dict[str, np.ndarray], column: str, what: str) -> str:
    """Returns the name of an array of the split: the given one, or what another split's array of that name is called."""
    if column in arrays:
        return column
    wanted = _without_split(column).lower()
    found = next((each for each in arrays if _without_split(each).lower() == wanted), None)
    if found is None:
        raise unknown(what, column, arrays)
    return found


def _without_split(name: str) -> str:
    """Returns the name of an array without that of its split, which may be all of it."""
    return re.sub("[A-Za-z]+", lambda word: "" if word[0].lower() in SPLITS else word[0], name).strip("_-. ")


def _list_values(array: np.ndarray) -> list:
    """Returns the conditions of an array (N,), or (N, D), whose numbers are floats and no ids of labels."""
    if array.ndim == 2 and array.dtype.kind in "iub":
        array = array.astype(np.float64)
    return (array.ravel() if array.shape[1:] == (1,) else array).tolist()


def _words(name: str) -> list[str]:
    return re.split("[^a-z]+", name.lower())


def _read_file(file: Path, name: str) -> dict[str, np.ndarray]:
    """Reads the arrays of a file by name. Pickled objects are refused: they could run code."""
    try:
        if file.suffix.lower() == ".npy":
            return {"images": np.load(file, mmap_mode="r", allow_pickle=False)}
        with zipfile.ZipFile(file) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > psutil.virtual_memory().available / 2:
            raise UserError(f"'{name}' holds {size / 1e9:.1f} GB of arrays, more than half of the free memory.")
        with np.load(file, allow_pickle=False) as arrays:
            return {each: arrays[each] for each in arrays.files}
    except (OSError, EOFError, ValueError, MemoryError, zipfile.BadZipFile) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"The file '{name}' cannot be read: {first_line(error)}") from error


def _is_images(array: np.ndarray) -> bool:
    return array.dtype.kind in "iubf" and array.ndim in (3, 4)


def _has_gray_or_rgb(array: np.ndarray) -> bool:
    return array.ndim == 3 or has_gray_or_rgb(array[0])


def _is_labels(array: np.ndarray, images: np.ndarray) -> bool:
    return array.dtype.kind in "iubU" and array.shape in ((len(images),), (len(images), 1))


def _find_largest_value(images: np.ndarray) -> int | None:
    """Returns the largest value that PGM or PPM encodes the images with, 1 (bool), 255 or 65535; None if they cannot."""
    if images.dtype.kind == "f" or not images.size or not _has_gray_or_rgb(images):
        return None
    if images.dtype.kind == "b":
        return 1
    if images.dtype == np.uint8:
        return 255
    low, high = int(images.min()), int(images.max())
    if low < 0 or high > (255 if images.ndim == 4 and 3 in (images.shape[1], images.shape[-1]) else 65535):
        return None
    return 255 if high <= 255 else 65535


def _encode(image: np.ndarray, largest: int) -> bytes:
    """Encodes an image of shape (H, W), (H, W, C) or (C, H, W) as PGM or PPM."""
    if image.ndim == 3 and image.shape[-1] not in (1, 3):
        image = image.transpose(1, 2, 0)  # (C, H, W) -> (H, W, C)
    height, width = image.shape[:2]
    magic = b"P6" if image.shape[2:] == (3,) else b"P5"
    pixels = image * 255 if largest == 1 else image
    header = b"%s\n%d %d\n%d\n" % (magic, width, height, max(largest, 255))
    return header + pixels.astype(">u2" if largest > 255 else np.uint8).tobytes()
