"""
The way of the data: a name becomes uint8 images (N, C, H, W) and labels, decoded once and kept on disk for the next start.

    data = load_images("ylecun/mnist", resolution=32)        # a Hub id, a folder, or "digits"
    train, validation = held_out(data, share=0.05, seed=0)
    images = normalize(train.images[indices])                # float32 in [-1, 1]
    images = augment(images, uniform, random_flip=True)      # uniform: (B, AUGMENT_DRAWS), drawn by the caller
"""

import hashlib
import io
import json
import math
import os
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL
import psutil
import torch
from huggingface_hub.constants import HF_HOME
from huggingface_hub.errors import HFValidationError
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from .errors import UserError, unknown


if TYPE_CHECKING:
    import datasets


# Random numbers that `augment` takes for an image: flip, crop (y, x), brightness, contrast, saturation, cut-out (y, x).
AUGMENT_DRAWS = 8

_MAX_BROKEN_SHARE = 0.01
_MAX_CLASSES = 1000  # more distinct values than this in a column of integers or texts are no labels
_MEMORY_SHARE = 0.25  # of the free memory, for the images of one set
_MAX_PIXELS = 2**26  # a larger image is a decompression bomb to us
_READ_BATCH, _DECODE_BATCH = 1024, 64  # rows read at a time, and handed to a thread at a time
_CACHE_FORMAT = 1  # raised when the same files would be decoded to other pixels


@dataclass
class ImageData:
    """
    Decoded images, with their labels where there are any.

    Args:
        images (`torch.Tensor` of shape `(N, C, H, W)`): uint8, C = 1 (grey) or 3 (RGB). A memory-mapped file where it
            was read from the cache, so that sets larger than memory can be trained on.
        labels (`torch.Tensor` of shape `(N,)`, *optional*): int64, from 0 to K - 1.
        id2label (`dict[int, str]`, *optional*): The name of each of the K classes.
        name (`str`): The Hub id, the folder's name, or `"digits"`.
        split (`str`): The split that was read.
        fingerprint (`str`): sha256 over images and labels: equal for equal content, wherever it was read from.
        notes (`list[str]`): What was converted, resized or skipped on the way, for the user to read.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    id2label: dict[int, str] | None
    name: str
    split: str
    fingerprint: str
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)


def load_images(
    dataset_name: str = "digits",
    *,
    dataset_config_name: str | None = None,
    train_data_dir: str | os.PathLike | None = None,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    resolution: int | None = None,
    center_crop: bool = False,
    classes: str | Sequence[str | int] | None = None,
    max_samples: int | None = None,
    channels: int | None = None,
    cache_dir: str | os.PathLike | None = None,
    require_labels: bool = False,
) -> ImageData:
    """
    Read a set of images, decode it once, and bring it to one size.

    Every image becomes 8-bit grey or RGB: 16-bit values are scaled, palettes resolved, transparency laid on white, EXIF
    orientation applied. Its largest square (where it is not square: see `center_crop`) is resized to `resolution` with
    Pillow's antialiased bicubic filter, for enlarging too. Files that cannot be decoded are skipped and named in the
    notes. The result is cached, so that the next start takes it from disk.

    Args:
        dataset_name (`str`, defaults to `"digits"`):
            A Hub id, a folder (a Hub repository's layout, or images with or without a sub-folder for each class), or
            `"digits"`: scikit-learn's 1,797 handwritten 8x8 digits, which have one split, `"train"`, and need no network.
        dataset_config_name (`str`, *optional*):
            The configuration of a data set that has several.
        train_data_dir (`str` or `os.PathLike`, *optional*):
            A folder, in place of `dataset_name`.
        split (`str`, defaults to `"train"`):
            The split to read; `datasets`' slices such as `"train[:1000]"` work.
        image_column, label_column (`str`, *optional*):
            Found by their features when not given: an `Image`; a `ClassLabel`, or else an integer or text column whose
            values repeat.
        resolution (`int`, *optional*):
            Side of the square images in pixels. Not needed where all images have one square size already.
        center_crop (`bool`, defaults to `False`):
            Take the centre of an image that is not square. Otherwise the square is at a random place, which
            depends on the encoded image alone.
        classes (`str` or sequence of `str` or `int`, *optional*):
            Names or indices, such as `"cat,frog"`: only these, relabelled 0, 1, ... in this order.
        max_samples (`int`, *optional*):
            Read at most so many images, chosen evenly at random, always the same ones.
        channels (`int`, *optional*):
            1 or 3; when not given 1 if all images are grey, else 3.
        cache_dir (`str` or `os.PathLike`, *optional*):
            Where `datasets` and this module keep their files. Defaults to `datasets`' own folder and, for the
            decoded images, to `$TINY_DIFFUSERS_CACHE` or `$HF_HOME/tiny_diffusers`.
        require_labels (`bool`, defaults to `False`):
            Raise an error where an image has no label.

    Returns:
        [`ImageData`]: uint8 images of shape `(N, C, resolution, resolution)`, in the order of the data set.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: The data set, split, column, class or label does not exist, no resolution
            can be inferred, or more than 1 % of the images are broken.
    """
    for name, value in (("resolution", resolution), ("max_train_samples", max_samples)):
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: it must be 1 or more.")
    if channels not in (None, 1, 3):
        raise UserError(
            f"{channels} channels were asked for: 1 (grey), 3 (RGB) or none (as the images are) are allowed."
        )
    if train_data_dir is not None and dataset_name != "digits":
        raise UserError(f"--dataset_name {dataset_name} and --train_data_dir {train_data_dir}: give only one of them.")

    options = {"resolution": resolution, "center_crop": center_crop, "channels": channels}
    if train_data_dir is None and dataset_name == "digits":
        return _decode_source(_select(_digits(split), classes, max_samples, require_labels), **options)

    name = dataset_name if train_data_dir is None else os.fspath(train_data_dir)
    folder = Path(name).resolve() if Path(name).is_dir() else None
    if folder is None and train_data_dir is not None:
        raise UserError(f"--train_data_dir {name}: there is no such folder.")

    # A folder's files tell by themselves whether they were decoded before; a Hub data set's have to be found first.
    where = (name, folder, dataset_config_name, split, cache_dir)
    opened = None if folder is not None else _open_dataset(*where)
    files = _files(folder) if opened is None else [Path(file["filename"]) for file in opened[0].cache_files]
    columns = (image_column, label_column)
    cache = cache_root(cache_dir)
    cached = cache / _key(files, dataset_config_name, split, columns, classes, max_samples, options)
    data = _read_cache(cached)
    if data is not None and not (require_labels and data.labels is None):
        return data

    dataset, splits = opened or _open_dataset(*where)
    source = _source(dataset, splits, name, folder, split, *columns)
    data = _decode_source(_select(source, classes, max_samples, require_labels), **options, scratch=cache)
    return _write_cache(cached, data)


def held_out(data: ImageData, share: float, seed: int = 0) -> tuple[ImageData, ImageData]:
    """
    Split off a random share of the images, always the same one for the same data, share and seed.

    Args:
        data ([`ImageData`]): All images.
        share (`float`): In (0, 1): what part is held out; at least one image is, and at least one is left.
        seed (`int`, defaults to 0): Chooses which.

    Returns:
        `tuple[ImageData, ImageData]`: Those left (to train on) and those held out (to validate on), each in the order
        of the data.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: The share is out of its range, or there are fewer than two images.
    """
    if not 0 < share < 1:
        raise UserError(f"A share of {share} cannot be held out: it must lie between 0 and 1.")
    if len(data) < 2:
        raise UserError(f"No image of '{data.name}' can be held out: there is only {len(data)}.")
    count = min(max(round(len(data) * share), 1), len(data) - 1)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    return _take(data, order[count:].sort().values), _take(data, order[:count].sort().values)


def normalize(images: torch.Tensor) -> torch.Tensor:
    """
    uint8 images in [0, 255] as float32 in [-1, 1]: x / 127.5 - 1.

    Args:
        images (`torch.Tensor`): uint8, of any shape.

    Returns:
        `torch.Tensor`: float32, of the same shape and on the same device.
    """
    return images.float().div(127.5).sub_(1)


def denormalize(images: torch.Tensor) -> torch.Tensor:
    """
    Images in [-1, 1] as uint8 in [0, 255], rounded and clamped: `denormalize(normalize(x))` is `x`.

    Args:
        images (`torch.Tensor`): Floating point, of any shape.

    Returns:
        `torch.Tensor`: uint8, of the same shape and on the same device.
    """
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def augment(
    images: torch.Tensor,
    uniform: torch.Tensor,
    *,
    random_flip: bool = False,
    random_crop_padding: int = 0,
    color_jitter: float = 0.0,
    cutout: int = 0,
) -> torch.Tensor:
    """
    Augment a batch: flip, crop with padding, colour jitter and cut-out, in this order.

    Each image is changed by its own row of `uniform` alone, so what happens to it does not depend on its batch.

    Args:
        images (`torch.Tensor` of shape `(B, C, H, W)`):
            Floating point in [-1, 1], as [`normalize`] gives them.
        uniform (`torch.Tensor` of shape `(B, AUGMENT_DRAWS)`):
            Random numbers in [0, 1), on the images' device.
        random_flip (`bool`, defaults to `False`):
            Mirror half of the images left to right.
        random_crop_padding (`int`, defaults to 0):
            Shift by up to so many pixels each way. The border is reflected, not black: a generative model would
            learn to paint the black.
        color_jitter (`float`, defaults to 0.0):
            In [0, 1]. Brightness, contrast and (for RGB) saturation are each multiplied by a factor from
            [1 - color_jitter, 1 + color_jitter].
        cutout (`int`, defaults to 0):
            Side of a square that is filled with mid-grey (0), its centre anywhere in the image (arXiv 1708.04552).

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`: Of the same dtype, in [-1, 1].

    Raises:
        [`~tiny_diffusers.errors.UserError`]: A setting is out of its range.
    """
    batch, channels, height, width = images.shape
    if uniform.shape != (batch, AUGMENT_DRAWS):
        raise UserError(f"uniform has shape {tuple(uniform.shape)}: it must be {(batch, AUGMENT_DRAWS)}.")
    if not 0 <= random_crop_padding < min(height, width):
        raise UserError(
            f"--random_crop_padding {random_crop_padding}: it must be from 0 to {min(height, width) - 1}, "
            f"as the images are {height}x{width}."
        )
    if not 0 <= color_jitter <= 1:
        raise UserError(f"--color_jitter {color_jitter}: it must be from 0 to 1.")
    if cutout < 0:
        raise UserError(f"--cutout {cutout}: it must be 0 or more pixels.")
    flip, crop, jitter, hole = uniform.split((1, 2, 3, 2), dim=1)
    rows = torch.arange(height, device=images.device).expand(batch, -1)  # (B, H)
    columns = torch.arange(width, device=images.device).expand(batch, -1)  # (B, W)

    if random_flip or random_crop_padding:
        # Both only say which row and column a pixel is taken from: one gather does both.
        offset = (crop * (2 * random_crop_padding + 1)).long() - random_crop_padding  # (B, 2)
        source_rows = _reflect(rows + offset[:, :1], height)
        source_columns = _reflect(columns + offset[:, 1:], width)
        if random_flip:
            source_columns = torch.where(flip < 0.5, width - 1 - source_columns, source_columns)
        each = torch.arange(batch, device=images.device)[:, None, None]
        images = images[each, :, source_rows[:, :, None], source_columns[:, None, :]]  # (B, H, W, C)
        images = images.permute(0, 3, 1, 2).contiguous()

    if color_jitter:
        brightness, contrast, saturation = (1 + color_jitter * (2 * jitter - 1)).to(images.dtype).unbind(1)
        images = (images + 1) * brightness.view(-1, 1, 1, 1)  # in [0, 2]: 0 is black
        mean = _luma(images).mean((1, 2, 3), keepdim=True)
        images = mean + (images - mean) * contrast.view(-1, 1, 1, 1)
        if channels == 3:
            grey = _luma(images)
            images = grey + (images - grey) * saturation.view(-1, 1, 1, 1)
        images = (images - 1).clamp(-1, 1)

    if cutout:
        top = (hole[:, :1] * height).long() - cutout // 2  # (B, 1)
        left = (hole[:, 1:] * width).long() - cutout // 2
        in_rows = (rows >= top) & (rows < top + cutout)  # (B, H)
        in_columns = (columns >= left) & (columns < left + cutout)  # (B, W)
        images = images.masked_fill((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 0)
    return images


def _reflect(index: torch.Tensor, size: int) -> torch.Tensor:
    """Indices outside [0, size) mirrored at the edge pixels, as `torch.nn.functional.pad(mode="reflect")` does."""
    return (size - 1) - ((size - 1) - index.abs()).abs()


def _luma(images: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, 1, H, W): the grey of an RGB image (ITU-R 601-2, as Pillow's), a grey image itself."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


# Where decoded images lie


def _take(data: ImageData, indices: torch.Tensor) -> ImageData:
    """The images at `indices`, copied."""
    images = torch.from_numpy(_empty((len(indices), *data.images.shape[1:])))
    torch.index_select(data.images, 0, indices, out=images)
    labels = None if data.labels is None else data.labels[indices]
    return replace(data, images=images, labels=labels, fingerprint=_fingerprint(images, labels))


def _fingerprint(images: torch.Tensor, labels: torch.Tensor | None) -> str:
    digest = hashlib.sha256(repr((tuple(images.shape), labels is not None)).encode())
    digest.update(images.numpy())
    if labels is not None:
        digest.update(labels.numpy())
    return digest.hexdigest()


def _empty(shape: tuple[int, ...], scratch: Path | None = None) -> np.ndarray:
    """A uint8 array: in memory, or, where it takes more than `_MEMORY_SHARE` of what is free, in a temporary file."""
    size = math.prod(shape)
    if size <= _MEMORY_SHARE * psutil.virtual_memory().available:
        return np.empty(shape, np.uint8)
    directory = scratch if scratch is not None and scratch.is_dir() else Path(tempfile.gettempdir())
    # Asked for beforehand: to write to a mapped file on a full disk kills the process.
    if 2 * size > shutil.disk_usage(directory).free:
        raise UserError(
            f"{size / 1e9:.1f} GB of decoded images fit neither in memory nor, with their copy in the cache, in "
            f"'{directory}': lower --resolution or --max_train_samples, or set TINY_DIFFUSERS_CACHE to a folder with space."
        )
    return np.memmap(tempfile.TemporaryFile(dir=directory), np.uint8, "w+", shape=shape)


def cache_root(cache_dir: str | os.PathLike | None = None) -> Path:
    """The folder of this package's own cache: below `cache_dir`, or `$TINY_DIFFUSERS_CACHE`, or `$HF_HOME/tiny_diffusers`."""
    if cache_dir is not None:
        return Path(cache_dir) / "tiny_diffusers"
    return Path(os.environ.get("TINY_DIFFUSERS_CACHE") or Path(HF_HOME) / "tiny_diffusers")


def _key(files: list[Path], *request) -> str:
    """What the decoded images are a function of; as in `make`, an unchanged size and time stand for an unchanged file."""
    stats = [(os.fspath(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((_CACHE_FORMAT, PIL.__version__, request, stats)).encode()).hexdigest()[:32]


def _checksum(record: dict) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _read_cache(directory: Path) -> ImageData | None:
    """The images that `_write_cache` left, memory-mapped; None where there are none or the files are damaged."""
    try:
        record = json.loads((directory / "data.json").read_text(encoding="utf-8"))
        if record.pop("checksum") != _checksum(record):
            return None
        # Copy-on-write: torch wants memory that it may write to, and the file stays as it is.
        images = torch.from_numpy(np.load(directory / "images.npy", mmap_mode="c"))
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError):
        return None
    labels, class_names = record.pop("labels"), record.pop("class_names")
    data = ImageData(
        images=images,
        labels=None if labels is None else torch.tensor(labels, dtype=torch.int64),
        id2label=None if class_names is None else dict(enumerate(class_names)),
        **record,
    )
    return data if data.fingerprint == _fingerprint(data.images, data.labels) else None


def _write_cache(directory: Path, data: ImageData) -> ImageData:
    """The data as read back from the cache; as given where the cache cannot be written."""
    record = {
        "labels": None if data.labels is None else data.labels.tolist(),
        "class_names": None if data.id2label is None else list(data.id2label.values()),
        "name": data.name,
        "split": data.split,
        "fingerprint": data.fingerprint,
        "notes": data.notes,
    }
    record["checksum"] = _checksum(record)
    staging = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        staging = tempfile.mkdtemp(prefix=f"{directory.name}-", dir=directory.parent)
        np.save(Path(staging, "images.npy"), data.images.numpy())
        Path(staging, "data.json").write_text(json.dumps(record), encoding="utf-8")
        # A process that writes the same set at the same time makes one of the two renames fail: either's files will do.
        shutil.rmtree(directory, ignore_errors=True)
        os.rename(staging, directory)
    except OSError:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    return _read_cache(directory) or data


# From a name to encoded images


@dataclass
class _Source:
    """A split whose images are not decoded yet."""

    name: str
    split: str
    columns: list[str]
    read: Callable[[list[int]], list[dict | None]]  # row numbers -> what `datasets.Image(decode=False)` gives
    rows: np.ndarray  # (N,): the numbers of the rows asked for
    labels: np.ndarray | None  # (N,): int64, -1 where a row has none
    class_names: list[str] | None
    folder: Path | None = None
    notes: list[str] = field(default_factory=list)


def _digits(split: str) -> _Source:
    from sklearn.datasets import load_digits

    if split != "train":
        raise unknown("split of 'digits'", split, ["train"])
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (N, 8, 8)
    return _Source(
        name="digits",
        split=split,
        columns=["image", "label"],
        read=lambda rows: [{"bytes": _encode(pixels[row]), "path": None} for row in rows],
        rows=np.arange(len(pixels)),
        labels=digits.target.astype(np.int64),
        class_names=[str(name) for name in digits.target_names],
    )


def _encode(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PPM")
    return buffer.getvalue()


def _files(folder: Path) -> list[Path]:
    """All files below a folder; hidden ones, pipes, and links to nothing left out."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    return sorted(file for file in found if file.is_file())


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in Image.registered_extensions()


def _is_metadata(file: Path) -> bool:
    """Whether `datasets` reads further columns of an image folder from this file."""
    return file.stem == "metadata"


def _open_dataset(
    name: str, folder: Path | None, config: str | None, split: str, cache_dir: str | os.PathLike | None
) -> tuple["datasets.Dataset", list[str]]:
    """The split, and the names of all splits; one line of ours in place of the many errors of the library."""
    import datasets

    path, data_dir = os.fspath(folder or name), None
    if folder is not None and config is None:
        files = [file for file in _files(folder) if not _is_metadata(file)]
        if any(map(_is_image, files)) and not any(file.suffix in (".parquet", ".arrow") for file in files):
            # Said outright: `datasets` takes a folder with more texts than images in it for a set of texts.
            path, data_dir = "imagefolder", path

    # What the library and the Hub's client raise has no common base.
    try:
        builder = datasets.load_dataset_builder(
            path, config, data_dir=data_dir, cache_dir=None if cache_dir is None else os.fspath(cache_dir)
        )
    except Exception as error:
        reason = _first_line(error)
        if folder is not None:
            raise UserError(f"The folder '{name}' cannot be read as a data set: {reason}") from error
        if isinstance(error, ValueError) and not isinstance(error, HFValidationError):
            raise UserError(f"The data set '{name}' cannot be read: {reason} (--dataset_config_name)") from error
        raise UserError(
            f"There is no data set '{name}': no folder has this name, and the Hub does not have it or could not be "
            f"reached ({reason}). Give a Hub id such as ylecun/mnist, a folder, or digits."
        ) from error
    try:
        builder.download_and_prepare()
    except Exception as error:
        raise UserError(f"The data set '{name}' cannot be read: {_first_line(error.__cause__ or error)}") from error

    splits = list(builder.info.splits or ())
    try:
        dataset = builder.as_dataset(split=split)
    except ValueError as error:
        if split not in splits:
            raise unknown(f"split of '{name}'", split, splits) from error
        dataset = ()
    if len(dataset) == 0:
        raise UserError(f"The split '{split}' of '{name}' is empty; its splits are {', '.join(splits)}.")
    return dataset, splits


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _source(
    dataset: "datasets.Dataset",
    splits: list[str],
    name: str,
    folder: Path | None,
    split: str,
    image_column: str | None,
    label_column: str | None,
) -> _Source:
    import datasets

    image_columns = _image_columns(dataset, image_column, name)
    label_columns = _label_columns(dataset, label_column, name, splits)
    encoded = dataset.select_columns(image_columns[:1]).cast_column(image_columns[0], datasets.Image(decode=False))
    labels, class_names = _read_labels(dataset, label_columns[0]) if label_columns else (None, None)

    notes = []
    for kind, columns in (("image", image_columns), ("label", label_columns)):
        if len(columns) > 1:
            notes.append(f"--{kind}_column: '{columns[0]}' is taken, of {', '.join(columns)}")
    if folder is not None and dataset.builder_name == "imagefolder":
        others = [file for file in _files(folder) if not _is_image(file) and not _is_metadata(file)]
        if others:
            notes.append(f"files that are not images, left out: {_some([_relative(file, folder) for file in others])}")
    return _Source(
        name=name if folder is None else folder.name,
        split=split,
        columns=dataset.column_names,
        read=lambda rows: encoded[rows][image_columns[0]],
        rows=np.arange(len(dataset)),
        labels=labels,
        class_names=class_names,
        folder=folder,
        notes=notes,
    )


def _image_columns(dataset: "datasets.Dataset", given: str | None, name: str) -> list[str]:
    """The columns that hold images, or the one that is given."""
    if given is not None and given not in dataset.column_names:
        raise unknown(f"--image_column of '{name}'", given, dataset.column_names)
    found = [column for column, feature in dataset.features.items() if _holds_images(feature)]
    if not found:
        raise UserError(f"'{name}' has no image column: its columns are {', '.join(dataset.column_names)}.")
    if given is not None and given not in found:
        raise UserError(f"--image_column {given}: it holds no images. Of '{name}', {', '.join(found)} does.")
    return [given] if given is not None else found


def _holds_images(feature: object) -> bool:
    """Images, or their bytes, alone or with a path: what is seen of them in a parquet file that `datasets` did not write."""
    import datasets

    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in ("binary", "large_binary")


def _label_columns(dataset: "datasets.Dataset", given: str | None, name: str, splits: list[str]) -> list[str]:
    """The columns that may be labels, the likeliest first, or the one that is given."""
    import datasets

    features = dataset.features
    classes = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    discrete = [column for column, feature in features.items() if _is_discrete(feature)]
    if given is not None:
        if given not in features:
            raise unknown(f"--label_column of '{name}'", given, dataset.column_names)
        if given not in classes + discrete:
            raise UserError(f"--label_column {given}: in '{name}' it holds neither classes nor integers nor texts.")
        return [given]
    # Where images lie in the folders of the splits themselves, `datasets` takes these for classes.
    found = [column for column in classes if not set(features[column].names) <= set(splits)]
    if not classes:
        most = min(_MAX_CLASSES, len(dataset) // 2)  # captions and serial numbers do not repeat
        found = [column for column in discrete if len(dataset.unique(column)) <= most]
    return sorted(found, key=lambda column: column != "label")


def _is_discrete(feature: object) -> bool:
    import datasets

    return isinstance(feature, datasets.Value) and feature.dtype.startswith(
        ("int", "uint", "bool", "string", "large_string")
    )


def _read_labels(dataset: "datasets.Dataset", column: str) -> tuple[np.ndarray, list[str]]:
    """Class indices (N,), -1 where there is none, and the classes' names."""
    import datasets

    feature = dataset.features[column]
    values = dataset.select_columns([column])[:][column]
    if isinstance(feature, datasets.ClassLabel):
        return np.array([-1 if value is None else value for value in values], dtype=np.int64), feature.names
    known = sorted({value for value in values if value is not None})
    index = {value: position for position, value in enumerate(known)}
    return np.array([index.get(value, -1) for value in values], dtype=np.int64), [str(value) for value in known]


def _select(
    source: _Source, classes: str | Sequence[str | int] | None, max_samples: int | None, require_labels: bool
) -> _Source:
    """The rows of the classes and of the number asked for."""
    rows, labels, class_names = source.rows, source.labels, source.class_names
    notes = list(source.notes)
    if labels is None and (require_labels or classes is not None):
        raise UserError(
            f"'{source.name}' has no labels: its columns are {', '.join(source.columns)}. Name the one with the labels "
            "with --label_column; an image folder needs a sub-folder for each class."
        )

    if classes is not None:
        chosen = _class_indices(classes, class_names, source.name)
        relabel = np.full(len(class_names) + 1, -1, dtype=np.int64)  # the last is for the rows without a label, -1
        relabel[chosen] = np.arange(len(chosen))
        labels = relabel[labels]
        class_names = [class_names[index] for index in chosen]
        counts = np.bincount(labels[labels >= 0], minlength=len(chosen))
        if not counts.all():
            raise UserError(
                f"No image of '{source.name}' ({source.split}) is of class '{class_names[counts.argmin()]}'."
            )
        rows, labels = rows[labels >= 0], labels[labels >= 0]

    if max_samples is not None and max_samples < len(rows):
        # At random, as many data sets are sorted by class.
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        some = order[:max_samples].sort().values.numpy()
        rows = rows[some]
        labels = None if labels is None else labels[some]

    if labels is not None and labels.min() < 0:
        missing = f"{np.count_nonzero(labels < 0):,} of {len(rows):,} images of '{source.name}' have no label"
        if require_labels:
            raise UserError(f"{missing}: choose another --label_column or --split, or name the --classes to train on.")
        notes.append(f"{missing}: labels are left out")
        labels = class_names = None
    return replace(source, rows=rows, labels=labels, class_names=class_names, notes=notes)


def _class_indices(classes: str | Sequence[str | int], class_names: list[str], name: str) -> list[int]:
    """`"cat,frog"` or `[3, 6]` -> [3, 6]. A name goes before an index, since names may be numbers."""
    entries = classes.split(",") if isinstance(classes, str) else classes
    chosen = []
    for entry in (str(entry).strip() for entry in entries):
        if entry in class_names:
            chosen.append(class_names.index(entry))
        elif entry.isdecimal() and int(entry) < len(class_names):
            chosen.append(int(entry))
        else:
            raise unknown(f"class of '{name}'", entry, class_names)
    if len(set(chosen)) < len(chosen):
        raise UserError(f"--classes {','.join(map(str, entries))} names a class twice.")
    return chosen


# From encoded images to tensors


def _decode_source(
    source: _Source, resolution: int | None, center_crop: bool, channels: int | None, scratch: Path | None = None
) -> ImageData:
    """Decode the rows of a source in parallel and in order, leaving the broken ones out."""
    storage = None
    kept, broken = [], []  # positions in `source.rows`; names of files
    changes = Counter()
    for position, image, said in _decode_rows(source, resolution, center_crop, channels):
        if image is None:
            broken.append(said)
            continue
        size = image.shape[1:]
        if storage is None:
            if size[0] != size[1]:
                raise UserError(f"Images of '{source.name}' are not square ({size[1]}x{size[0]}): give --resolution.")
            storage = _empty((len(source.rows), channels or 3, *size), scratch)
        if size != storage.shape[2:]:
            side = storage.shape[2]
            raise UserError(
                f"The images of '{source.name}' differ in size ({side}x{side}, {size[1]}x{size[0]}): give --resolution."
            )
        storage[len(kept)] = image  # a grey image is repeated over the channels
        kept.append(position)
        changes.update(said)

    total = len(source.rows)
    if len(broken) > _MAX_BROKEN_SHARE * total:
        raise UserError(
            f"{len(broken):,} of {total:,} images of '{source.name}' are broken, more than {_MAX_BROKEN_SHARE:.0%}: "
            f"{_some(broken)}. Repair or remove them."
        )
    grey = changes.pop("grey", 0)
    if channels is None and grey == len(kept):
        images = _empty((len(kept), 1, *storage.shape[2:]), scratch)
        images[:] = storage[: len(kept), :1]
    else:
        images = storage[: len(kept)]
        if grey and channels != 1:
            changes["were grey, converted to RGB"] = grey

    notes = [f"{count:,} of {len(kept):,} images {change}" for change, count in sorted(changes.items())]
    if broken:
        notes.append(f"broken files skipped, {len(broken):,}: {_some(broken)}")
    images = torch.from_numpy(images)
    labels = None if source.labels is None else torch.from_numpy(source.labels[kept])
    return ImageData(
        images=images,
        labels=labels,
        id2label=None if labels is None else dict(enumerate(source.class_names)),
        name=source.name,
        split=source.split,
        fingerprint=_fingerprint(images, labels),
        notes=source.notes + notes,
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")


def _decode_rows(source: _Source, *options) -> Iterator[tuple[int, np.ndarray | None, list[str] | str]]:
    """For each row its position, the image (C, H, W) and what was done to it; or, where it is broken, None and its name."""

    def decode(positions: range, encoded: list[dict | None]) -> list[tuple]:
        results = []
        for position, image in zip(positions, encoded, strict=True):
            try:
                results.append((position, *_decode_image(image, *options)))
            except Exception:  # Pillow's readers raise nearly anything on a damaged file
                results.append((position, None, _row_name(source, position, image)))
        return results

    total = len(source.rows)
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=total, desc=f"Decoding {source.name}", unit=" images", delay=2) as progress,
    ):
        for start in range(0, total, _READ_BATCH):
            positions = range(start, min(start + _READ_BATCH, total))
            encoded = source.read(source.rows[positions].tolist())
            chunks = range(0, len(positions), _DECODE_BATCH)
            parts = [(positions[i : i + _DECODE_BATCH], encoded[i : i + _DECODE_BATCH]) for i in chunks]
            for results in pool.map(decode, *zip(*parts, strict=True)):
                yield from results
                progress.update(len(results))


def _row_name(source: _Source, position: int, encoded: dict | None) -> str:
    if encoded is None or not encoded["path"]:
        return f"row {source.rows[position]}"
    return _relative(Path(encoded["path"]), source.folder)


def _relative(file: Path, folder: Path | None) -> str:
    return (file.relative_to(folder) if folder is not None and file.is_relative_to(folder) else file).as_posix()


def _decode_image(
    encoded: dict, resolution: int | None, center_crop: bool, channels: int | None
) -> tuple[np.ndarray, list[str]]:
    """An encoded image as uint8 (1 or 3, H, W), and what was done to it."""
    content = encoded["bytes"] if encoded["bytes"] is not None else Path(encoded["path"]).read_bytes()
    image = Image.open(io.BytesIO(content))
    if image.width * image.height > _MAX_PIXELS:
        raise ValueError("a decompression bomb")
    if image.format in ("EPS", "WMF"):  # Pillow would run another program on it
        raise ValueError("no picture but a program")
    image, changes = _to_grey_or_rgb(ImageOps.exif_transpose(image))
    if channels == 1 and image.mode == "RGB":
        image = image.convert("L")
        changes.append("were in colour, converted to grey")

    if resolution is not None:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        if image.width != image.height and center_crop:
            changes.append("were not square: their centre was taken")
        elif image.width != image.height:
            place = zlib.crc32(content) / 2**32  # as if at random, but the same in any run and in any company
            left, top = int(place * (image.width - side + 1)), int(place * (image.height - side + 1))
            changes.append("were not square: a square at a random place was taken (--center_crop takes the centre)")
        if side != resolution:
            changes.append(f"were {'enlarged' if side < resolution else 'reduced'} to {resolution}x{resolution}")
        box = (left, top, left + side, top + side)
        image = image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box)

    if image.mode == "L":
        return np.asarray(image)[None], [*changes, "grey"]
    return np.asarray(image).transpose(2, 0, 1), changes  # (H, W, C) -> (C, H, W)


def _to_grey_or_rgb(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """An image of any mode as "L" or "RGB", and what was done to it."""
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image, []
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("integers of more than 16 bits")
        return Image.fromarray(np.rint(values / 257).astype(np.uint8)), ["had 16 bits a pixel, scaled to 8"]
    if image.mode == "F":
        raise ValueError("floating point values have no fixed range")

    grey = image.mode in ("1", "L", "LA", "La")
    changes = []
    if image.mode == "P":
        changes.append("had a palette, converted to RGB")
    elif image.mode not in ("1", "L", "LA", "La", "RGB", "RGBA", "RGBa"):
        changes.append(f"were {image.mode}, converted to RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
        changes.append("had an alpha channel, laid on white")
    return image.convert("L" if grey else "RGB"), changes
