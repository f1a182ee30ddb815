"""
Sources: splits whose images are still encoded, and the selection of their rows.

Each reader returns a [`Source`]: `read_digits` here, `read_folder` in folders.py, `read_arrays` in arrays.py and
`read_dataset` in hf_datasets.py.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image

from ..errors import UserError, unknown


_MAX_CLASSES = 1000  # a column of integers or strings with more distinct values holds no labels
LABEL_NAMES = {"label", "labels", "y"}  # of columns of labels, also where no value repeats
# Names of splits, as folders and arrays and as what is asked for.
SPLITS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
_MAX_PIXELS = 2**26  # a larger image is treated as a decompression bomb


class RefusedImageError(ValueError):
    """Reason why an intact image is not read."""


@dataclass
class Source:
    """
    Split of a dataset whose images are still encoded.

    Args:
        name (`str`): Name of the dataset in messages and in [`ImageData`].
        split (`str`): The split.
        columns (`list[str]`): All columns of the dataset, for messages.
        read (`Callable`): Maps row numbers to encoded images, each a dict of `"bytes"` and `"path"` (either may be
            None) as `datasets.Image(decode=False)` returns it, or None for a missing image. The path may also be a
            `Path` or `zipfile.Path`. An image that is not encoded is a dict of `"array"`, (H, W), (H, W, C) or (C, H, W),
            and, if it comes as nested lists, of its `"dtype"`.
        rows (`np.ndarray` of shape `(N,)`): Numbers of the selected rows.
        labels (`np.ndarray` of shape `(N,)`, *optional*): int64, -1 for a row without a label.
        class_names (`list[str]`, *optional*): Name of each class.
        folder (`Path`, *optional*): The local folder; broken files are named relative to it.
        notes (`list[str]`): Messages to the user.
        read_conditioning (`Callable`, *optional*): The same as `read`, for the conditioning images.
        conditions (`np.ndarray` of shape `(N, D)`, *optional*): float32, NaN where a value is missing.
        condition_names (`list[str]`, *optional*): Name of each of the D conditions.
    """

    name: str
    split: str
    columns: list[str]
    read: Callable[[list[int]], list[dict | None]]
    rows: np.ndarray
    labels: np.ndarray | None
    class_names: list[str] | None
    folder: Path | None = None
    notes: list[str] = field(default_factory=list)
    read_conditioning: Callable[[list[int]], list[dict | None]] | None = None
    conditions: np.ndarray | None = None
    condition_names: list[str] | None = None

    def take(self, positions: np.ndarray) -> "Source":
        """Returns the rows at these positions, with their labels and conditions."""
        taken = {name: getattr(self, name) for name in ("rows", "labels", "conditions")}
        return replace(self, **{name: None if each is None else each[positions] for name, each in taken.items()})


class UnknownSplitError(UserError):
    """A dataset has no split of the name that was asked for."""


def unknown_split(name: str, split: str, splits: Iterable[str]) -> UnknownSplitError:
    """Returns the error for a split that a dataset does not have, to be raised by the caller."""
    return UnknownSplitError(str(unknown(f"split of '{name}'", split, splits)))


def open_image(stream: BinaryIO) -> Image.Image:
    """Opens an encoded image without decoding it. Refuses over-large ones and those that are programs."""
    try:
        image = Image.open(stream)
    except Image.DecompressionBombError as error:
        raise RefusedImageError(f"more than {_MAX_PIXELS:,} pixels") from error
    if image.width * image.height > _MAX_PIXELS:
        raise RefusedImageError(f"more than {_MAX_PIXELS:,} pixels")
    if image.format in ("EPS", "WMF"):  # Pillow runs another program to decode these
        raise ValueError("not an image but a program")
    return image


def decodes(file: Any) -> bool:
    """Checks that Pillow decodes a file (a `Path` or `zipfile.Path`), or would if the image were not over-large."""
    try:
        with file.open("rb") as stream:
            open_image(stream).load()
    except RefusedImageError:
        return True
    except Exception:  # Pillow raises almost any exception for a damaged file
        return False
    return True


def max_classes(num_rows: int, is_named: bool) -> int:
    """
    Returns the largest number of distinct values of a column of labels. In a column of another name than
    [`LABEL_NAMES`] they must repeat: captions and serial numbers do not.
    """
    return _MAX_CLASSES if is_named else min(_MAX_CLASSES, num_rows // 2)


def unread_labels(columns: Iterable[str]) -> list[str]:
    """Returns a note on columns that are named as labels, of a dataset none of whose columns is read as labels."""
    named = [column for column in columns if column.lower() in LABEL_NAMES]
    reason = f"labels are whole numbers or strings, one for each image, of at most {_MAX_CLASSES:,} classes"
    return [f"not read as labels: {', '.join(named)} ({reason})"] if named else []


def index_labels(values: Sequence) -> tuple[np.ndarray, list[str]]:
    """Returns class indices (N,) of integers or strings, -1 for None, and the sorted names of the classes."""
    known = {value for value in values if value is not None}
    known = sorted(known, key=str if len(set(map(type, known))) > 1 else None)
    index = {value: position for position, value in enumerate(known)}
    return np.array([index.get(value, -1) for value in values], dtype=np.int64), [str(value) for value in known]


def select_splits(rows: dict[str, np.ndarray], split: str, name: str) -> np.ndarray:
    """
    Returns the rows of a split or of a slice such as "train[:1000]" or "train+test", as `datasets` reads it.

    Args:
        rows (`dict[str, np.ndarray]`): Row numbers of each split. "val" and "valid" mean "validation", too.
        split (`str`): The split or slice.
        name (`str`): Name of the dataset in messages.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If there is no such split, or if it is empty.
    """
    known = rows | {alias: rows[each] for alias, each in SPLITS.items() if each in rows}
    if split in known:
        chosen = known[split]
    else:
        from datasets import ReadInstruction

        try:
            spec = "+".join(rows) if split == "all" else split
            parts = ReadInstruction.from_spec(spec).to_absolute({each: len(found) for each, found in known.items()})
        except (ValueError, AssertionError) as error:
            raise unknown_split(name, split, rows) from error
        chosen = np.concatenate([known[part.splitname][part.from_ : part.to] for part in parts])
    if len(chosen) == 0:
        raise UserError(f"The split '{split}' of '{name}' is empty: its splits are {', '.join(rows)}.")
    return chosen


def read_digits(split: str) -> Source:
    """Reads scikit-learn's 1,797 handwritten 8x8 digits, which have the split "train" only."""
    from sklearn.datasets import load_digits

    if split != "train":
        raise unknown_split("digits", split, ["train"])
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (N, 8, 8)
    return Source(
        name="digits",
        split=split,
        columns=["image", "label"],
        read=lambda rows: [{"bytes": b"P5\n8 8\n255\n" + pixels[row].tobytes(), "path": None} for row in rows],  # PGM
        rows=np.arange(len(pixels)),
        labels=digits.target.astype(np.int64),
        class_names=[str(name) for name in digits.target_names],
    )


def select(
    source: Source,
    classes: str | Sequence[str | int] | None,
    max_samples: int | None,
    require_labels: bool,
    drop_missing: bool = False,
) -> Source:
    """
    Selects the rows of the given classes, at most `max_samples` of them, and relabels them.

    Labels are dropped, with a note, if a selected row has none. With `drop_missing`, rows without one of the conditions
    are left out.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If needed labels or conditions are missing, or if a class is unknown or has
            no image.
    """
    source = replace(source, notes=list(source.notes))
    labels, class_names = source.labels, source.class_names
    if labels is None and (require_labels or classes is not None):
        raise UserError(
            f"'{source.name}' has no labels: its columns are {', '.join(source.columns)}. Set `label_column` to the "
            "one with the labels, or give each class of an image folder its own sub-folder."
        )

    if classes is not None:
        chosen = _class_indices(classes, class_names, source.name)
        relabel = np.full(len(class_names) + 1, -1, dtype=np.int64)  # the last entry is for rows without a label, -1
        relabel[chosen] = np.arange(len(chosen))
        labels = relabel[labels]
        class_names = [class_names[index] for index in chosen]
        counts = np.bincount(labels[labels >= 0], minlength=len(chosen))
        if not counts.all():
            empty = class_names[counts.argmin()]
            raise UserError(f"No image of '{source.name}' ({source.split}) is of class '{empty}': leave it out.")
        source = replace(source, labels=labels, class_names=class_names).take(labels >= 0)

    source = _take_complete(source, drop_missing)
    if max_samples is not None and max_samples < len(source.rows):
        # At random, since many datasets are sorted by class.
        order = torch.randperm(len(source.rows), generator=torch.Generator().manual_seed(0))
        source = source.take(order[:max_samples].sort().values.numpy())

    labels = source.labels
    if labels is not None and labels.min() < 0:
        missing = f"{np.count_nonzero(labels < 0):,} of {len(labels):,} images of '{source.name}' have no label"
        if require_labels:
            raise UserError(
                f"{missing}: choose another `label_column` or `split`, or set `classes` to use labeled images only."
            )
        source.notes.append(f"{missing}: labels are left out")
        source = replace(source, labels=None, class_names=None)
    return source


def _take_complete(source: Source, drop_missing: bool) -> Source:
    """Returns the rows with all conditions. Rows without one are refused, or left out with a note."""
    missing = np.zeros((len(source.rows), 0)) if source.conditions is None else np.isnan(source.conditions)  # (N, D)
    is_complete = ~missing.any(axis=1)
    count, total = int((~is_complete).sum()), len(is_complete)
    if count == 0:
        return source
    names = [source.condition_names[i] for i in np.flatnonzero(missing.any(axis=0))]
    said = (
        f"{count:,} of {total:,} images of '{source.name}' ({count / total:.1%}) have no value of {', '.join(names)}"
    )
    if count == total or not drop_missing:
        remedy = "leave it out of --condition_columns" if count == total else "--drop_missing leaves these images out"
        raise UserError(f"{said}: {remedy}.")
    source.notes.append(f"{said}, left out")
    return source.take(is_complete)


def _class_indices(classes: str | Sequence[str | int], class_names: list[str], name: str) -> list[int]:
    """Converts `"cat,frog"` or `[3, 6]` to [3, 6]. Names take precedence over indices, since names may be numbers."""
    entries = classes.split(",") if isinstance(classes, str) else classes
    chosen = []
    for entry in (str(entry).strip() for entry in entries):
        if entry in class_names:
            chosen.append(class_names.index(entry))
        elif entry.isdecimal() and int(entry) < len(class_names):
            chosen.append(int(entry))
        else:
            raise unknown(f"class of '{name}'", entry, class_names)
    if len(set(chosen)) < len(chosen):
        raise UserError(f"classes '{','.join(map(str, entries))}' names a class twice: name each class once.")
    return chosen
