"""
Files that appear complete or not at all, and the reading of files that anyone may have written.

A folder is written under another name, flushed to the disk, sealed with a manifest of sizes and checksums, and appears by
one rename: damage to it is recognized. Nothing that is read back can run code.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError


MANIFEST = "manifest.json"  # of a sealed folder
STAGING = ".staging-"
_LEFT_AFTER = 3600  # seconds after which a folder that is being written was left by a killed writer
_MAX_YAML_VALUES = 100_000


# Writing


def publish(directory: Path, write: Callable[[Path], None]) -> None:
    """
    Makes the folder `directory` appear complete or not at all.

    Args:
        directory (`Path`): The folder to publish; an older one of that name is replaced.
        write (`Callable[[Path], None]`): Writes the content into the staging folder that it is given.

    Raises:
        OSError: If the disk is full, or another process has published the same folder meanwhile.
    """
    staging, old = staging_path(directory), staging_path(directory)
    staging.mkdir(parents=True)
    for leftover in leftovers(directory.parent):
        with contextlib.suppress(OSError):  # its writer is done, after all
            if time.time() - leftover.stat().st_mtime > _LEFT_AFTER:
                remove(leftover)
    try:
        write(staging)
        seal(staging)
        if directory.exists():  # a damaged checkpoint of the same step, or the same one again
            os.replace(directory, old)
        os.replace(staging, directory)
        flush(directory.parent)
    finally:
        with contextlib.suppress(OSError):  # another process has published, or there is nothing to put back
            os.replace(old, directory)
        for leftover in (staging, old):  # on a full disk, half a checkpoint is in everyone's way
            shutil.rmtree(leftover, ignore_errors=True)


def staging_path(path: Path) -> Path:
    """Returns a name beside `path` that is this writer's own, for what is not published yet or no longer."""
    return path.with_name(f"{STAGING}{path.name}-{uuid.uuid4().hex[:8]}")


def leftovers(folder: Path) -> list[Path]:
    """Lists what a kill has left in a folder of writing and deleting; another process may still be at it."""
    names = re.compile(rf"{re.escape(STAGING)}.+-[0-9a-f]{{8}}")
    return [path for path in folder.glob(STAGING + "*") if names.fullmatch(path.name)]


def seal(folder: Path) -> None:
    """Writes the manifest of a folder and flushes everything to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)} for path in files
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2))
    for path in [*files, folder / MANIFEST]:
        flush(path)
    for parent in sorted({path.parent for path in files} | {folder}, reverse=True):
        flush(parent)


def find_damage(directory: Path) -> str | None:
    """Checks a sealed folder against its manifest; returns what is wrong with it, or None."""
    try:
        manifest = load_json(read_text(directory / MANIFEST))
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in manifest.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"its {MANIFEST} cannot be read"
    if not expected:
        return f"its {MANIFEST} is empty"
    for name, (size, sha256) in expected.items():
        path = directory / name
        try:
            if not path.resolve().is_relative_to(directory.resolve()):
                return f"its {MANIFEST} names a file outside the folder"
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if _sha256(path) != sha256:
                return f"{name} does not match its checksum"
        except (OSError, ValueError) as error:  # a bad sector, or no valid file name
            return f"{name!r} cannot be read ({error})"
    return None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """
    Makes the file `path` appear complete or not at all: yields where to write it meanwhile. A link of that name is
    replaced, not followed.
    """
    staging = staging_path(path)
    try:
        yield staging
        flush(staging)
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)


def replace_file(path: Path, text: str) -> None:
    """Makes the text file `path` appear complete or not at all."""
    with replacing(path) as staging:
        staging.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    """Deletes a file or a folder; of a folder, a kill leaves all or nothing under its name."""
    if path.is_dir() and not path.is_symlink():
        gone = path if path.name.startswith(STAGING) else path.rename(staging_path(path))
        shutil.rmtree(gone, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_disk_full(error: BaseException) -> bool:
    """Checks that the system had no space left for a file."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def flush(path: Path) -> None:
    """Flushes a file or a folder to the disk."""
    if path.is_file():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    elif hasattr(os, "O_DIRECTORY"):  # Windows opens no folders; its renames are durable without
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# Reading


def read_text(path: Path) -> str:
    """
    Reads a text file that anyone may have written; a pipe would be waited for without end.

    Raises:
        OSError: If it is no regular file.
        ValueError: If it is no UTF-8.
    """
    if path.exists() and not path.is_file():
        raise OSError(f"'{path}' is no regular file")
    return path.read_text(encoding="utf-8")


def load_json(text: str | bytes) -> Any:
    """
    Parses JSON.

    Raises:
        ValueError: If it is not valid, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


class _Loader(yaml.SafeLoader):
    """YAML 1.2's booleans, true and false: `mixed_precision: no` is a word."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":bool")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")


def load_yaml(text: str) -> Any:
    """
    Parses YAML.

    Raises:
        yaml.YAMLError: If it is not valid, or if its aliases expand to more values than any settings have.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _count_values(node, {}) > _MAX_YAML_VALUES:
            raise yaml.YAMLError(f"it expands to more than {_MAX_YAML_VALUES:,} values")
        return loader.construct_document(node)
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    finally:
        loader.dispose()


def _count_values(node: yaml.Node, counts: dict[yaml.Node, int]) -> int:
    """Counts the values of a document with each alias expanded; `counts` keeps those of the nodes that are done."""
    if node not in counts:
        counts[node] = _MAX_YAML_VALUES  # while its parts are counted: an alias of a node within itself has no end
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        pairs = (part if isinstance(part, tuple) else (part,) for part in parts)
        counts[node] = 1 + sum(_count_values(part, counts) for pair in pairs for part in pair)
    return counts[node]


def read_mapping(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """Reads names and values that a run has left; empty if there is no such file."""
    try:
        return dict(parse(read_text(path)) or {}) if path.exists() else {}
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())}): delete it, and try again.") from error
