"""
The published models, the folders of `model_cards/`, by their names.

A checkout has all of them, a wheel those of `IN_WHEEL`.
"""

import importlib.resources
import logging
import os
from pathlib import Path

from .errors import UserError
from .runs import MODEL_INDEX


logger = logging.getLogger(__name__)

IN_WHEEL = ("mnist-32", "digits-8")
NAMES = (
    *IN_WHEEL,
    "mnist-32-conditional",
    "fashion-mnist-32-conditional",
    "cifar10-32-conditional",
    "anime-faces-64",
    "flowers-32",
    "consistency-mnist-32",
    "pixelcnn-mnist",
    "vae-mnist",
    "dcgan-mnist",
)


def find_published(name: str | os.PathLike) -> str | os.PathLike:
    """
    Returns the folder of the published model that a short name stands for, such as `"mnist-32"`, and any other name as it
    is. A folder of that name in the working directory wins, which is said.

    Raises:
        UserError: If the published model is not installed.
    """
    short = os.fspath(name)
    if short not in NAMES:
        return name
    folder = _folder(short)
    if os.path.isdir(short):
        if not folder.is_dir() or not folder.samefile(short):
            logger.warning(f"'{name}' is the folder of that name here, not the published model.")
        return os.path.join(os.curdir, short)  # which is no short name
    if not _is_model(folder):
        raise UserError(
            f"The published model '{name}' is not in the wheel, which has {' and '.join(IN_WHEEL)} alone: clone the "
            f"repository, and give model_cards/{name} there."
        )
    return str(folder)


def installed() -> list[Path]:
    """Returns the folders of the published models that the package holds."""
    return [folder for folder in map(_folder, NAMES) if _is_model(folder)]


def is_installed(checkpoint: str | os.PathLike) -> bool:
    """Checks that a checkpoint is a published model where [`find_published`] finds it: in this package."""
    return os.fspath(checkpoint) in map(str, installed())


def _is_model(folder: Path) -> bool:
    return (folder / MODEL_INDEX).is_file()


def _folder(name: str) -> Path:
    return Path(str(importlib.resources.files(f"{__package__}.model_cards") / name))
