"""
`evaluate`: takes images and a reference, returns a report.

Images are drawn once and features are extracted once; all metrics are computed from these files. Every set is sorted
by the hashes of its images: "the first thousand" or "a random half" depends on the images only, not on their order.
"""

import inspect
import json
import platform
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from diffusers import DiffusionPipeline
from PIL import Image

from .. import hardware
from ..data import ImageData, cache_root
from ..data.folders import abbreviate
from ..data.images import spell_values
from ..errors import UserError
from ..files import replacing
from ..paths import public_name
from ..plots import image_grid
from . import classifier as classifiers
from . import features as extractors
from . import images as image_sets
from . import perceptual
from . import regressor as regressors
from .classifier import Classifier
from .extraction import CACHE_FORMAT, FEATURE_BATCH, FeatureFiles, libraries
from .likelihood import Likelihood, measure_likelihood, why_unavailable
from .measurement import FeatureSets, ImageSet, Measurement, OtherFigures, are_mostly_other, score_classes
from .metrics import Estimate
from .regressor import Regressor
from .report import Protocol, Report


Images = ImageData | np.ndarray | torch.Tensor | list[Image.Image]

_ENOUGH_IMAGES = 10_000  # the bias of a Frechet distance is small from here on, with any features
_NAMES_OF_LEFT_OUT = {
    "bits_per_dim": "Bits/dim were",
    "classifier_score": "The score by a classifier of the data's classes was",
    "feature_distance": "The perceptual distance was",
    "condition_agreement": "The agreement with the conditions was",
}
_SAMPLER_OPTIONS = ("num_inference_steps", "eta", "guidance_scale")  # reported even if they have their defaults


def evaluate(
    pipe_or_images: DiffusionPipeline | Images,
    reference: Images,
    protocol: Protocol | None = None,
    *,
    training: ImageData | None = None,
    output_dir: str | Path | None = None,
    name: str | None = None,
    load: dict[str, Any] | None = None,
    notes: Iterable[str] = (),
    command: str = "",
) -> Report:
    """
    Measures a pipeline's images, or any images, against real ones.

    Several processes (`accelerate launch`, `torchrun`) share the work on a disk that all of them see, and all of them
    return the report.

    Args:
        pipe_or_images (`DiffusionPipeline`, [`~tiny_diffusers.data.ImageData`], `np.ndarray`, `torch.Tensor` or `list`):
            A pipeline to draw images from, or images: (N, C, H, W), uint8 or floats in [0, 1], or a list of PIL images.
        reference ([`~tiny_diffusers.data.ImageData`], `np.ndarray`, `torch.Tensor` or `list`):
            Real images of the same size, channels and value range, with labels if classes are to be measured.
        protocol ([`Protocol`], *optional*): Settings of the evaluation.
        training ([`~tiny_diffusers.data.ImageData`], *optional*): The training set of the model, for the distance to
            it and for the baselines. Without it, the baselines are made of the reference's images.
        output_dir (`str` or `Path`, *optional*): Folder for `report.json`, `report.md` and `report.png`. Drawn images
            are kept in the package's cache, and a stopped run resumes from them.
        name (`str`, *optional*): Name of the model in the report; of a local path the last name.
        load (`dict`, *optional*): Arguments of [`~tiny_diffusers.data.load_images`] for the reference, for the report.
        notes (iterable of `str`, *optional*): Further caveats for the report.
        command (`str`, *optional*): The command line, for the report.

    Returns:
        [`Report`]: The metrics with their protocol.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If images cannot be compared, or features are not available.
    """
    protocol = protocol or Protocol()
    state = processes()
    extractor = extractors.load(protocol.features, protocol.feature_weights, protocol.feature_dtype, state.device)
    reference = _as_data(reference, "reference")
    _check_values(pipe_or_images, reference)
    reference = image_sets.as_levels(reference)
    shape = tuple(reference.images.shape[1:])
    extractor = extractor.of_images(*shape[1:])
    if protocol.feature_channels is not None:
        if max(protocol.feature_channels) >= shape[0]:
            raise UserError(
                f"feature_channels {protocol.feature_channels}: the images have the channels 0 to {shape[0] - 1}."
            )
        extractor = extractor.of_channels(protocol.feature_channels)
    image_sets.check(reference.images.numpy(), shape, "The reference's images")
    if training is not None:
        training = image_sets.as_levels(training)
        image_sets.check(training.images.numpy(), shape, "The training images")
        training = _with_labels_of(reference, training)
    left_out = {
        "bits_per_dim": why_unavailable(pipe_or_images, reference, protocol),
        "classifier_score": protocol.leave_out("classifier_score", classifiers.why_impossible(reference)),
        "feature_distance": protocol.leave_out("feature_distance", perceptual.why_impossible(extractor)),
        "condition_agreement": protocol.leave_out(
            "condition_agreement", regressors.why_impossible(reference, _has_conditions(pipe_or_images, protocol))
        ),
    }
    measured_metrics = [metric for metric in protocol.metrics if left_out.get(metric) is None]
    shared = 0 if training is None else image_sets.count_shared(reference.images.numpy(), training.images.numpy())
    unseen = training if training is not None and are_mostly_other(shared, len(reference)) else None
    if "condition_agreement" in measured_metrics:
        names = _condition_names(pipe_or_images)
        of_regressor = regressors.split_real_images(regressors.with_conditions(reference, names), unseen)
        constant = [name for name in names if name not in of_regressor[0].condition_names]
        if constant:
            notes = [
                *notes,
                f"The agreement with {', '.join(constant)} was not measured: the real images to train a regressor on have "
                "one value only.",
            ]
    samples = cache_root() / "samples"
    files = FeatureFiles(extractor, shape, state)  # refuses channels that the features lack, before images are drawn

    # 1. Images
    if isinstance(pipe_or_images, image_sets.IMAGE_TYPES):
        data, source = _given_images(pipe_or_images, reference, protocol, name)
    elif not isinstance(pipe_or_images, DiffusionPipeline):
        raise UserError(
            f"Only a pipeline or images are evaluated, not a {type(pipe_or_images).__name__}: give a tensor, an array, or "
            "a list of PIL images."
        )
    else:
        data, source = draw_images(pipe_or_images, reference, protocol, state, name)
        notes = [*notes, *_far_values(pipe_or_images, data)]
    image_sets.check(data.images.numpy(), shape, f"The images of '{source['name']}'")

    # 2. Features
    generated = files.of_images(data, "the images", limit=protocol.num_images)
    real = files.of_images(reference, "the reference")
    seen = None
    if training is not None and ("nearest_neighbor" in protocol.metrics or protocol.baselines):
        # The distance to the training set needs all of it, the baselines only as many images as were generated.
        limit = None if "nearest_neighbor" in protocol.metrics else len(generated)
        seen = files.of_images(training, "the training set", limit=limit)
    base = real if seen is None else seen
    baselines = {kind: files.of_baseline(kind, base, len(generated)) for kind in protocol.baselines if kind != "real"}
    sets = FeatureSets(generated, real, seen, baselines, shared)

    # 3. What is not computed from these features
    others, likelihood, classifier, regressor = [], None, None, None
    if "bits_per_dim" in measured_metrics:
        likelihood = measure_likelihood(pipe_or_images, real, protocol, samples, source["key"], state)
        source["likelihood"] = likelihood.describe()
        others.append(OtherFigures({"bits_per_dim": likelihood.mean()}))
    if "classifier_score" in measured_metrics:
        with state.main_process_first():
            classifier = classifiers.load_classifier(*classifiers.split_real_images(reference, unseen))
        others.append(_classify(classifier, data, sets, protocol, state))
    if "condition_agreement" in measured_metrics:
        with state.main_process_first():
            regressor = regressors.load_regressor(*of_regressor, _label_names(pipe_or_images))
        others.append(_read_conditions(regressor, generated))
    if "feature_distance" in measured_metrics:
        others.append(perceptual.measure_distances(files, generated, real))
        notes = [*notes, *perceptual.find_gaps(generated, real)]

    # 4. Metrics and report
    report = None
    if state.is_main_process:
        measured = Measurement(protocol, extractor, sets, others)
        names = reference.id2label or {}
        report = Report(
            protocol=protocol.describe(),
            measured_by=_measured_by(measured, training, likelihood, classifier, regressor, load),
            source=source,
            figures=_as_json(measured.figures),
            per_class={names.get(i, str(i)): _as_json(figures) for i, figures in measured.per_class.items()},
            per_condition={name: _as_json(figures) for name, figures in measured.per_condition.items()},
            baselines={
                kind: {"images": len(sets.compared(kind)[0]), "figures": _as_json(figures)}
                for kind, figures in measured.baselines.items()
            },
            warnings=[
                *notes,
                *_warnings(measured, training, likelihood, [classifier, regressor], _shown(source), left_out),
            ],
            versions=_versions(),
            command=command,
        )
        if output_dir is not None:
            report.save(output_dir)
            with replacing(Path(output_dir, "report.png")) as staging:
                _picture(sets, "nearest_neighbor" in protocol.metrics).save(staging, format="PNG")
    (report,) = broadcast_object_list([report])
    return report


def processes() -> PartialState:
    """Returns the processes that share the work: a single one if none were launched."""
    # On CPUs accelerate must be told to use several processes. They wait while the main one computes the metrics.
    return PartialState(cpu=hardware.default_device().type == "cpu", timeout=timedelta(hours=12))


def _as_data(images: Images, name: str) -> ImageData:
    if isinstance(images, ImageData):
        return images
    pixels = torch.from_numpy(np.array(image_sets.to_uint8(images)))
    return ImageData(pixels, None, None, name, "as given", image_sets.fingerprint(pixels.numpy()))


def _check_values(given: DiffusionPipeline | Images, reference: ImageData) -> None:
    """Refuses to compare images of one value range with those of another."""
    if isinstance(given, ImageData | DiffusionPipeline):
        value_range = given.value_range if isinstance(given, ImageData) else getattr(given, "_value_range", None)
        if value_range != reference.value_range:
            raise UserError(
                f"The images have {spell_values(value_range)} and the reference's {spell_values(reference.value_range)}: "
                "load the reference with the value_range of the images."
            )


# Images


def _given_images(
    images: Images, reference: ImageData, protocol: Protocol, name: str | None
) -> tuple[ImageData, dict[str, Any]]:
    """Returns images that need not be drawn, and their entry in the report."""
    if protocol.kind == "reconstructions":
        raise UserError("Reconstructions need a pipeline with a `reconstruct` method, a VAE: images were given.")
    data = _with_labels_of(reference, image_sets.as_levels(_as_data(images, name or "images")))
    return data, {**describe_images(name or data.name), "fingerprint": data.fingerprint}


def _with_labels_of(reference: ImageData, data: ImageData) -> ImageData:
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
    if reconstructs or pipe.config.get("conditioning") is not None or _has_conditions(pipe, protocol):
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
    if _has_conditions(pipe, protocol):
        source["conditions"] = list(pipe._condition_statistics.names)
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


def _has_conditions(pipe_or_images: DiffusionPipeline | Images, protocol: Protocol) -> bool:
    """Checks that images are drawn by conditions: by a pipeline that takes some, with guidance."""
    if isinstance(pipe_or_images, ImageData):
        return pipe_or_images.conditions is not None
    has_some = getattr(pipe_or_images, "_condition_statistics", None) is not None
    return has_some and protocol.sampling.get("guidance_scale") != 0


def _condition_names(pipe_or_images: DiffusionPipeline | ImageData) -> list[str]:
    """Returns the names of the conditions that images are drawn by."""
    if isinstance(pipe_or_images, ImageData):
        return pipe_or_images.condition_names
    return pipe_or_images._condition_statistics.names


def _label_names(pipe_or_images: DiffusionPipeline | ImageData) -> list[str] | None:
    """Returns the names of those that are labels, or None for images, whose pipeline is unknown."""
    if isinstance(pipe_or_images, ImageData):
        return None
    statistics = pipe_or_images._condition_statistics
    return [name for name, is_label in zip(statistics.names, statistics.are_labels, strict=True) if is_label]


def _far_values(pipe: DiffusionPipeline, drawn: ImageData) -> list[str]:
    """Returns a note on images that were drawn by values far outside the range of the pipeline's training images."""
    if drawn.conditions is None:
        return []
    statistics = pipe._condition_statistics
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
    if _has_conditions(pipe, protocol):
        conditions = regressors.with_conditions(real, pipe._condition_statistics.names).conditions[rows]
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


# A classifier of the data's classes


def _classify(
    classifier: Classifier, data: ImageData, sets: FeatureSets, protocol: Protocol, state: PartialState
) -> OtherFigures:
    """Scores the images, and beside them held-out real images and the baselines that are made from these."""
    files = FeatureFiles(classifier.extractor, tuple(data.images.shape[1:]), state)
    count = len(sets.generated)
    generated = files.of_images(data, "the images, by the classifier", limit=protocol.num_images)
    held_out = files.of_images(classifier.held_out, "held-out images, by the classifier", limit=count)
    baselines = {kind: files.of_baseline(kind, held_out, count) for kind in sets.baselines} | {"real": held_out}
    return score_classes(classifier.extractor, generated, baselines, protocol.num_jackknife)


def _read_conditions(regressor: Regressor, generated: ImageSet) -> OtherFigures:
    """Compares the conditions that images were drawn by with what a regressor reads off them, and off real images."""
    per_condition = regressor.compare(generated.data.take(torch.from_numpy(generated.order)))
    real = regressors.summarize(regressor.compare(regressor.held_out))
    return OtherFigures(regressors.summarize(per_condition), {"real": real}, per_condition=per_condition)


# Report


def _shown(source: dict[str, Any]) -> str | None:
    """Returns in words what of the reference's images the model was shown to draw each image, or None."""
    shown = [source["conditioning"]] if "conditioning" in source else []
    return ", ".join([*shown, *source.get("conditions", [])]) or None


def _measured_by(
    measured: Measurement,
    training: ImageData | None,
    likelihood: Likelihood | None,
    classifier: Classifier | None,
    regressor: Regressor | None,
    load: dict[str, Any] | None,
) -> dict[str, Any]:
    """Returns everything that must agree before two reports can be compared."""

    def describe(data: ImageData) -> dict[str, Any]:
        return {
            "name": data.name,
            "split": data.split,
            "images": len(data),
            "shape": list(data.images.shape[1:]),
            "fingerprint": data.fingerprint,
            "notes": data.notes,
        }

    measured_by = {
        "num_images": len(measured.sets.generated),
        "features": measured.extractor.preprocessing,
        "feature_batch": FEATURE_BATCH,
        "reference": describe(measured.sets.real.data) | {"load": load or {}},
        "max_neighbors": measured.protocol.max_neighbors,
    }
    if likelihood is not None:
        measured_by["likelihood_images"] = measured.protocol.likelihood_images
        measured_by["likelihood_levels"] = likelihood.levels
        measured_by["likelihood_kind"] = likelihood.kind
        if likelihood.given:
            measured_by["likelihood_given"] = likelihood.given
    if classifier is not None:
        measured_by["classifier"] = classifier.describe()
    if regressor is not None:
        measured_by["regressor"] = regressor.description
    if training is not None:
        measured_by["training"] = describe(training)
    return measured_by


def _warnings(
    measured: Measurement,
    training: ImageData | None,
    likelihood: Likelihood | None,
    judges: list[Classifier | Regressor | None],
    shown: str | None,
    left_out: dict[str, str | None],
) -> list[str]:
    """Returns the caveats of the metrics; `left_out` has a reason for each metric that could not be measured."""
    protocol, sets = measured.protocol, measured.sets
    warnings = []
    if protocol.kind == "reconstructions":
        warnings.append(
            "The images are reconstructions of the reference's own: the metrics show how much the latents preserve, "
            "and nothing about samples."
        )
    if shown is not None:
        warnings.append(
            f"Each image is drawn from what an image of the reference shows ({shown}): the metrics cannot be compared "
            "with those of models that are shown nothing."
        )
    count, dim = len(sets.generated), sets.real.features.shape[1]
    has_frechet = not {"frechet_distance", "frechet_infinity"}.isdisjoint(protocol.metrics)
    for what, size in (("images", count), ("reference images", len(sets.real))):
        if has_frechet and size < max(_ENOUGH_IMAGES, dim):
            limit = f"their {dim:,} features" if size < dim else f"{_ENOUGH_IMAGES:,}"
            warnings.append(
                f"{size:,} {what} are fewer than {limit}: a Frechet distance is too large by an amount that depends "
                "on their number. Compare it only with that of real images at the same size, or use the kernel "
                "distance."
            )
    sizes = [min(size, protocol.max_neighbors) for size in (count, len(sets.real))]
    if "density_coverage" in protocol.metrics and sizes[0] != sizes[1]:
        warnings.append(
            f"Density and coverage compare {min(sizes):,} images with as many reference images, and each class "
            "likewise: coverage depends on the ratio of the two numbers."
        )
    if count < protocol.num_images:
        warnings.append(f"{protocol.num_images:,} images were requested, but there are only {count:,}.")
    if measured.baselines.get("real"):
        size = len(sets.real_against_real[0])
        if not sets.has_other_real_images:
            warnings.append(
                f"Real against real compares one half of the reference with the other, {size:,} images each: there "
                "are no other real images."
            )
        elif size < count:
            warnings.append(f"Real against real has only {size:,} images, the whole training set.")
    if "nearest_neighbor" in protocol.metrics and training is None:
        warnings.append("The distance to the training set was not measured: no training set was given.")
    if "inception_score" in protocol.metrics and measured.extractor.classifier is None:
        warnings.append(f"The classifier score was not measured: '{protocol.features}' has no classifier.")
    for metric, reason in left_out.items():
        if reason is not None:
            warnings.append(f"{_NAMES_OF_LEFT_OUT[metric]} not measured: {reason}.")
    if likelihood is not None:
        warnings.append(f"Bits/dim are {likelihood.describe()}.")
    warnings += [judge.summary() for judge in judges if judge is not None]
    reference = sets.real.data
    if sets.shared == len(reference):
        warnings.append(
            f"The reference is the training split: its {len(reference):,} images ({reference.split}) are those that the "
            "model was trained on, or that it was validated on, so the metrics say nothing about other images."
        )
    elif sets.shared:
        warnings.append(f"{sets.shared:,} of the {len(reference):,} reference images are among the training images.")
    elif training is None and reference.split.startswith("train"):
        warnings.append(f"The reference is the split {reference.split}, on which the model may have been trained.")
    return warnings + [f"{reference.name}: {note}." for note in reference.public_notes]


def _as_json(figures: dict[str, Estimate]) -> dict[str, dict]:
    return {name: figure._asdict() for name, figure in figures.items() if np.isfinite(figure.value)}


def _versions() -> dict[str, str]:
    others = {module.__name__: module.__version__ for module in (accelerate, np)}
    return {"python": platform.python_version(), **libraries(), **others}


def _picture(sets: FeatureSets, with_neighbors: bool) -> Image.Image:
    """Draws images above real ones and, if the training set is known, those nearest to it above their neighbors."""
    generated, real = sets.generated, sets.real
    columns = min(12, len(generated), len(real))
    rows = {
        "images": generated.data.images.numpy()[np.sort(generated.order[:columns])],
        "real": real.data.images.numpy()[np.sort(real.order[:columns])],
    }
    if with_neighbors and sets.training is not None:
        distances, nearest = sets.nearest_in_training
        closest = np.argsort(distances, kind="stable")[:columns]
        rows["nearest to training"] = generated.data.images.numpy()[generated.order[closest]]
        rows["what they are near"] = sets.training.data.images.numpy()[sets.training.order[nearest[closest]]]
    images = image_sets.as_pictures(np.concatenate(list(rows.values())))
    return image_grid(images, columns, row_labels=list(rows))
