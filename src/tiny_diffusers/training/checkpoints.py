"""
Checkpoints that survive a crash at any moment.

A checkpoint is a folder that is staged under another name, flushed to the disk, sealed with a manifest of sizes and
checksums, and published with one rename. What is not whole is recognised, named and passed over. Tensors lie in
safetensors, all else in JSON: nothing that is read back can run code.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..errors import UserError


MANIFEST = "manifest.json"
_STAGING = ".staging-"


def publish(directory: Path, write: Callable[[Path], None]) -> None:
    """
    Makes the folder `directory` appear whole or not at all.

    Args:
        directory (`Path`): The folder to publish; an older one of that name is replaced.
        write (`Callable[[Path], None]`): Writes the content into the staging folder that it is given.
    """
    staging = directory.with_name(_STAGING + directory.name)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    write(staging)

    files = sorted(path for path in staging.rglob("*") if path.is_file())
    manifest = {
        path.relative_to(staging).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)} for path in files
    }
    (staging / MANIFEST).write_text(json.dumps(manifest, indent=2))
    for path in [*files, staging / MANIFEST]:
        _fsync(path)
    for folder in sorted({path.parent for path in files} | {staging}, reverse=True):
        _fsync(folder)

    if directory.exists():  # a checkpoint of the very same step: one that was found damaged, or is the same again
        shutil.rmtree(directory)
    os.replace(staging, directory)
    _fsync(directory.parent)


def damage(directory: Path) -> str | None:
    """What is wrong with a checkpoint folder, in words, or None if it is whole."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in manifest.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"its {MANIFEST} cannot be read"
    if not expected:
        return f"its {MANIFEST} is empty"
    for name, (size, sha256) in expected.items():
        path = directory / name
        if not path.resolve().is_relative_to(directory.resolve()):
            return f"its {MANIFEST} names a file outside the folder"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if _sha256(path) != sha256:
            return f"{name} does not match its checksum"
    return None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The published `checkpoint-N` folders of a run, the oldest first."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output_dir.glob("checkpoint-*")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match and path.is_dir())]


def find_checkpoint(output_dir: Path, name: str, warn: Callable[[str], None]) -> Path | None:
    """
    The checkpoint to resume from.

    Args:
        output_dir (`Path`): The run's folder.
        name (`str`): `"latest"`, a folder's name in `output_dir`, or a path.
        warn (`Callable[[str], None]`): Told of each damaged checkpoint that is passed over.

    Returns:
        `Path` or None: None if `name` is `"latest"` and there is none yet.

    Raises:
        UserError: If a checkpoint is named that does not exist or is damaged, or if all are damaged.
    """
    if name != "latest":
        path = next((path for path in (Path(name), output_dir / name) if path.is_dir()), None)
        if path is None:
            have = ", ".join(path.name for path in list_checkpoints(output_dir)) or "none"
            raise UserError(f"--resume_from_checkpoint: there is no checkpoint '{name}'; {output_dir} has: {have}.")
        reason = damage(path)
        if reason:
            raise UserError(f"--resume_from_checkpoint: {path} is damaged ({reason}); use 'latest' or an earlier one.")
        return path
    checkpoints = list_checkpoints(output_dir)
    for path in reversed(checkpoints):
        reason = damage(path)
        if reason is None:
            return path
        warn(f"{path.name} is damaged ({reason}): passed over for the one before it.")
    if checkpoints:
        raise UserError(f"Every checkpoint in {output_dir} is damaged: start again with --overwrite_output_dir.")
    return None


def prune(output_dir: Path, limit: int | None, keep: Path | None = None) -> None:
    """Deletes the oldest checkpoints beyond `limit` (but not `keep`, the best one), and what crashed writes have left."""
    for leftover in output_dir.glob(_STAGING + "*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if limit is not None:
        for path in list_checkpoints(output_dir)[:-limit]:
            if path != keep:
                shutil.rmtree(path)


def save_optimizer(optimizer: torch.optim.Optimizer, directory: Path) -> None:
    """Writes an optimiser's state: tensors to `optimizer.safetensors`, hyperparameters to `optimizer.json`."""
    directory.mkdir(parents=True, exist_ok=True)
    state = optimizer.state_dict()
    tensors, scalars = {}, {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{key}"] = value.detach().contiguous().cpu()
            else:
                scalars[f"{index}.{key}"] = value
    save_file(tensors, directory / "optimizer.safetensors")
    groups = [{k: v for k, v in group.items() if not callable(v)} for group in state["param_groups"]]
    (directory / "optimizer.json").write_text(json.dumps({"scalars": scalars, "param_groups": groups}))


def load_optimizer(optimizer: torch.optim.Optimizer, directory: Path) -> None:
    """Reads back what [`save_optimizer`] wrote."""
    saved = json.loads((directory / "optimizer.json").read_text())
    state: dict[int, dict] = {}
    for name, value in {**load_file(directory / "optimizer.safetensors"), **saved["scalars"]}.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})
    # Fused optimisers walk the memory, so a moment must lie as its weight does (channels-last, say), not only match it.
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                entries[key] = torch.empty_like(parameter).copy_(value)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    if path.is_file():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    elif hasattr(os, "O_DIRECTORY"):  # Windows opens no folders; its renames are durable without
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
