"""Reads Hub datasets and local parquet, arrow or webdataset files with the `datasets` library."""

import glob
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HFValidationError

from ..errors import UserError, first_line, unknown
from .conditions import parse_conditions
from .folders import abbreviate, is_image, list_files, relative_name
from .sources import LABEL_NAMES, Source, index_labels, max_classes, unknown_split, unread_labels


if TYPE_CHECKING:
    import datasets

_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}  # of `datasets`, by suffix
_LABEL_DTYPES = ("int", "uint", "bool", "string", "large_string")  # or longer names, such as "int64"


def open_dataset(
    name: str, folder: Path | None, config: str | None, split: str, cache_dir: str | os.PathLike | None
) -> tuple["datasets.Dataset", list[str]]:
    """
    Opens a split of a dataset, downloading it first if needed.

    Args:
        name (`str`): The Hub id, or the folder as the user spelled it.
        folder (`Path`, *optional*): The resolved folder, or a .parquet or .arrow file; None for a Hub dataset.
        config (`str`, *optional*): The configuration.
        split (`str`): The split, or a slice such as `"train[:1000]"`.
        cache_dir (`str` or `os.PathLike`, *optional*): Cache folder of `datasets`.

    Returns:
        `tuple[datasets.Dataset, list[str]]`: The split, and the names of all splits.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If the dataset or the split does not exist, is empty or cannot be read.
    """
    import datasets

    # `datasets` takes a path for a pattern: in another folder's name, "[ab]" would match "a". And without a card that
    # says more, it would read images that lie beside a parquet file, if there are several.
    path, files = os.fspath(folder or name), None
    if folder is not None and folder.is_file():
        path, files = folder.suffix[1:].lower(), {"train": glob.escape(path)}
    elif folder is not None:
        suffixes = {file.suffix.lower() for file in list_files(folder)}
        kinds = [suffix for suffix in _BUILDERS if suffix in suffixes]
        is_pattern = glob.escape(path) != path
        if is_pattern and (config is not None or not kinds):
            raise UserError(f"The folder '{name}' cannot be read as a dataset: its name holds one of *?[, rename it.")
        if is_pattern or (config is None and kinds and not (folder / "README.md").is_file()):
            path, files = _BUILDERS[kinds[0]], _split_files(folder, kinds[0])

    # The exceptions of `datasets` and of the Hub's client have no common base class.
    try:
        builder = datasets.load_dataset_builder(
            path, config, cache_dir=None if cache_dir is None else os.fspath(cache_dir), data_files=files
        )
    except Exception as error:
        reason = _reason(error, folder)
        if folder is not None:
            raise UserError(f"The folder '{name}' cannot be read as a dataset: {reason}") from error
        is_id = not isinstance(error, HFValidationError) and name.count("/") < 2
        if isinstance(error, ValueError) and is_id:
            raise UserError(f"The dataset '{name}' cannot be read: {reason} (see `dataset_config_name`)") from error
        reason = reason if is_id else "whose names are of the form owner/name"
        raise UserError(
            f"There is no folder or file '{name}' here, and no dataset of that name that can be loaded from the Hub "
            f"({reason}). Give a folder, a Hub id such as ylecun/mnist, or digits."
        ) from error
    try:
        builder.download_and_prepare()
    except Exception as error:
        raise UserError(f"The dataset '{name}' cannot be read: {_reason(error.__cause__ or error, folder)}") from error

    splits = list(builder.info.splits or ())
    try:
        dataset = builder.as_dataset(split=split)
    except ValueError as error:
        if split not in splits:
            raise unknown_split(name, split, splits) from error
        dataset = ()
    if len(dataset) == 0:
        raise UserError(f"The split '{split}' of '{name}' is empty: its splits are {', '.join(splits)}.")
    return dataset, splits


def _split_files(folder: Path, suffix: str) -> dict[str, list[str]]:
    """Lists the files of one kind by split, which `datasets` finds in their names; as patterns that match just them."""
    from datasets.data_files import DataFilesDict, get_data_patterns

    base = glob.escape(os.fspath(folder))
    found = DataFilesDict.from_patterns(get_data_patterns(base), base_path=base, allowed_extensions=[suffix])
    return {split: [glob.escape(file) for file in files] for split, files in found.items() if files}


def _reason(error: BaseException, folder: Path | None) -> str:
    """Returns the first line of an error. If a local dataset fails by a file elsewhere, that is in the cache."""
    file = getattr(error, "filename", None)
    is_cache = folder is not None and isinstance(file, str) and not Path(file).is_relative_to(folder)
    return first_line(error) + (" (the cache of `datasets`: set `cache_dir` or HF_HOME)" if is_cache else "")


def read_dataset(
    dataset: "datasets.Dataset",
    splits: list[str],
    name: str,
    folder: Path | None,
    split: str,
    image_column: str | None,
    label_column: str | None,
    conditioning_column: str | None,
    condition_columns: tuple[str, ...] = (),
    cache_dir: str | os.PathLike | None = None,
) -> Source:
    """
    Reads the labels of an opened dataset and prepares the reading of its images.

    Args:
        dataset (`datasets.Dataset`), splits (`list[str]`): As returned by [`open_dataset`].
        name (`str`), folder (`Path`, *optional*), split (`str`): As given to [`open_dataset`].
        image_column, label_column (`str`, *optional*): The columns to read; found by their features by default.
        conditioning_column (`str`, *optional*): The column of conditioning images, if they are to be read.
        condition_columns (`tuple[str]`): The columns of numbers and labels that are conditions.
        cache_dir (`str` or `os.PathLike`, *optional*): As given to [`open_dataset`].

    Returns:
        [`Source`]: All rows of the split.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If a column does not exist, or holds neither images nor labels nor conditions.
    """
    import datasets

    others = dataset
    if conditioning_column is not None:
        others = dataset.remove_columns(_image_columns(dataset, conditioning_column, name, "conditioning_column"))
    image_columns = _image_columns(others, image_column, name)
    conditions, condition_names = None, None
    if condition_columns:
        values = {column: _read_values(dataset, column, name) for column in condition_columns}
        labels = {column: _label_names(dataset.features[column]) for column in condition_columns}
        conditions, condition_names = parse_conditions(values, name, labels)
    others = dataset.remove_columns([column for column in condition_columns if column != label_column])
    label_columns = _label_columns(others, label_column, name, splits)
    labels, class_names = _read_labels(dataset, label_columns[0]) if label_columns else (None, None)

    if folder is not None:
        roots = [folder if folder.is_dir() else folder.parent]
    else:  # the files of a Hub dataset that is an image folder
        caches = [datasets.config.HF_DATASETS_CACHE, HF_HUB_CACHE, *([cache_dir] if cache_dir else [])]
        roots = [Path(cache).expanduser().resolve() for cache in caches]

    def reader(column: str) -> Callable[[list[int]], list[dict | None]]:
        dtype = _array_dtype(dataset.features[column])
        if dtype is not None:
            arrays = dataset.select_columns([column])
            return lambda rows: [image and {"array": image, "dtype": dtype} for image in arrays[rows][column]]
        encoded = dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        return lambda rows: [_confine(image, roots) for image in encoded[rows][column]]

    notes = []
    for kind, columns in (("image", image_columns), ("label", label_columns)):
        if len(columns) > 1:
            notes.append(f"{kind}_column: '{columns[0]}' was chosen from {', '.join(columns)}")
    if not label_columns:
        notes += unread_labels(others.column_names)
    beside = [file for file in list_files(folder) if is_image(file)] if folder is not None and folder.is_dir() else []
    if beside:
        names = abbreviate([relative_name(file, folder) for file in beside])
        notes.append(f"images beside the parquet or arrow files, left out, {len(beside):,}: {names}")
    return Source(
        name=name if folder is None else folder.stem if folder.is_file() else folder.name,
        split=split,
        columns=dataset.column_names,
        read=reader(image_columns[0]),
        rows=np.arange(len(dataset)),
        labels=labels,
        class_names=class_names,
        folder=folder,
        notes=notes,
        read_conditioning=None if conditioning_column is None else reader(conditioning_column),
        conditions=conditions,
        condition_names=condition_names,
    )


def _confine(encoded: dict | None, roots: list[Path]) -> dict | None:
    """
    Resolves the path of a row that names a file instead of holding its bytes. A row is data of whoever made the dataset:
    a file elsewhere, or one that is no regular file, is not read.
    """
    if encoded is None or encoded["bytes"] is not None or encoded["path"] is None:
        return encoded
    path = (roots[0] / encoded["path"]).resolve()
    if path.is_file() and any(path.is_relative_to(root) for root in roots):
        return {"bytes": None, "path": path}
    return {"bytes": b"", "path": f"{encoded['path']} (no file of the dataset)"}


def _image_columns(dataset: "datasets.Dataset", given: str | None, name: str, flag: str = "image_column") -> list[str]:
    """Returns the given column, or else all columns that hold images, or else all that hold arrays."""
    if given is not None and given not in dataset.column_names:
        raise unknown(f"{flag} of '{name}'", given, dataset.column_names)
    images = _image_columns_of(dataset)
    arrays = [column for column, feature in dataset.features.items() if _array_dtype(feature) is not None]
    found = images + arrays if given is not None else images or arrays
    if not found:
        raise UserError(f"'{name}' has no image column: its columns are {', '.join(dataset.column_names)}.")
    if given is not None and given not in found:
        raise UserError(f"{flag} '{given}' of '{name}' holds no images: choose one of {', '.join(found)}.")
    return [given] if given is not None else found


def _image_columns_of(dataset: "datasets.Dataset") -> list[str]:
    return [column for column, feature in dataset.features.items() if _holds_images(feature)]


def _holds_images(feature: object) -> bool:
    """Checks for images, or for encoded bytes: `datasets` sees only these in a parquet file that it did not write."""
    import datasets

    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in ("binary", "large_binary")


def _array_dtype(feature: object) -> str | None:
    """Returns the dtype of a column of arrays, `Array2D`, `Array3D` or nested lists of two or three levels; else None."""
    import datasets

    if isinstance(feature, datasets.Array2D | datasets.Array3D):
        return feature.dtype
    levels = 0
    while hasattr(feature, "feature"):
        levels, feature = levels + 1, feature.feature
    is_number = isinstance(feature, datasets.Value) and np.dtype(feature.pa_type.to_pandas_dtype()).kind in "iubf"
    return feature.dtype if is_number and levels in (2, 3) else None


def _label_columns(dataset: "datasets.Dataset", given: str | None, name: str, splits: list[str]) -> list[str]:
    """Returns the given column, or else all columns that may hold labels, the likeliest first."""
    import datasets

    features = dataset.features
    classes = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    dtypes = {column: feature.dtype for column, feature in features.items() if isinstance(feature, datasets.Value)}
    discrete = [column for column, dtype in dtypes.items() if dtype.startswith(_LABEL_DTYPES)]
    if given is not None:
        if given not in features:
            raise unknown(f"label_column of '{name}'", given, dataset.column_names)
        if given not in classes + discrete:
            raise UserError(
                f"label_column '{given}' of '{name}' holds neither classes nor integers nor strings: choose another "
                f"column of {', '.join(features)}."
            )
        return [given]
    # If each split has its own folder, `datasets` takes these folders for classes.
    found = [column for column in classes if not set(features[column].names) <= set(splits)]
    if not classes:
        rows = len(dataset)
        found = [c for c in discrete if len(dataset.unique(c)) <= max_classes(rows, c in LABEL_NAMES)]
    return sorted(found, key=lambda column: column not in LABEL_NAMES)


def _read_labels(dataset: "datasets.Dataset", column: str) -> tuple[np.ndarray, list[str]]:
    """Returns class indices (N,), -1 for a missing label, and the names of the classes."""
    import datasets

    feature = dataset.features[column]
    values = dataset.select_columns([column])[:][column]
    if isinstance(feature, datasets.ClassLabel):
        return np.array([-1 if value is None else value for value in values], dtype=np.int64), feature.names
    return index_labels(values)


def _read_values(dataset: "datasets.Dataset", column: str, name: str) -> list[Any]:
    """Returns the values of a column of conditions: lists of the names of classes, and of floats for lists of one length."""
    import datasets

    if column not in dataset.features:
        raise unknown(f"condition_columns of '{name}'", column, dataset.column_names)
    if column in _image_columns_of(dataset):
        raise UserError(f"condition column '{column}' of '{name}' holds images: it must hold numbers or labels.")
    feature = dataset.features[column]
    values, names = dataset.select_columns([column])[:][column], _label_names(feature)
    if isinstance(feature, datasets.ClassLabel):  # -1 is no class
        values = [None if value is None or value < 0 else [value] if names else value for value in values]
    if names:
        known = [value and [each for each in value if each is not None and each >= 0] for value in values]
        return [row and [names[each] for each in row] for row in known]
    items = getattr(feature, "feature", None)  # of a list
    if getattr(feature, "length", -1) > 0 and isinstance(items, datasets.Value) and not items.dtype.endswith("string"):
        return [row and [None if each is None else float(each) for each in row] for row in values]
    return values


def _label_names(feature: object) -> list[str] | None:
    """Returns the names of the labels of a column of more than two classes, or of lists of classes; else None."""
    import datasets

    items = getattr(feature, "feature", feature)
    is_list_of_labels = isinstance(items, datasets.ClassLabel) and (items is not feature or len(items.names) > 2)
    return items.names if is_list_of_labels else None
