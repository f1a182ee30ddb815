"""
The real images of an evaluation: those that flags name, and what they leave open as the model's own run has it.

    given = {"split": "test"}
    run = flags_of_run(RunFolder("runs/digits"), given)  # {"dataset_name": "digits", "resolution": 8, ...}
    images = choose(given, run)
    reference, training, images = load_real_images(images, shape=(1, 8, 8), state=processes())
"""

import contextlib
import logging
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import UserError
from ..flags import FlagParser, Flags, as_flags, flag
from ..paths import local_path, restore_paths
from ..resolution import Resolution, to_size
from ..runs import RunFolder


if TYPE_CHECKING:
    from accelerate import PartialState

    from ..data import ImageData

logger = logging.getLogger(__name__)

# Flags of a run that say how its dataset is read
_SHARED = (
    "dataset_config_name",
    "image_column",
    "label_column",
    "conditioning_column",
    "condition_columns",
    "drop_missing",
    "classes",
    "center_crop",
)


@dataclass(frozen=True)
class RealImages(Flags):
    """The real images to measure against, and those that the model was trained on. A run's own are the defaults."""

    TITLE: ClassVar[str] = "real images"

    dataset_name: str | None = flag(None, "Real images: a Hub id, a folder, or digits; of a run, its own.")
    dataset_config_name: str | None = flag(None, "Configuration of a dataset that has several.")
    image_column: str | None = flag(None, "Column of the images; found by its type if not given.")
    label_column: str | None = flag(None, "Column of the labels, or none; found by its type if not given.")
    conditioning_column: str | None = flag(None, "Column of the conditioning images of a model that takes some.")
    condition_columns: str | None = flag(None, "Columns of the conditions of a model that takes some: age,smiling.")
    drop_missing: bool = flag(False, "Leave out images without a value in --condition_columns.")
    classes: str | None = flag(None, "Names or ids, such as cat,frog, if the model has only these.")
    resolution: Resolution | None = flag(
        None, "Side, or height x width, that images are resized to; the model's if not given.", within="[1, 1024]"
    )
    channels: int | None = flag(
        None, "Channels of the images, where no model says it: 4 keeps alpha.", within="[1, inf)"
    )
    value_range: list[str] | None = flag(
        None, "Values from LOW to HIGH or 'measured', where no model says it, not scaled to 8 bits."
    )
    center_crop: bool = flag(False, "Crop the center of images of another aspect ratio.")
    split: str | None = flag(
        None, "Split to measure against; of test, validation and the training's, the first that there is."
    )
    train_split: str | None = flag(
        None, "Split that the model was trained on, or none; train, if there is one, where no run says it."
    )
    max_train_samples: int | None = flag(
        None, "Number of its images that the model was trained on, if not all.", within="[1, inf)"
    )


def flags_of_run(run: RunFolder, given: dict[str, Any]) -> dict[str, Any]:
    """
    Returns the flags of [`RealImages`] that a run was trained with, from its `config.yaml`; empty if there is none.

    Only these names are read, and their types are checked: the folder may be a stranger's.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If they are of other types, or if the run's local folder is not here and
            none is given.
    """
    settings = restore_paths(run.path, run.read_config())
    names = (*_SHARED, "resolution", "channels", "value_range", "max_train_samples")
    found = {name: settings.get(name) for name in names}
    folder = settings.get("train_data_dir")
    if folder is not None and local_path(str(folder)) is None and "dataset_name" not in given:
        raise UserError(
            f"{run.config} names the local folder '{folder}', which is not here: say where it is with --dataset_name."
        )
    found["dataset_name"] = folder or settings.get("dataset_name")
    found["train_split"] = settings.get("split")
    if found["dataset_name"] is None:
        return {}
    try:
        return FlagParser(RealImages).given(as_flags(found))
    except UserError as error:
        raise UserError(f"{run.config} does not say what the model was trained on: {error}") from error


def choose(given: dict[str, Any], run: dict[str, Any]) -> RealImages:
    """
    Chooses the real images: given flags win over those of the run, which count for the run's own dataset only.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If neither names a dataset.
    """
    given = {name: value for name, value in given.items() if name in {entry.name for entry in fields(RealImages)}}
    if "dataset_name" in given and not is_same_dataset(given["dataset_name"], run.get("dataset_name")):
        run = {}
    images = RealImages(**run | given)
    if images.dataset_name is None:
        raise UserError("Give the real images to measure against: --dataset_name, a Hub id, a folder, or digits.")
    return images


def is_same_dataset(given: str, runs: str | None) -> bool:
    """Checks that a given dataset is the run's: the same Hub id, folder, or last name of a folder that has moved."""
    path = local_path(given)
    return given == runs or (path is not None and runs is not None and (path == local_path(runs) or path.name == runs))


def load_real_images(
    images: RealImages,
    shape: tuple[int, int, int],
    state: "PartialState",
    conditioning_channels: int | None = None,
    value_range: tuple[float, float] | None = None,
) -> "tuple[ImageData, ImageData | None, RealImages]":
    """
    Loads the reference and, if there is one, the training set; one process decodes them, the others read its cache.

    Args:
        images ([`RealImages`]): The images.
        shape (`tuple[int, int, int]`): (C, H, W) of the model's images.
        state (`PartialState`): The processes.
        conditioning_channels (`int`, *optional*): Channels of the images that the model takes as a condition.
        value_range (`tuple[float, float]`, *optional*): The values of the model's images, if they are not of 8 bits.

    Returns:
        `tuple[ImageData, ImageData | None, RealImages]`: The reference, the training set, and `images` with the splits
        that were found.
    """
    from ..data import UnknownSplitError

    with state.main_process_first():
        reference, split = load_reference(images, shape, conditioning_channels, value_range)
        training = None
        if images.train_split != "none":
            try:
                training = load_training(images, shape, conditioning_channels, value_range)
            except UnknownSplitError as error:
                if images.train_split is not None:
                    raise
                logger.warning(f"there is no training set: {error}")
    found = "none" if training is None else _train_split(images)
    return reference, training, replace(images, split=split, train_split=found)


def load_reference(
    images: RealImages,
    shape: tuple[int, int, int] | None = None,
    conditioning_channels: int | None = None,
    value_range: tuple[float, float] | None = None,
) -> "tuple[ImageData, str]":
    """
    Loads the real images alone: the given split, or the first that there is of test, validation and the training's.

    Args:
        images ([`RealImages`]): The images.
        shape (`tuple[int, int, int]`, *optional*): Their (C, H, W), the size where `images` name none; by default those of
            the dataset.
        conditioning_channels (`int`, *optional*): Channels of their conditioning images; by default those of the dataset.
        value_range (`tuple[float, float]`, *optional*): Their values, as in [`~tiny_diffusers.data.load_images`].

    Returns:
        `tuple[ImageData, str]`: The images and the split.
    """
    from ..data import UnknownSplitError, load_images

    options = _load_options(images, shape, conditioning_channels, value_range)
    splits = [images.split] if images.split is not None else ["test", "validation", _train_split(images)]
    for split in splits[:-1]:
        with contextlib.suppress(UnknownSplitError):
            return load_images(split=split, **options), split
    return load_images(split=splits[-1], **options), splits[-1]


def load_training(
    images: RealImages,
    shape: tuple[int, int, int],
    conditioning_channels: int | None = None,
    value_range: tuple[float, float] | None = None,
) -> "ImageData":
    """Loads the images that the model was trained on; the arguments are those of [`load_real_images`]."""
    from ..data import load_images

    options = _load_options(images, shape, conditioning_channels, value_range)
    return load_images(split=_train_split(images), max_samples=images.max_train_samples, **options)


def _train_split(images: RealImages) -> str:
    return images.train_split if images.train_split not in (None, "none") else "train"


def _load_options(
    images: RealImages,
    shape: tuple[int, int, int] | None,
    conditioning_channels: int | None,
    value_range: tuple[float, float] | None,
) -> dict[str, Any]:
    options = {name: getattr(images, name) for name in ("dataset_name", *_SHARED)}
    if local_path(images.dataset_name) is not None and images.dataset_name != "digits":
        options["train_data_dir"] = options.pop("dataset_name")
    channels, *size = shape or (images.channels,)
    options["resolution"] = to_size(images.resolution) or tuple(size) or None
    options |= {"channels": channels, "conditioning_channels": conditioning_channels}
    return options | {"value_range": value_range or images.value_range}


def describe(images: RealImages) -> tuple[dict[str, Any], dict[str, str]]:
    """
    Returns what a report keeps of the images: the flags that are set, a local folder by its last name as
    `train_data_dir`; and the folder's path, which stays on this machine.
    """
    kept = {name: value for name, value in asdict(images).items() if value not in (None, False)}
    path = local_path(images.dataset_name)
    if path is None or images.dataset_name == "digits":
        return kept, {}
    del kept["dataset_name"]
    return {"train_data_dir": path.name, **kept}, {"dataset_name": str(path)}


def find_mismatches(run: RunFolder, reference: "ImageData", training: "ImageData | None") -> list[str]:
    """Returns in words how the real images differ from those that the run was trained on, by its `run.json`."""
    trained_on = run.read_facts().get("data")
    if not isinstance(trained_on, dict):
        return []
    mismatches = []
    name, classes, fingerprint = (trained_on.get(key) for key in ("name", "classes", "fingerprint"))
    ours = list(reference.id2label.values()) if reference.id2label else None
    if isinstance(classes, list) and ours is not None and sorted(map(str, classes)) != sorted(ours):
        mismatches.append(
            f"The model was trained on the classes {_few(classes)}, and is measured against {_few(ours)}: --classes "
            "chooses those of the reference."
        )
    elif training is not None and fingerprint != training.fingerprint:
        mismatches.append(
            f"The training images here ({training.name}, {training.split}, {len(training):,}) are not those that the "
            f"model was trained on ({name}, {trained_on.get('split')}, {trained_on.get('images')})."
        )
    return mismatches


def _few(names: list) -> str:
    return ", ".join(map(str, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
