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
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..errors import UserError


MANIFEST = "manifest.json"
WEIGHTS = (
    "diffusion_pytorch_model.safetensors"  # diffusers' name, so that `from_pretrained` reads a checkpoint's networks
)
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
    try:
        write(staging)
        _seal(staging)
    except Exception:
        shutil.rmtree(staging, ignore_errors=True)  # on a full disk, half a checkpoint is in the way of everything
        raise

    if directory.exists():  # a checkpoint of the very same step: one that was found damaged, or is the same again
        old = directory.with_name(f"{_STAGING}old-{directory.name}")
        shutil.rmtree(old, ignore_errors=True)  # a kill has left one
        os.replace(directory, old)
    os.replace(staging, directory)
    _fsync(directory.parent)


def _seal(staging: Path) -> None:
    """Writes the manifest and flushes everything to the disk."""
    files = sorted(path for path in staging.rglob("*") if path.is_file())
    manifest = {
        path.relative_to(staging).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)} for path in files
    }
    (staging / MANIFEST).write_text(json.dumps(manifest, indent=2))
    for path in [*files, staging / MANIFEST]:
        _fsync(path)
    for folder in sorted({path.parent for path in files} | {staging}, reverse=True):
        _fsync(folder)


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Makes the file `path` appear whole or not at all; `write` is given the name to write to."""
    staging = path.with_name(_STAGING + path.name)
    write(staging)
    _fsync(staging)
    os.replace(staging, path)


def flush(path: Path) -> None:
    """Sees to it that what was appended to `path` outlives a power failure."""
    if path.exists():
        _fsync(path)


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
        try:
            if not path.resolve().is_relative_to(directory.resolve()):
                return f"its {MANIFEST} names a file outside the folder"
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if _sha256(path) != sha256:
                return f"{name} does not match its checksum"
        except (OSError, ValueError) as error:  # a bad sector, say, or no name of a file at all
            return f"{name!r} cannot be read ({error})"
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


def prune(newest: Path, limit: int | None, keep: Path | None = None) -> None:
    """
    Deletes what the checkpoint `newest`, just published, makes superfluous: older ones, so that `limit` are left; later
    ones, which a resume has passed over as damaged or gone back behind; and what crashed writes have left.

    Args:
        newest (`Path`): The checkpoint that was just published.
        limit (`int`, *optional*): How many are left; None for all.
        keep (`Path`, *optional*): The best one, which is left in any case.
    """
    for leftover in newest.parent.glob(_STAGING + "*"):
        _remove(leftover)
    existing = list_checkpoints(newest.parent)
    position = existing.index(newest)
    older = existing[: max(0, min(position, position + 1 - limit))] if limit is not None else []
    for path in older + existing[position + 1 :]:
        if path != keep:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor itself; of one that FSDP has spread over the processes, all of it, for which every process must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like(value: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A copy of `value` that lies as `tensor` does: on its device, in its memory format, spread as it is."""
    if hasattr(tensor, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
    return torch.empty_like(tensor).copy_(value)


def collect(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What [`save`] writes of a network and its optimiser, on the CPU; to be called by every process."""
    state = optimizer.state_dict()
    tensors, scalars = {}, {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{key}"] = whole(value.detach()).contiguous().cpu()
            else:
                scalars[f"{index}.{key}"] = value
    groups = [{k: v for k, v in group.items() if not callable(v)} for group in state["param_groups"]]
    weights = {name: whole(value.detach()).contiguous().cpu() for name, value in module.state_dict().items()}
    return {"weights": weights, "tensors": tensors, "rest": {"scalars": scalars, "param_groups": groups}}


def save(collected: dict[str, Any], network: Path, optimizer: Path) -> None:
    """Writes what [`collect`] gave into two folders: tensors in safetensors, hyperparameters in JSON."""
    for folder in (network, optimizer):
        folder.mkdir(parents=True, exist_ok=True)
    save_file(collected["weights"], network / WEIGHTS, metadata={"format": "pt"})
    save_file(collected["tensors"], optimizer / "optimizer.safetensors")
    (optimizer / "optimizer.json").write_text(json.dumps(collected["rest"]))


def load_weights(module: torch.nn.Module, folder: Path) -> None:
    """
    Reads a network's weights.

    Raises:
        RuntimeError: If they are not those of this network.
    """
    own = module.state_dict()
    weights = load_file(folder / WEIGHTS)
    if any(hasattr(tensor, "full_tensor") for tensor in own.values()):
        weights = {name: like(value, own[name]) for name, value in weights.items()}
    module.load_state_dict(weights)


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """
    Reads an optimiser's state.

    Raises:
        ValueError: If another kind of optimiser wrote it.
    """
    saved = json.loads((folder / "optimizer.json").read_text())
    state: dict[int, dict] = {}
    for name, value in {**load_file(folder / "optimizer.safetensors"), **saved["scalars"]}.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    for group, saved_group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        if not group.keys() >= saved_group.keys() - {"params"}:
            raise ValueError(f"it was written by another optimiser than {type(optimizer).__name__}")
    optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})
    # Fused optimisers walk the memory, so a moment must lie as its weight does (channels-last, say), not only match it.
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                entries[key] = like(value, parameter)


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
