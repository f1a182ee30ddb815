"""
Paths of this machine, which stay on it: what is shared names a folder by its last name.

A hidden file beside it, which is not pushed, keeps the path for whoever resumes or repeats the work here.
"""

import json
import os
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .files import load_json, read_text, replace_file


PATHS_FILE = ".paths.json"  # hidden files are not pushed


def local_path(name: str | os.PathLike) -> Path | None:
    """Returns the absolute path of a data set or checkpoint that is a folder or file here; None for a Hub id."""
    if not os.fspath(name):  # which Path takes for the working directory
        return None
    path = Path(name).expanduser()
    return path.resolve() if path.is_dir() or (path.exists() and path.suffix) else None


def is_below_here(name: str | os.PathLike) -> bool:
    """Checks that a path is relative to the working directory and stays below it."""
    return not Path(name).is_absolute() and not str(name).startswith("~") and ".." not in Path(name).parts


def public_name(name: str | os.PathLike) -> str:
    """Returns the last name of a local path, and any other name unchanged."""
    path = local_path(name)
    if path is None and not is_below_here(name):
        path = Path(name)
    return str(name) if path is None else path.name


def public_command(words: Iterable[str]) -> str:
    """Returns a command line in which local paths are last names."""
    public = []
    for word in words:
        flag, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        public.append(flag + equals + public_name(value))
    return shlex.join(public)


def keep_paths(folder: Path, paths: Mapping[str, str]) -> None:
    """Keeps named paths in a hidden file of a folder; deletes it if there are none."""
    file = folder / PATHS_FILE
    if paths:
        replace_file(file, json.dumps(dict(paths), indent=2) + "\n")
    else:
        file.unlink(missing_ok=True)


def restore_paths(folder: Path, names: Mapping[str, Any]) -> dict[str, Any]:
    """Puts the paths that a folder keeps in place of the names that they were shortened to, unless these were changed."""
    kept = kept_paths(folder)
    return {name: kept[name] if _names(value, kept.get(name)) else value for name, value in names.items()}


def _names(value: Any, path: str | None) -> bool:
    return path is not None and value == Path(path).name


def kept_paths(folder: Path) -> dict[str, str]:
    """Reads the paths that [`keep_paths`] has kept; none if there is no such file, or if it is damaged."""
    try:
        paths = load_json(read_text(folder / PATHS_FILE))
        return {str(name): path for name, path in paths.items() if isinstance(path, str)}
    except (OSError, ValueError, AttributeError):
        return {}
