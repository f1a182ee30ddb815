"""
Reads local folders and .zip archives of images.

Every file that Pillow decodes is an image, or every .npy file if there is none, and its first sub-folder is its class.
If every folder at the first level is named train, test, val, valid or validation, these are splits and the next level
holds the classes. Labels in metadata.csv, .jsonl or .parquet, or in StyleGAN's dataset.json, replace the classes. Notes
count and name every image that is not loaded.
"""

import contextlib
import csv
import io
import os
import posixpath
import zipfile
from collections import Counter, deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import UserError, first_line, unknown
from ..files import load_json
from .conditions import parse_conditions
from .sources import (
    LABEL_NAMES,
    SPLITS,
    Source,
    decodes,
    index_labels,
    max_classes,
    select_splits,
    unread_labels,
)


_TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet", "dataset.json")
_JUNK = ("__MACOSX", "__pycache__")  # skipped like hidden files; .ipynb_checkpoints is hidden by its dot
# Pillow knows these suffixes but reads no pixels of such files, or only by running another program.
_NOT_PIXELS = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
_MAX_MEMBER = 2**28  # bytes of a member of an archive, unpacked


@dataclass
class _File:
    """File of a folder or member of an archive: `name` is relative to the folder, as if archives were unpacked."""

    name: str
    path: Path | zipfile.Path
    split: str = "train"
    label: str | None = None  # its class by its sub-folder
    is_stray: bool = False  # beside the folders of classes


def list_files(folder: Path) -> list[Path]:
    """Lists all regular files of a folder and its sub-folders, sorted, without hidden ones. Links are followed."""
    return _walk(folder)[0]


def is_repository(files: list[Path]) -> bool:
    """Checks for parquet or arrow files, or webdataset archives without images beside them: `datasets` reads these."""
    suffixes = {file.suffix.lower() for file in files if file.name not in _TABLES}
    return bool(suffixes & {".parquet", ".arrow"}) or (".tar" in suffixes and not any(map(is_image, files)))


def is_image(file: Path | zipfile.Path | str) -> bool:
    """Checks for a suffix of a format that Pillow reads."""
    form = Image.registered_extensions().get(posixpath.splitext(str(file))[1].lower())
    return form in Image.OPEN and form not in _NOT_PIXELS


def relative_name(file: Path, folder: Path | None) -> str:
    """Returns the path of a file relative to the folder, or the whole path if it lies elsewhere."""
    return (file.relative_to(folder) if folder is not None and file.is_relative_to(folder) else file).as_posix()


def abbreviate(names: list[str]) -> str:
    """Joins the first five names, such as "a, b, c, d, e and 7 more"."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")


def read_folder(
    folder: Path,
    name: str,
    split: str,
    image_column: str | None,
    label_column: str | None,
    conditioning_column: str | None,
    condition_columns: tuple[str, ...] = (),
) -> Source:
    """
    Reads the classes, splits and metadata of a folder of images and prepares the reading of its images.

    Args:
        folder (`Path`): The resolved folder, or a .zip archive.
        name (`str`): The folder as the user spelled it.
        split (`str`): The split, or a slice such as `"train[:1000]"`.
        image_column, label_column, conditioning_column (`str`, *optional*), condition_columns (`tuple[str]`): As in
            [`load_images`]. The only image column is `"image"`.

    Returns:
        [`Source`]: The images of the split, sorted by their names.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If there is no image, or if the split or a column does not exist.
    """
    images, tables, notes = _find_images(folder, name)
    records, read = _read_tables(tables, conditioning_column, notes)
    pairs = None
    if conditioning_column is not None:
        images, pairs = _take_conditioning_images(images, records, conditioning_column, name)
    _assign_splits_and_classes(images, notes)
    if pairs is not None and len({image.label for image in images}) == 1:  # a folder apart from that of their pairs
        for image in images:
            image.label = None
    columns = _read_columns(images, records, read, notes)
    classes = [image.label for image in images]
    for column in condition_columns:
        if column not in columns:
            raise unknown(f"condition_columns of '{name}'", column, columns or ["a column of metadata.csv"])
    measured = {column: columns[column] for column in condition_columns}
    if label_column not in measured:
        columns = {column: values for column, values in columns.items() if column not in measured}
    column = _choose_label_column(columns, classes, label_column, name, notes)
    if image_column not in (None, "image"):
        if image_column in columns or image_column in measured:
            raise UserError(f"image_column '{image_column}' of '{name}' holds no images: choose one of image.")
        raise unknown(f"image_column of '{name}'", image_column, ["image", *columns])

    labels = columns[column] if column else None
    if labels is classes:
        names = sorted(set(classes) - {None})
        notes.append(f"sub-folders read as classes, {len(names):,}: {abbreviate(names)}")
        if len(names) == 1 and any(f"{names[0]}/" in posixpath.dirname(image.name) for image in images):
            notes.append(f"'{names[0]}' is the only class: if its sub-folders are the classes, name that folder")
    strays = [image.name for image in images if image.is_stray] if labels is classes else []
    if strays:
        notes.append(f"images beside the class folders, left out, {len(strays):,}: {abbreviate(strays)}")
    rows = {each: [] for each in dict.fromkeys(SPLITS.values()) if any(image.split == each for image in images)}
    for row, image in enumerate(images):
        if not (strays and image.is_stray):
            rows[image.split].append(row)
    conditions, condition_names = parse_conditions(measured, name) if measured else (None, None)
    chosen = select_splits({each: np.array(numbers, np.int64) for each, numbers in rows.items()}, split, name)
    indices, class_names = (None, None) if labels is None else index_labels(labels)
    return Source(
        name=folder.stem if folder.is_file() else folder.name,
        split=split,
        columns=["image", *columns, *(column for column in measured if column not in columns)],
        read=lambda numbers: [{"bytes": None, "path": images[number].path} for number in numbers],
        rows=chosen,
        labels=None if indices is None else indices[chosen],
        class_names=class_names,
        folder=folder,
        notes=notes,
        read_conditioning=None if pairs is None else lambda numbers: [pairs[images[row].name] for row in numbers],
        conditions=None if conditions is None else conditions[chosen],
        condition_names=condition_names,
    )


def _choose_label_column(
    columns: dict[str, list], classes: list[str | None], given: str | None, name: str, notes: list[str]
) -> str | None:
    """
    Chooses the given column, the likeliest one of the tables, or the classes by sub-folders.

    Adds the classes to `columns` as "label" if they are chosen, and the choice to `notes` if there are several.
    """
    found = []
    has_classes = len(set(classes) - {None}) > 1  # a table that leaves out some images does not replace these
    for column, values in columns.items():
        if not _is_discrete(values) or (has_classes and None in values):
            continue
        if 0 < len(set(values) - {None}) <= max_classes(len(values), column in LABEL_NAMES):
            found.append(column)
    found.sort(key=lambda column: column not in LABEL_NAMES)
    if not found and given is None:
        notes += unread_labels(columns)
    if any(classes) and ((given is None and not found) or (given == "label" and "label" not in columns)):
        columns["label"] = classes
        found = ["label"]
    if given is not None:
        if given not in columns:
            raise unknown(f"label_column of '{name}'", given, ["image", *columns])
        if not _is_discrete(columns[given]):
            raise UserError(
                f"label_column '{given}' of '{name}' holds neither integers nor strings: choose another column of "
                f"{', '.join(columns)}."
            )
        found = [given]
    if len(found) > 1:
        notes.append(f"label_column: '{found[0]}' was chosen from {', '.join(found)}")
    return found[0] if found else None


def _is_discrete(values: Iterable) -> bool:
    return all(value is None or isinstance(value, int | str) for value in values)


def _find_images(folder: Path, name: str) -> tuple[list[_File], list[_File], list[str]]:
    """Finds the images in a folder, sorted by name, and the tables of metadata. Also says what is left out."""
    files, hidden, unread = _walk(folder) if folder.is_dir() else ([folder], [], [])
    folder = folder if folder.is_dir() else folder.parent
    parents = Counter(file.parent for file in files if file.suffix.lower() == ".zip")
    candidates, notes, failed = [], [], []
    for file in files:
        if file.suffix.lower() != ".zip":
            candidates.append(_File(relative_name(file, folder), file))
            continue
        # A single archive is read as if unpacked in place; each of several as a folder of its name.
        place = relative_name(file.parent if parents[file.parent] == 1 else file.with_suffix(""), folder)
        try:
            members, unseen, refused = _list_members(file)
        except (OSError, zipfile.BadZipFile, ValueError) as error:
            failed.append(f"{relative_name(file, folder)} ({first_line(error)})")
            continue
        candidates += [_File(posixpath.normpath(posixpath.join(place, each)), path) for each, path in members]
        hidden += unseen
        failed += [f"{relative_name(file, folder)}: {each}" for each in refused]

    tables, images, unsure = [], [], []
    for file in candidates:
        kind = tables if posixpath.basename(file.name) in _TABLES else images if is_image(file.name) else unsure
        kind.append(file)
    with ThreadPoolExecutor() as pool:  # where the suffix tells nothing, the content does
        decoded = list(pool.map(decodes, [file.path for file in unsure]))
        concealed = [file for file, image in zip(hidden, pool.map(decodes, hidden), strict=True) if image]
    images += [file for file, image in zip(unsure, decoded, strict=True) if image]
    others = [file for file, image in zip(unsure, decoded, strict=True) if not image]
    images = images or [file for file in others if file.name.lower().endswith(".npy")]
    failed += [file.name for file in others if file not in images]
    images.sort(key=lambda file: file.name)

    if failed:
        notes.append(f"files that are not images, left out: {abbreviate(failed)}")
    if concealed:
        names = [relative_name(Path(str(file)), folder) for file in concealed]
        notes.append(f"hidden images, left out, {len(names):,}: {abbreviate(names)}")
    if unread:
        names = [relative_name(file, folder) for file in unread]
        notes.append(f"folders not entered (read already, or no permission), {len(names):,}: {abbreviate(names)}")
    if not images:
        raise UserError(f"The folder '{name}' cannot be read as a dataset: it holds no images. {'; '.join(notes)}")
    return images, tables, notes


def _walk(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """
    Lists the regular files of a folder, sorted; the hidden ones; and the sub-folders that were not entered.

    Links are followed once each, after all real folders: a link to what is already read, or to a folder that holds
    this one, is not entered. Hidden links are not followed.
    """
    seen = {os.fspath(parent) for parent in folder.resolve().parents}
    visible, hidden, unread = [], [], []
    pending, concealed = deque([folder]), deque()
    while pending or concealed:
        is_hidden = not pending
        parent = (pending or concealed).popleft()
        real = os.path.realpath(parent)
        if real in seen:
            unread.append(parent)
            continue
        seen.add(real)
        try:
            entries = list(os.scandir(parent))
        except OSError:
            unread.append(parent)
            continue
        for entry in entries:
            skip = is_hidden or entry.name.startswith(".") or entry.name in _JUNK
            is_folder = os.path.isdir(entry)  # unlike entry.is_dir(), of a link to itself, too
            if is_folder and not entry.is_symlink():
                (concealed if skip else pending).appendleft(Path(entry))
            elif is_folder and not skip:
                pending.append(Path(entry))
            elif os.path.isfile(entry):  # no pipe, no device, no broken link
                (hidden if skip else visible).append(Path(entry))
    return sorted(visible), sorted(hidden), sorted(unread)


def _list_members(file: Path) -> tuple[list[tuple[str, zipfile.Path]], list[zipfile.Path], list[str]]:
    """Lists the members of an archive by name, the hidden ones, and the refused ones with the reason."""
    archive = zipfile.ZipFile(file)
    root = zipfile.Path(archive)
    visible, hidden, refused = {}, [], []
    for info in archive.infolist():
        parts = info.filename.split("/")
        if info.is_dir():
            continue
        if ".." in parts or not parts[0]:
            refused.append(f"{info.filename} (outside of the archive)")
        elif info.file_size > _MAX_MEMBER:
            refused.append(f"{info.filename} (more than {_MAX_MEMBER:,} bytes)")
        elif any(part.startswith(".") or part in _JUNK for part in parts):
            hidden.append(root / info.filename)
        else:
            visible[info.filename] = root / info.filename
    # One folder around everything is left out: `zip -r data.zip data` adds it.
    tops = {name.partition("/")[0] for name in visible}
    if len(tops) == 1 and all("/" in name for name in visible) and not tops & set(SPLITS):
        visible = {name.partition("/")[2]: path for name, path in visible.items()}
    return list(visible.items()), hidden, refused


def _assign_splits_and_classes(images: list[_File], notes: list[str]) -> None:
    """Sets the split and class of each image by its folders, marks those beside the classes, and adds to `notes`."""
    tops = sorted({image.name.partition("/")[0] for image in images if "/" in image.name})
    has_splits = bool(tops) and all(top.lower() in SPLITS for top in tops)
    for image in images:
        *folders, _ = image.name.split("/")
        if has_splits and folders:
            image.split = SPLITS[folders.pop(0).lower()]
        image.label = folders[0] if folders else None
    if has_splits:
        notes.append(f"folders read as splits, with classes below them: {abbreviate(tops)}")

    for split in ("train", "validation", "test"):
        within = [image for image in images if image.split == split and image.label is not None]
        beside = [image for image in images if image.split == split and image.label is None]
        if len(within) < len(beside):
            if within:
                notes.append(f"most images of '{split}' lie in no sub-folder: its sub-folders are not read as classes")
            for image in within:
                image.label = None
        elif within:
            for image in beside:
                image.is_stray = True


def _read_tables(
    tables: list[_File], conditioning_column: str | None, notes: list[str]
) -> tuple[dict[str, dict], list[str]]:
    """
    Reads the rows of the tables by the names of their images, and the tables' own names. Adds to `notes`. The file names of
    a conditioning column, which the Hub's image folders call `*_file_name`, are made relative to the folder as well.
    """
    records, read = {}, []
    for table in tables:
        content, reason = _read_table(table)
        if reason is not None:
            notes.append(f"{table.name}, left out: {reason}")
            continue
        place = posixpath.dirname(table.name)
        for row in content.values():
            for column in row.keys() & {conditioning_column, f"{conditioning_column}_file_name"}:
                value = row.pop(column)
                row[conditioning_column] = _join(place, str(value)) if value not in (None, "") else None
        records |= {_join(place, name): row for name, row in content.items()}
        read.append(table.name)
    return records, read


def _join(place: str, name: str) -> str:
    return posixpath.normpath(posixpath.join(place, name))


def _take_conditioning_images(
    images: list[_File], records: dict[str, dict], column: str, name: str
) -> tuple[list[_File], dict[str, dict]]:
    """
    Takes the conditioning images out of the rows, and out of the images unless they have a row of their own. Returns the
    other images, and the encoded conditioning image of each by its name. One that is missing has no bytes, and says so in
    its path.
    """
    columns = dict.fromkeys(each for row in records.values() for each in row)
    if column not in columns:
        raise unknown(
            f"conditioning_column of '{name}'", column, columns or ["a column of file names in metadata.csv"]
        )
    paths = {image.name: image.path for image in images}
    named = {image: row.pop(column, None) for image, row in records.items()}
    used = paths.keys() & set(named.values())
    if not used:
        raise UserError(
            f"conditioning_column '{column}' of '{name}' holds no images: it must hold the names of files in the folder."
        )
    images = [image for image in images if image.name in records or image.name not in used]

    def encoded(image: _File) -> dict:
        pair = named.get(image.name)
        if pair in paths:
            return {"bytes": None, "path": paths[pair]}
        reason = f"{image.name} (has no conditioning image)" if pair is None else f"{pair} (no such file)"
        return {"bytes": b"", "path": reason}

    return images, {image.name: encoded(image) for image in images}


def _read_columns(
    images: list[_File], records: dict[str, dict], tables: list[str], notes: list[str]
) -> dict[str, list]:
    """Turns rows into one list of values for each column, None for an image without a value. Adds to `notes`."""
    if any(table.endswith(".json") for table in tables):
        for image in images:  # also without any label: StyleGAN's and EDM's sub-folders are no classes
            image.label = None
    columns = dict.fromkeys(column for row in records.values() for column in row)
    listed = sum(image.name in records for image in images)
    if tables and listed < len(images):
        notes.append(f"{abbreviate(tables)} lists {listed:,} of {len(images):,} images: the others are kept")
    if listed < len(records):
        notes.append(f"{abbreviate(tables)} lists {len(records) - listed:,} files that are no images here")
    return {column: [records.get(image.name, {}).get(column) for image in images] for column in columns}


def _read_table(table: _File) -> tuple[dict[str, dict], str | None]:
    """Reads the rows of a table by their file names, with all other columns. Also returns why it cannot be read."""
    try:
        if table.name.endswith(".parquet"):
            import pyarrow.parquet

            rows = pyarrow.parquet.read_table(io.BytesIO(table.path.read_bytes())).to_pylist()
        else:
            text = table.path.read_bytes().decode("utf-8-sig")
            if table.name.endswith(".csv"):
                rows = _convert(list(csv.DictReader(io.StringIO(text, newline=""))))
            elif table.name.endswith(".jsonl"):
                rows = [load_json(line) for line in text.splitlines() if line.strip()]
            else:  # StyleGAN's and EDM's {"labels": [["00000/img.png", 3], ...]}, or null
                rows = [{"file_name": name, "label": label} for name, label in load_json(text)["labels"] or ()]
        return {str(row.pop("file_name")): row for row in rows}, None
    except KeyError as error:
        return {}, f"it has no {error}"
    except Exception as error:  # pyarrow's errors have no common base class
        return {}, first_line(error)


def _convert(rows: list[dict]) -> list[dict]:
    """Converts the columns of a .csv to integers or floats if all of their values are, and "" to None."""
    columns = {}
    for column in rows[0] if rows else ():
        values = [row.get(column) or None for row in rows]
        for kind in (int, float) if column not in ("file_name", None) else ():
            with contextlib.suppress(ValueError):
                values = [None if value is None else kind(value) for value in values]
                break
        columns[column] = values
    columns.pop(None, None)  # more values than columns
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
