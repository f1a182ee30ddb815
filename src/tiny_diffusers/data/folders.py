"""Local folders: their files, and which of these are images."""

import os
from pathlib import Path

from PIL import Image


def list_files(folder: Path) -> list[Path]:
    """Lists all files in a folder and its sub-folders, sorted, without hidden files, pipes and broken links."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    return sorted(file for file in found if file.is_file())


def is_image(file: Path) -> bool:
    """Checks for a suffix that Pillow knows."""
    return file.suffix.lower() in Image.registered_extensions()


def is_metadata(file: Path) -> bool:
    """Checks for a metadata file, from which `datasets` reads more columns of an image folder."""
    return file.stem == "metadata"


def relative_name(file: Path, folder: Path | None) -> str:
    """Returns the path of a file relative to the folder, or the whole path if it lies elsewhere."""
    return (file.relative_to(folder) if folder is not None and file.is_relative_to(folder) else file).as_posix()


def abbreviate(names: list[str]) -> str:
    """Joins the first five names, such as "a, b, c, d, e and 7 more"."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")
