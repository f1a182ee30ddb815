"""
Cache of decoded images on disk: one folder for each dataset and request, with `images.npy`, `data.json` and, if there are
any, `conditioning_images.npy` and `conditions.npy`.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import PIL
import torch
from huggingface_hub.constants import HF_HOME

from ..files import load_json, publish
from .images import ImageData, compute_fingerprint


_CACHE_FORMAT = 5  # increase it when the same files give other pixels, labels or notes
_OPTIONAL = ("conditioning_images", "conditions")  # arrays that not all datasets have


def cache_root(cache_dir: str | os.PathLike | None = None) -> Path:
    """Returns the cache folder: in `cache_dir` if given, else `$TINY_DIFFUSERS_CACHE` or `$HF_HOME/tiny_diffusers`."""
    if cache_dir is not None:
        return Path(cache_dir) / "tiny_diffusers"
    return Path(os.environ.get("TINY_DIFFUSERS_CACHE") or Path(HF_HOME) / "tiny_diffusers")


def cache_key(files: list[Path], *request) -> str:
    """Computes the cache key of a request. As in `make`, a file with the same size and time counts as unchanged."""
    stats = [(os.fspath(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((_CACHE_FORMAT, PIL.__version__, request, stats)).encode()).hexdigest()[:32]


def read_cache(directory: Path) -> ImageData | None:
    """Returns the cached images, memory-mapped, or None if they are missing or damaged."""
    try:
        record = load_json((directory / "data.json").read_text(encoding="utf-8"))
        if record.pop("checksum") != _checksum(record):
            return None
        images = _map(directory / "images.npy")
        files = {name: directory / f"{name}.npy" for name in _OPTIONAL}
        arrays = {name: _map(file) if file.exists() else None for name, file in files.items()}
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError):
        return None
    labels, class_names = record.pop("labels"), record.pop("class_names")
    value_range = record.pop("value_range", None)
    data = ImageData(
        images=images,
        labels=None if labels is None else torch.tensor(labels, dtype=torch.int64),
        id2label=None if class_names is None else dict(enumerate(class_names)),
        value_range=value_range and tuple(value_range),
        **arrays,
        **record,
    )
    return data if data.fingerprint == compute_fingerprint(data) else None


def _map(file: Path) -> torch.Tensor:
    """Maps an array into memory. Copy-on-write: torch expects writable memory, and the file must not change."""
    return torch.from_numpy(np.load(file, mmap_mode="c"))


def write_cache(directory: Path, data: ImageData) -> ImageData:
    """Writes the data to the cache and returns it as read back from there, or unchanged if it cannot be written."""
    record = {
        "labels": None if data.labels is None else data.labels.tolist(),
        "class_names": None if data.id2label is None else list(data.id2label.values()),
        "name": data.name,
        "split": data.split,
        "fingerprint": data.fingerprint,
        "notes": data.notes,
        "value_range": data.value_range,
    }
    if data.condition_names is not None:
        record["condition_names"] = data.condition_names
    record["checksum"] = _checksum(record)

    def write(staging: Path) -> None:
        for name in ("images", *_OPTIONAL):
            if getattr(data, name) is not None:
                np.save(staging / f"{name}.npy", getattr(data, name).numpy())
        (staging / "data.json").write_text(json.dumps(record), encoding="utf-8")

    with contextlib.suppress(OSError):  # the disk is full, or another process has written the same files meanwhile
        publish(directory, write)
    return read_cache(directory) or data


def _checksum(record: dict) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
