"""Loads images by name: from the cache, or read, selected, decoded and written to the cache."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from ..errors import UserError, unknown
from ..paths import local_path
from .arrays import read_arrays
from .cache import cache_key, cache_root, read_cache, write_cache
from .conditions import as_columns
from .decoding import decode_source
from .folders import is_repository, list_files, read_folder
from .hf_datasets import open_dataset, read_dataset
from .images import ImageData
from .sources import Source, read_digits, select


def load_images(
    dataset_name: str = "digits",
    *,
    dataset_config_name: str | None = None,
    train_data_dir: str | os.PathLike | None = None,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    conditioning_column: str | None = None,
    condition_columns: str | Sequence[str] | None = None,
    drop_missing: bool = False,
    resolution: int | tuple[int, int] | None = None,
    center_crop: bool = False,
    classes: str | Sequence[str | int] | None = None,
    max_samples: int | None = None,
    channels: int | None = None,
    conditioning_channels: int | None = None,
    value_range: tuple[float, float] | Literal["measured"] | None = None,
    cache_dir: str | os.PathLike | None = None,
    require_labels: bool = False,
) -> ImageData:
    """
    Loads the images of a dataset, decoded and brought to one size.

    Each picture becomes 8-bit gray or RGB: values of 9 to 16 bits are scaled, palettes are resolved, transparent pixels
    are blended with white, and the EXIF orientation is applied. Other channels are kept where `channels` asks for them, and
    other values where `value_range` does. Then its largest crop with the aspect ratio of
    `resolution` (see `center_crop`) is resized to it with Pillow's antialiased bicubic filter. Files that cannot be
    decoded are skipped and named in the notes. The result is cached on disk for the next start.

    Args:
        dataset_name (`str`, defaults to `"digits"`): A Hub id, a folder, a file or `"digits"`. A folder has the layout
            of a Hub repository, or images, optionally in a sub-folder for each class; if all folders at the first
            level are named train, test, val, valid or validation, they are splits. A file is a .zip of such a folder,
            .npz, .npy, .parquet or .arrow, whose arrays may have any number of channels. `"digits"` are scikit-learn's 1,797 handwritten 8x8 digits. They need no
            network and have the split `"train"` only.
        dataset_config_name (`str`, *optional*): The configuration, for a dataset with several.
        train_data_dir (`str` or `os.PathLike`, *optional*): A folder or file, instead of `dataset_name`.
        split (`str`, defaults to `"train"`): The split, or a slice in the syntax of `datasets`: `"train[:1000]"`.
        image_column, label_column (`str`, *optional*): By default columns are found by their features: an `Image` for
            the images; a `ClassLabel`, or else an integer or string column whose values repeat or whose name is
            label, labels or y, for the labels. `label_column="none"` reads no labels.
        conditioning_column (`str`, *optional*): A second column of images, of the same size, that is read as
            `conditioning_images`. In a folder it is a column of file names in its metadata, such as `conditioning_image`
            or `conditioning_image_file_name`; these files are then no images of their own. Images are then cropped
            at their center, as these are.
        condition_columns (`str` or sequence of `str`, *optional*): Columns of numbers, of 0 and 1, of bools, or of lists
            of labels, such as `"age,smiling"`, that are read as `conditions`. A list of names or ids becomes a condition
            for each label, 1 where the image has it; lists of 0 and 1, or of floats, become one for each position.
        drop_missing (`bool`, defaults to `False`): Leave out images without a value in these columns, instead of raising
            an error.
        resolution (`int` or `tuple[int, int]`, *optional*): Side of square images in pixels, or height and width. Not
            needed if all images have one size.
        center_crop (`bool`, defaults to `False`): Crop images of another aspect ratio at their center. By default the
            position is pseudo-random and depends only on the bytes of the file.
        classes (`str` or sequence of `str` or `int`, *optional*):
            Names or indices of the classes to keep, such as `"cat,frog"`. They are relabeled 0, 1, ... in this order.
        max_samples (`int`, *optional*): Maximum number of images. A random subset is taken, always the same one.
        channels (`int`, *optional*): 1 (gray), 2 (gray and alpha), 3 (RGB) or 4 (RGBA), to which pictures are converted,
            or the number of pages of a picture, each of which becomes a channel. Arrays keep their channels, in the first
            axis or in the last: the one of this length or, if it is not given, of the length 1 or 3, or that is clearly the
            shortest. Defaults to 1 if all pictures are gray, else to 3, and for arrays to the channels that they have.
        conditioning_channels (`int`, *optional*): The same for the conditioning images.
        value_range (`tuple[float, float]` or `"measured"`, *optional*): Keep values of any depth as float32 in these
            limits, or in those of the data's own smallest and largest value, instead of scaling them to 8 bits. By default
            floating-point values are kept as measured, and others are scaled. Conditioning images are always of 8 bits.
        cache_dir (`str` or `os.PathLike`, *optional*): Folder for the caches of `datasets` and of the decoded images.
            Defaults to their own: for the images `$TINY_DIFFUSERS_CACHE` or `$HF_HOME/tiny_diffusers`.
        require_labels (`bool`, defaults to `False`): Raise an error if an image has no label.

    Returns:
        [`ImageData`]: Images of shape `(N, C, height, width)`, in the order of the dataset: uint8, or float32 with the
            range of their values.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If the dataset, split, column, class or label does not exist, if the
            images differ in size and `resolution` is None, if a condition is missing or no number, or if more than 1% of
            the images are broken.
    """
    resolution = _height_and_width(resolution)
    if max_samples is not None and max_samples < 1:
        raise UserError(f"max_samples must be at least 1, not {max_samples}.")
    for name, value in (("channels", channels), ("conditioning_channels", conditioning_channels)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, or None for those of the dataset, not {value}.")
    value_range = None if value_range is None else _limits(value_range)
    if train_data_dir is not None and dataset_name != "digits":
        raise UserError(f"dataset_name '{dataset_name}' and train_data_dir '{train_data_dir}': give only one.")

    options = {"resolution": resolution, "center_crop": center_crop, "channels": channels}
    if conditioning_column is not None:
        options["conditioning_channels"] = conditioning_channels
    if value_range is not None:
        options["value_range"] = value_range
    has_labels = label_column != "none"
    condition_columns = as_columns(condition_columns)
    if drop_missing and not condition_columns:
        raise UserError("drop_missing leaves out images without a condition: give condition_columns, or leave it out.")

    def decode(source: Source, scratch: Path | None = None) -> ImageData:
        if not has_labels:
            source = replace(source, labels=None, class_names=None)
        selected = select(source, classes, max_samples, require_labels, drop_missing)
        return decode_source(selected, **options, scratch=scratch)

    if train_data_dir is None and dataset_name == "digits":
        source = read_digits(split)
        if conditioning_column is not None:
            raise unknown("conditioning_column of 'digits'", conditioning_column, source.columns)
        if condition_columns:
            raise UserError(f"'digits' has no condition column {condition_columns[0]}: it has labels alone.")
        if Path("digits").exists():
            source.notes.append("'digits' is the embedded dataset: name the folder or file of this name ./digits")
        return decode(source)

    name = dataset_name if train_data_dir is None else os.fspath(train_data_dir)
    if not name:
        raise UserError("The dataset's name is empty: give a Hub id such as ylecun/mnist, a folder, or digits.")
    path = local_path(name)
    if path is None and train_data_dir is not None:
        raise UserError(f"There is no folder '{name}'.")

    # Local files are listed without `datasets`, so a cache hit never opens them. A Hub dataset must be opened first.
    location = (name, path, dataset_config_name, split, cache_dir)
    reader, opened = None, None
    if path is None:
        opened = open_dataset(*location)
        files = [Path(file["filename"]) for file in opened[0].cache_files]
    else:
        reader, files = _choose_reader(path, name, dataset_config_name)
    columns = (image_column, label_column if has_labels else None, conditioning_column)
    root = cache_root(cache_dir)
    is_square = resolution is not None and resolution[0] == resolution[1]
    # The folder is part of the key: its parent may hold the same files, in other classes.
    request = (
        path and os.fspath(path),
        dataset_config_name,
        split,
        columns,
        has_labels,
        classes,
        max_samples,
        options | {"resolution": resolution[0] if is_square else resolution},  # in this order
    )
    if condition_columns:
        request += (condition_columns, drop_missing)
    directory = root / cache_key(files, *request)
    data = read_cache(directory)
    if data is not None and not (require_labels and data.labels is None):
        return data

    if reader is None:
        dataset, splits = opened or open_dataset(*location)
        source = read_dataset(dataset, splits, name, path, split, *columns, condition_columns, cache_dir)
    else:
        source = reader(path, name, split, *columns, condition_columns)
    return write_cache(directory, decode(source, root))


def _height_and_width(resolution: int | Sequence[int] | None) -> tuple[int, int] | None:
    """Returns the height and width that `resolution` stands for, or None if it is None."""
    if resolution is None:
        return None
    sides = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
    if len(sides) != 2 or min(sides) < 1:
        raise UserError(f"resolution must be at least 1, or a height and a width of at least 1, not {resolution}.")
    return sides


def _limits(value_range: Sequence[float | str]) -> tuple[float, float] | Literal["measured"]:
    """Returns the limits that `value_range` stands for, which may be given as text, or "measured"."""
    words = [value_range] if isinstance(value_range, str) else list(value_range)
    if words == ["measured"]:
        return "measured"
    try:
        low, high = map(float, words)
    except ValueError:
        low = high = math.nan
    if not -math.inf < low < high < math.inf:
        given = " ".join(map(str, words))
        raise UserError(f"value_range must be two finite numbers, the lower one first, or 'measured', not '{given}'.")
    return low, high


def _choose_reader(path: Path, name: str, config: str | None) -> tuple[Callable | None, list[Path]]:
    """Returns the reader of a local folder or file, None if `datasets` reads it, and all of its files."""
    if path.is_dir():
        files = list_files(path)
        return None if config is not None or is_repository(files) else read_folder, files
    readers = {".zip": read_folder, ".npz": read_arrays, ".npy": read_arrays, ".parquet": None, ".arrow": None}
    if path.suffix.lower() not in readers or not path.is_file():
        raise UserError(f"'{name}' is no dataset: give a folder, or a file of {', '.join(readers)}.")
    return readers[path.suffix.lower()], [path]
