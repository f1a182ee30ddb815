"""The models of the app: what each can do, read from its configs without torch, and the store that loads them."""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..errors import UserError, first_line
from ..files import load_json, read_mapping
from ..runs import MODEL_INDEX


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


MEMORY_SHARE = 4  # loaded models take at most one of these parts of the memory
BATCH_PIXELS = 64 * 32 * 32  # that are drawn at a time

# The component that tells a family, and the family's name
_FAMILIES = {"unet": "diffusion", "pixelcnn": "pixelcnn", "vae": "vae", "generator": "dcgan"}
GUIDE = "guidance_model"  # component of a weaker network
TITLES = {"diffusion": "diffusion", "pixelcnn": "PixelCNN", "vae": "VAE", "dcgan": "DCGAN"}

MAX_CONDITIONS = 12  # boxes in the page


class Condition(NamedTuple):
    """Number that a network takes as a condition: its name, the range of its training images, and their mean."""

    name: str
    low: float
    high: float
    mean: float


@dataclass(frozen=True)
class Model:
    """
    Listed checkpoint, and what its configs say about it.

    Args:
        checkpoint (`str`): The folder, or owner/name on the Hub.
        name (`str`): The last part of its name, or all of it where two checkpoints share the last part.
        folder (`Path`): The folder, or where the files from the Hub lie.
        family (`str`): `"diffusion"`, `"pixelcnn"`, `"vae"` or `"dcgan"`.
        objective (`str`): `"betas"`, `"flow"` or `"edm"`, for diffusion.
        size (`tuple[int, int]`): Width and height of its images.
        num_channels (`int`): Channels of its images.
        classes (`tuple[str, ...]`): The names of its classes, or their ids; empty without classes.
        class_ids (`tuple[int, ...]`): The ids of its classes.
        can_be_guided (`bool`): Whether it has a weaker model, a null class or a dropped condition to guide away from.
        has_temperature (`bool`): Whether it predicts distributions of pixels.
        num_train_timesteps (`int`): T, the largest number of steps.
        default_steps (`int`): The number of steps that its pipeline takes if none is given.
        default_eta (`float`): The fresh noise in each of them if none is given.
        conditioning (`str`, *optional*): The image that it takes as a condition.
        conditions (`tuple[Condition, ...]`): The numbers that it takes as conditions.
        has_latents (`bool`): Whether it denoises the latents of an autoencoder.
    """

    checkpoint: str
    name: str
    folder: Path
    family: str
    objective: str
    size: tuple[int, int]
    num_channels: int
    classes: tuple[str, ...]
    class_ids: tuple[int, ...]
    can_be_guided: bool
    has_temperature: bool
    num_train_timesteps: int
    default_steps: int
    default_eta: float
    conditioning: str | None
    conditions: tuple[Condition, ...]
    has_latents: bool

    @property
    def title(self) -> str:
        """Returns the name with the family and the size, for lists."""
        width, height = self.size
        kind = f"class-conditional {TITLES[self.family]}" if self.classes else TITLES[self.family]
        return f"{self.name} ({kind}, {width} x {height})"

    @property
    def is_on_hub(self) -> bool:
        return not Path(self.checkpoint).expanduser().is_dir()

    @property
    def takes_picture(self) -> bool:
        """Returns whether it takes an image as a condition that a picture holds, of one channel or three."""
        return self.conditioning is not None and {self.num_channels, self.given_picture(False)[1]} <= {1, 3}

    @property
    def is_picture_made(self) -> bool:
        """Returns whether the image that it takes as a condition is made from a whole one."""
        return self.takes_picture and not self.conditioning.startswith("image")

    def given_picture(self, is_whole: bool) -> tuple[tuple[int, int], int]:
        """Returns the size and the channels of the image that it takes as a condition, or of the whole one it is made from."""
        kind, _, number = self.conditioning.partition(":")
        if is_whole or kind not in ("grayscale", "low_resolution", "image"):
            return self.size, self.num_channels
        if kind == "low_resolution":
            width, height = self.size
            return (width // int(number), height // int(number)), self.num_channels
        return self.size, 1 if kind == "grayscale" else int(number)

    @property
    def can_walk(self) -> bool:
        return self.family != "pixelcnn" and self.conditioning is None

    @property
    def can_edit(self) -> bool:
        """Returns whether it edits pictures, which have one channel or three."""
        is_editor = self.family != "dcgan" and self.conditioning is None and not self.has_latents
        return is_editor and self.num_channels in (1, 3)

    @property
    def batch_size(self) -> int:
        """Returns how many of its images are drawn at a time, so that large ones fit in the memory: at most 64."""
        width, height = self.size
        return min(64, max(1, BATCH_PIXELS // (width * height)))


def list_models(checkpoints: Sequence[str]) -> list[Model]:
    """
    Reads what the app offers for each checkpoint, without loading weights.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If one can't be read, or is of no family of this package.
    """
    checkpoints = [checkpoint.rstrip("/") or checkpoint for checkpoint in checkpoints]
    last = [Path(checkpoint).name or checkpoint for checkpoint in checkpoints]
    names = last if len(set(last)) == len(last) else checkpoints
    return [read_model(checkpoint, name) for checkpoint, name in zip(checkpoints, names, strict=True)]


def published_checkpoints() -> list[str]:
    """Returns the published models that the package holds."""
    from .. import zoo

    found = [_relative(folder) for folder in zoo.installed()]
    if not found:
        raise UserError("The published models aren't installed with the package: give a CHECKPOINT.")
    return found


def _relative(path: Path) -> str:
    """Returns a path as it is typed in the working directory."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def read_model(checkpoint: str, name: str) -> Model:
    """Reads a [`Model`] from the configs of a checkpoint."""
    folder = Path(checkpoint).expanduser()
    if not folder.is_dir():
        folder = _download_configs(checkpoint)
    index = read_mapping(folder / MODEL_INDEX, load_json)
    component = next((component for component in _FAMILIES if isinstance(index.get(component), list)), None)
    if component is None:
        raise UserError(
            f"'{checkpoint}' has no {MODEL_INDEX} of a model of this package: give the folder of a run, or owner/name."
        )
    network = read_mapping(folder / component / "config.json", load_json)
    scheduler = read_mapping(folder / "scheduler" / "scheduler_config.json", load_json)
    has_latents = component == "unet" and isinstance(index.get("vae"), list)
    of_images = read_mapping(folder / "vae" / "config.json", load_json) if has_latents else network
    try:
        size = of_images["sample_size"]
        width, height = (size, size) if isinstance(size, int) else reversed(size)
        classes = _read_classes(index, network, component)  # id -> name
        conditioning, conditions = index.get("conditioning"), _read_conditions(index)
        num_train_timesteps = int(scheduler.get("num_train_timesteps", 1000))
        if len(conditions) > MAX_CONDITIONS:
            raise UserError(
                f"'{checkpoint}' takes {len(conditions)} conditions: the app has room for {MAX_CONDITIONS}."
            )
        return Model(
            checkpoint=checkpoint,
            name=name,
            folder=folder,
            family=_FAMILIES[component],
            objective=_objective(scheduler),
            size=(width, height),
            num_channels=_read_channels(of_images, scheduler, has_image=conditioning is not None),
            classes=tuple(classes.values()),
            class_ids=tuple(classes),
            can_be_guided=component == "unet" and _can_be_guided(index, bool(classes), conditioning or conditions),
            has_temperature=component == "pixelcnn" and network.get("variant") != "baseline",
            num_train_timesteps=num_train_timesteps,
            default_steps=min(_default_steps(scheduler), num_train_timesteps),
            default_eta=_default_eta(scheduler),
            conditioning=conditioning,
            conditions=conditions,
            has_latents=has_latents,
        )
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"'{checkpoint}' can't be read: one of its configs is damaged ({error!r}).") from error


def _read_channels(network: dict, scheduler: dict, has_image: bool) -> int:
    """Returns the channels of a network's images."""
    if "in_channels" in network and not has_image:
        return int(network["in_channels"])
    has_variance = str(scheduler.get("variance_type")).startswith("learned")
    return int(network["out_channels"]) // (2 if has_variance else 1)


def _can_be_guided(index: dict, has_classes: bool, other_conditions: object) -> bool:
    """Returns whether a pipeline of diffusion has what guidance leads away from."""
    if isinstance(index.get(GUIDE), list):
        return True
    has_null = index.get("class_dropout_prob") != 0 and not (has_classes and index.get("null_class_id", -1) is None)
    return has_null and bool(has_classes or other_conditions)


def _read_conditions(index: dict) -> tuple[Condition, ...]:
    """Returns the conditions that a pipeline's config describes."""
    statistics = index.get("condition_statistics") or dict.fromkeys(("names", "lows", "highs", "means"), ())
    columns = (statistics[field] for field in ("names", "lows", "highs", "means"))
    return tuple(Condition(str(name), *map(float, numbers)) for name, *numbers in zip(*columns, strict=True))


def _read_classes(index: dict, network: dict, component: str) -> dict[int, str]:
    """Returns the names of the classes that a pipeline takes, or their ids, by their ids."""
    class_name = str(index.get("_tiny_class_name") or index["_class_name"])
    takes_classes = any(name in class_name for name in ("TinyConditionalPipeline", "TinyLatentPipeline"))
    if component == "unet" and not takes_classes:
        return {}
    is_stock, null_class = network["_class_name"] == "UNet2DModel", index.get("null_class_id")
    ids = range(network.get("num_class_embeds") or 0)  # a stock network counts the null class as well
    labels = {int(class_id): str(label) for class_id, label in (index.get("id2label") or {}).items()}
    return {i: labels.get(i, str(i)) for i in ids if not (is_stock and i == null_class)}


def _objective(scheduler: dict) -> str:
    name = str(scheduler.get("_class_name"))
    return "edm" if "EDM" in name else "flow" if "Flow" in name else "betas"


def _default_steps(scheduler: dict) -> int:
    return 2 if scheduler.get("stochastic_sampling") else 20 if _objective(scheduler) == "flow" else 50


def _default_eta(scheduler: dict) -> float:
    etas = {"multistep": 1.5, "heun": 0.0}
    return 1.0 if _objective(scheduler) == "betas" else etas.get(scheduler.get("solver"), 1.0)


def _download_configs(checkpoint: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(checkpoint, allow_patterns=["*.json", "README.md", "train_log.jsonl"]))
    except (OSError, ValueError) as error:
        raise UserError(
            f"There is no folder '{checkpoint}' here, and no model of that name that can be loaded from the Hub "
            f"({first_line(error) if isinstance(error, OSError) else 'whose names are of the form owner/name'})."
        ) from error


class ModelStore:
    """
    Loads each listed model once, when it is first used, and drops the least recently used ones to stay within a limit of
    memory. One request uses a model at a time: torch takes all cores for it.

    Args:
        models (`list[Model]`): The models that can be loaded; nothing else can.
        max_bytes (`int`, *optional*): Memory for the weights of the loaded models, those in use aside. Defaults to a
            quarter of [`~tiny_diffusers.hardware.memory_limit`].
        device (`str`, *optional*): As for [`~tiny_diffusers.hardware.setup_torch`].
        dataset_name (`str`, *optional*): The training images that may be shown of the models that were trained on them.
    """

    def __init__(
        self,
        models: Sequence[Model],
        max_bytes: int | None = None,
        device: str | None = None,
        dataset_name: str | None = None,
    ):
        self.models, self.dataset_name = tuple(models), dataset_name
        self.device_words = [] if device is None else ["--device", device]  # of a command
        self.num_conditions = max(len(model.conditions) for model in self.models)  # boxes that a tab needs
        self._max_bytes, self._device_name = max_bytes, device
        self._loaded: OrderedDict[int, tuple[DiffusionPipeline, int]] = OrderedDict()
        self._lock = threading.Lock()
        self._device = None

    def model(self, index: object) -> Model:
        """Returns a listed model; the index may be anything that a client has sent."""
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(self.models):
            raise UserError(
                f"There is no model number {index!r:.40}: choose one of the {len(self.models)} in the list."
            )
        return self.models[index]

    @contextlib.contextmanager
    def use(self, *indices: int) -> "Iterator[list[DiffusionPipeline]]":
        """Gives the pipelines of models, each with the scheduler that it was saved with, to one request alone."""
        models = [self.model(index) for index in indices]
        with self._lock:
            for index in indices:  # before others are dropped
                if index in self._loaded:
                    self._loaded.move_to_end(index)
            pipes = [self._load(index, model, indices) for index, model in zip(indices, models, strict=True)]
            schedulers = [getattr(pipe, "scheduler", None) for pipe in pipes]
            try:
                yield pipes
            finally:
                for pipe, scheduler in zip(pipes, schedulers, strict=True):
                    if scheduler is not None:
                        pipe.scheduler = scheduler
                self._drop(kept=indices[-1:])

    @property
    def loaded(self) -> list[int]:
        """Returns the indices of the loaded models, the most recently used one last."""
        return list(self._loaded)

    def _load(self, index: int, model: Model, in_use: Sequence[int]) -> "DiffusionPipeline":
        import argparse

        import torch

        from ..commands.shared import find_device, load_checkpoint, place

        self._device = self._device or find_device(self._device_name)
        if index not in self._loaded:
            self._drop(kept=in_use, needed=_weights_size(model))
            pipe = load_checkpoint(argparse.Namespace(checkpoint=model.checkpoint, trust_remote_code=False))
            pipe = place(pipe, self._device, torch.float32)  # in which the same request draws the same images
            networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
            size = sum(tensor.nbytes for network in networks for tensor in network.state_dict().values())
            self._loaded[index] = pipe, size
        self._loaded.move_to_end(index)
        return self._loaded[index][0]

    def _drop(self, kept: Sequence[int], needed: int = 0) -> None:
        """Drops the least recently used models until the others, and one that needs so many bytes, are within the limit."""
        from ..hardware import memory_limit, release_memory

        limit = memory_limit() // MEMORY_SHARE if self._max_bytes is None else self._max_bytes
        for index in [index for index in self._loaded if index not in kept]:
            if sum(size for _, size in self._loaded.values()) + needed <= limit:
                break
            del self._loaded[index]
            release_memory()


def _weights_size(model: Model) -> int:
    """Returns the bytes of a model's weights, or 0 where they are still on the Hub."""
    parts = (*_FAMILIES, GUIDE)
    return sum(file.stat().st_size for part in parts for file in model.folder.glob(f"{part}/*.safetensors"))
