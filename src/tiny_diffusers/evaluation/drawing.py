"""
The images of an evaluation: given, drawn from a pipeline, or reconstructed by one, with their entry in the report.
"""

import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from PIL import Image

from ..data import ImageData, cache_root
from ..data.folders import abbreviate
from ..data.images import spell_values
from ..errors import UserError
from ..paths import public_name
from . import features as extractors
from . import images as image_sets
from . import regressor as regressors
from .extraction import CACHE_FORMAT, libraries
from .report import Protocol


Images = ImageData | np.ndarray | torch.Tensor | list[Image.Image]

_SAMPLER_OPTIONS = ("num_inference_steps", "eta", "guidance_scale")  # reported even if they have their defaults


def as_data(images: Images, name: str) -> ImageData:
    """Wraps images as a dataset of this name, unless they are one already."""
    if isinstance(images, ImageData):
        return images
    pixels = torch.from_numpy(np.array(image_sets.to_uint8(images)))
    return ImageData(pixels, None, None, name, "as given", image_sets.fingerprint(pixels.numpy()))


def check_values(given: DiffusionPipeline | Images, reference: ImageData) -> None:
    """Refuses to compare images of one value range with those of another."""
    if isinstance(given, ImageData | DiffusionPipeline):
        value_range = given.value_range if isinstance(given, ImageData) else getattr(given, "_value_range", None)
        if value_range != reference.value_range:
            raise UserError(
                f"The images have {spell_values(value_range)} and the reference's {spell_values(reference.value_range)}: "
                "load the reference with the value_range of the images."
            )


def get_images(
    pipe_or_images: DiffusionPipeline | Images,
    reference: ImageData,
    protocol: Protocol,
    state: PartialState,
    name: str | None = None,
) -> tuple[ImageData, dict[str, Any]]:
    """
    Returns the images to be measured, with the classes of the reference, and their entry in the report.

    Args:
        pipe_or_images (`DiffusionPipeline`, [`~tiny_diffusers.data.ImageData`], `np.ndarray`, `torch.Tensor` or `list`):
            Images, or a pipeline to draw them from.
        reference ([`~tiny_diffusers.data.ImageData`]): The real images.
        protocol ([`Protocol`]): How many images are drawn, and how.
        state (`PartialState`): The processes.
        name (`str`, *optional*): Name of the model.

    Raises:
        UserError: If they cannot be drawn, or compared with the reference.
    """
    if isinstance(pipe_or_images, image_sets.IMAGE_TYPES):
        data, source = _given_images(pipe_or_images, reference, protocol, name)
    elif isinstance(pipe_or_images, DiffusionPipeline):
        data, source = draw_images(pipe_or_images, reference, protocol, state, name)
    else:
        raise UserError(
            f"Only a pipeline or images are evaluated, not a {type(pipe_or_images).__name__}: give a tensor, an array, or "
            "a list of PIL images."
        )
    image_sets.check(data.images.numpy(), tuple(reference.images.shape[1:]), f"The images of '{source['name']}'")
    return data, source


def _given_images(
    images: Images, reference: ImageData, protocol: Protocol, name: str | None
) -> tuple[ImageData, dict[str, Any]]:
    """Returns images that need not be drawn, and their entry in the report."""
    if protocol.kind == "reconstructions":
        raise UserError("Reconstructions need a pipeline with a `reconstruct` method, a VAE: images were given.")
    data = with_labels_of(reference, image_sets.as_levels(as_data(images, name or "images")))
    return data, {**describe_images(name or data.name), "fingerprint": data.fingerprint}


def with_labels_of(reference: ImageData, data: ImageData) -> ImageData:
    """Renumbers the classes of images as in the reference, by name; drops the labels if a name is unknown there."""
    if data.labels is None or data.id2label == reference.id2label:
        return data
    numbers = {label: number for number, label in (reference.id2label or {}).items()}
    if any(label not in numbers for label in data.id2label.values()):
        return replace(data, labels=None, id2label=None)
    table = torch.tensor([numbers[data.id2label[label]] for label in range(len(data.id2label))])
    return replace(data, labels=table[data.labels], id2label=reference.id2label)


def draw_images(
    pipe: DiffusionPipeline, real: ImageData, protocol: Protocol, state: PartialState, name: str | None = None
) -> tuple[ImageData, dict[str, Any]]:
    """
    Draws images from a pipeline, or reconstructs real ones; returns them with their entry in the report. The cache keeps
    them.

    Args:
        pipe (`DiffusionPipeline`): The pipeline.
        real ([`~tiny_diffusers.data.ImageData`]): The reference, for its classes and what images are conditioned on.
        protocol ([`Protocol`]): How many images are drawn, and how.
        state (`PartialState`): The processes.
        name (`str`, *optional*): Name of the model.
    """
    real = image_sets.as_levels(real)
    reconstructs = protocol.kind == "reconstructions"
    if reconstructs and not hasattr(pipe, "reconstruct"):
        raise UserError(
            f"Reconstructions need a pipeline with a `reconstruct` method, a VAE: a {type(pipe).__name__} has none."
        )
    shape = tuple(real.images.shape[1:])
    if hasattr(pipe, "_image_shape"):
        image_sets.check_shape(tuple(pipe._image_shape), shape, "The model's images")
    num_images = min(protocol.num_images, len(real)) if reconstructs else protocol.num_images
    labels, id2label = _labels_to_draw(pipe, real, protocol)
    conditioning_images = conditions = None
    if reconstructs or pipe.config.get("conditioning") is not None or has_conditions(pipe, protocol):
        labels, conditioning_images, conditions = _conditions_of(pipe, real, protocol, labels, num_images)
    source = describe_pipeline(pipe, protocol, name)
    # The name decides no image; configs, libraries and the hardware do.
    described = [{key: value for key, value in source.items() if key != "name"}, _configs(pipe), libraries()]
    described += [state.device.type, protocol.seed, protocol.num_images, None if labels is None else labels.tolist()]
    if conditioning_images is not None or conditions is not None:
        described.append(real.fingerprint)
    originals = None
    if reconstructs:
        described += [protocol.kind, real.fingerprint]
        originals = real.images.numpy()
        originals = originals[image_sets.order_of(originals)[:num_images]]
    source["key"] = image_sets.digest(CACHE_FORMAT, described)

    images = image_sets.sample(
        pipe,
        shape,
        real.images.numpy().dtype,
        cache_root() / "samples" / source["key"],
        num_images=num_images,
        seed=protocol.seed,
        batch_size=protocol.batch_size,
        options=protocol.sampling,
        state=state,
        class_labels=labels,
        conditioning_images=conditioning_images,
        conditions=conditions,
        real=originals,
    )
    images = torch.from_numpy(images)
    labels = None if labels is None else torch.from_numpy(labels)
    names = None if conditions is None else source["conditions"]
    data = ImageData(
        images, labels, id2label, source["name"], "generated", "", conditions=conditions, condition_names=names
    )
    return data, source


def describe_images(name: str) -> dict[str, Any]:
    """Returns the entry in the report of images that need not be drawn."""
    return {"kind": "images", "name": public_name(name)}


def describe_pipeline(pipe: DiffusionPipeline, protocol: Protocol, name: str | None) -> dict[str, Any]:
    """Returns a pipeline's entry in the report: its weights, and how it is sampled."""
    scheduler = getattr(pipe, "scheduler", None)
    parameters = inspect.signature(pipe.__call__).parameters
    defaults = {option: parameters[option].default for option in _SAMPLER_OPTIONS if option in parameters}
    if "eta" in defaults and defaults["eta"] is None:  # the scheduler decides both if nobody says
        defaults |= {"eta": pipe._default_eta, "num_inference_steps": pipe._default_steps}
    if scheduler is not None and scheduler.config.get("stochastic_sampling"):  # which draws all noise anew
        defaults.pop("eta", None)
    if "guidance_scale" in defaults and not pipe._can_guide:
        del defaults["guidance_scale"]
    source = {
        "kind": "pipeline",
        "name": public_name(name or pipe.config.get("_name_or_path") or type(pipe).__name__),
        "class": type(pipe).__name__,
        "weights_sha256": {
            part: extractors.digest(module)
            for part, module in sorted(pipe.components.items())
            if isinstance(module, torch.nn.Module)
        },
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "sampling": defaults | protocol.sampling,
    }
    if pipe.config.get("conditioning") is not None:
        source["conditioning"] = pipe.config.conditioning
    if has_conditions(pipe, protocol):
        source["conditions"] = condition_names(pipe)
    if "clip_sample" in parameters and "guidance_scale" in defaults:  # guidance decides it if nobody says
        sampling = source["sampling"]
        interval = sampling.get("guidance_interval", (0.0, 1.0))
        clips = pipe._clips(sampling.get("clip_sample"), sampling["guidance_scale"], interval)
        source["sampling"] |= {} if clips is None else {"clip_sample": clips}
    if scheduler is not None:
        config = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
        config = json.loads(json.dumps(config, default=str), parse_constant=str)  # JSON has no infinity
        source["scheduler"] = {"class": type(scheduler).__name__, **config}
    return source


def _configs(pipe: DiffusionPipeline) -> dict[str, dict]:
    """Returns the configs of a pipeline and its components, without the paths that they were loaded from."""
    parts = {"pipeline": pipe, **pipe.components}
    configs = {name: dict(getattr(part, "config", {})) for name, part in parts.items()}
    return {
        part: {name: value for name, value in config.items() if not name.startswith("_")}
        for part, config in configs.items()
    }


def _labels_to_draw(
    pipe: DiffusionPipeline, reference: ImageData, protocol: Protocol
) -> tuple[np.ndarray | None, dict[int, str] | None]:
    """Returns equally many labels of each class of a conditional pipeline, whose classes must be the reference's."""
    classes = list(getattr(pipe, "_class_ids", []))
    if not classes or protocol.sampling.get("guidance_scale") == 0 or "class_labels" in protocol.sampling:
        return None, None
    named = pipe.config.get("id2label")
    if reference.id2label is not None:
        ours = {int(key): label for key, label in named.items()} if named else None
        if (ours is not None and ours != reference.id2label) or len(classes) != len(reference.id2label):
            raise UserError(
                f"The model's classes are {abbreviate(list(map(str, ours.values() if ours else classes)))}, and "
                f"the reference's {abbreviate(list(reference.id2label.values()))}: give the dataset, and the classes, "
                "that it was trained on."
            )
    return np.array([classes[i % len(classes)] for i in range(protocol.num_images)]), reference.id2label


def has_conditions(pipe_or_images: DiffusionPipeline | Images, protocol: Protocol) -> bool:
    """Checks that images are drawn by conditions: by a pipeline that takes some, with guidance."""
    if isinstance(pipe_or_images, ImageData):
        return pipe_or_images.conditions is not None
    has_some = getattr(pipe_or_images, "_condition_statistics", None) is not None
    return has_some and protocol.sampling.get("guidance_scale") != 0


def condition_names(pipe_or_images: DiffusionPipeline | ImageData) -> list[str]:
    """Returns the names of the conditions that images are drawn by; none for a pipeline that takes none."""
    if isinstance(pipe_or_images, ImageData):
        return pipe_or_images.condition_names
    statistics = getattr(pipe_or_images, "_condition_statistics", None)
    return [] if statistics is None else list(statistics.names)


def label_names(pipe_or_images: DiffusionPipeline | ImageData) -> list[str] | None:
    """Returns the names of the conditions that are labels, or None for images, whose pipeline is unknown."""
    if isinstance(pipe_or_images, ImageData):
        return None
    statistics = pipe_or_images._condition_statistics
    return [name for name, is_label in zip(statistics.names, statistics.are_labels, strict=True) if is_label]


def find_far_values(pipe_or_images: DiffusionPipeline | Images, drawn: ImageData) -> list[str]:
    """Returns a note on images that were drawn by values far outside the range of the pipeline's training images."""
    if not isinstance(pipe_or_images, DiffusionPipeline) or drawn.conditions is None:
        return []
    statistics = pipe_or_images._condition_statistics
    are_far = statistics.find_far_values(drawn.conditions)  # (N, D)
    if not are_far.any():
        return []
    names = [name for name, is_far in zip(statistics.names, are_far.any(dim=0).tolist(), strict=True) if is_far]
    return [
        f"{int(are_far.any(dim=1).sum()):,} of {len(drawn):,} images were drawn by values far outside those of the "
        f"training images, of {', '.join(names)}."
    ]


def _conditions_of(
    pipe: DiffusionPipeline, real: ImageData, protocol: Protocol, labels: np.ndarray | None, num_images: int
) -> tuple[np.ndarray | None, Callable[[int, int], torch.Tensor] | None, torch.Tensor | None]:
    """
    Returns the labels (N,), a function that returns the conditioning images `start` to `stop`, (B, K, h, w) in [0, 1], and
    the conditions (N, D). They are of the reference's images in the order of their hashes, again from the first on if there
    are fewer than N.
    """
    for name in ("conditions", "image"):
        if name in protocol.sampling:
            raise UserError(
                f"The protocol's `sampling` gives `{name}`, and images are drawn by those of the reference: leave it out."
            )
    order = image_sets.order_of(real.images.numpy())
    rows = torch.from_numpy(np.resize(order, num_images))
    if labels is not None:
        if real.labels is None:
            raise UserError(
                "The model takes the class of a real image, and the reference has no labels: name their column by "
                "--label_column."
            )
        labels = real.labels[rows].numpy()
    conditions = None
    if has_conditions(pipe, protocol):
        conditions = regressors.with_conditions(real, condition_names(pipe)).conditions[rows]
    conditioning = getattr(pipe, "_conditioning", None)
    if conditioning is None:
        return labels, None, conditions
    if not conditioning.is_made:
        if real.conditioning_images is None:
            raise UserError(
                "The model draws images from conditioning images, and the reference has none: name their column by "
                "--conditioning_column."
            )
        return labels, lambda start, stop: real.conditioning_images[rows[start:stop]] / 255, conditions
    return labels, lambda start, stop: pipe.observe(real.images[rows[start:stop]] / 255), conditions
