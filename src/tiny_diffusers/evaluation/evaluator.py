"""
`evaluate`: takes images and a reference, returns a report.

Images are drawn once and features are extracted once; all metrics are computed from these files. Every set is sorted
by the hashes of its images: "the first thousand" or "a random half" depends on the images only, not on their order.
"""

import platform
from collections.abc import Iterable
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
from ..errors import UserError
from ..files import replacing
from ..plots import image_grid
from . import classifier as classifiers
from . import features as extractors
from . import images as image_sets
from . import perceptual
from . import regressor as regressors
from .classifier import Classifier
from .drawing import (
    Images,
    as_data,
    check_values,
    condition_names,
    find_far_values,
    get_images,
    has_conditions,
    label_names,
    with_labels_of,
)
from .extraction import FEATURE_BATCH, FeatureFiles, libraries
from .likelihood import Likelihood, measure_likelihood, why_unavailable
from .measurement import FeatureSets, ImageSet, Measurement, OtherFigures, are_mostly_other, score_classes
from .metrics import Estimate
from .regressor import Regressor
from .report import Protocol, Report


_ENOUGH_IMAGES = 10_000  # the bias of a Frechet distance is small from here on, with any features
_NAMES_OF_LEFT_OUT = {
    "bits_per_dim": "Bits/dim were",
    "classifier_score": "The score by a classifier of the data's classes was",
    "feature_distance": "The perceptual distance was",
    "condition_agreement": "The agreement with the conditions was",
}


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
    protocol, state, notes = protocol or Protocol(), processes(), list(notes)
    reference, training = _check_real_images(pipe_or_images, reference, training)
    shape = tuple(reference.images.shape[1:])
    extractor = _load_extractor(protocol, shape, state)
    left_out = _find_left_out(pipe_or_images, reference, protocol, extractor)
    measured_metrics = [metric for metric in protocol.metrics if left_out.get(metric) is None]
    shared = 0 if training is None else image_sets.count_shared(reference.images.numpy(), training.images.numpy())
    unseen = training if training is not None and are_mostly_other(shared, len(reference)) else None
    if "condition_agreement" in measured_metrics:
        of_regressor, unread = _split_for_regressor(pipe_or_images, reference, unseen)
        notes += unread
    files = FeatureFiles(extractor, shape, state)  # refuses channels that the features lack, before images are drawn

    # 1. Images
    data, source = get_images(pipe_or_images, reference, protocol, state, name)
    notes += find_far_values(pipe_or_images, data)

    # 2. Features
    sets = _extract_features(files, data, reference, training, protocol, shared)
    generated, real = sets.generated, sets.real

    # 3. What is not computed from these features
    others, likelihood, classifier, regressor = [], None, None, None
    if "bits_per_dim" in measured_metrics:
        folder = cache_root() / "samples"
        likelihood = measure_likelihood(pipe_or_images, real, protocol, folder, source["key"], state)
        source["likelihood"] = likelihood.describe()
        others.append(OtherFigures({"bits_per_dim": likelihood.mean()}))
    if "classifier_score" in measured_metrics:
        with state.main_process_first():
            classifier = classifiers.load_classifier(*classifiers.split_real_images(reference, unseen))
        others.append(_classify(classifier, data, sets, protocol, state))
    if "condition_agreement" in measured_metrics:
        with state.main_process_first():
            regressor = regressors.load_regressor(*of_regressor, label_names(pipe_or_images))
        others.append(_read_conditions(regressor, generated))
    if "feature_distance" in measured_metrics:
        others.append(perceptual.measure_distances(files, generated, real))
        notes += perceptual.find_gaps(generated, real)

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


# Before images are drawn


def _check_real_images(
    pipe_or_images: DiffusionPipeline | Images, reference: Images, training: ImageData | None
) -> tuple[ImageData, ImageData | None]:
    """Returns the reference and the training images, with the same classes; refuses those that cannot be compared."""
    reference = as_data(reference, "reference")
    check_values(pipe_or_images, reference)
    reference = image_sets.as_levels(reference)
    shape = tuple(reference.images.shape[1:])
    image_sets.check(reference.images.numpy(), shape, "The reference's images")
    if training is not None:
        training = image_sets.as_levels(training)
        image_sets.check(training.images.numpy(), shape, "The training images")
        training = with_labels_of(reference, training)
    return reference, training


def _load_extractor(protocol: Protocol, shape: tuple[int, int, int], state: PartialState) -> extractors.Extractor:
    """Loads the features of a protocol for images (C, H, W)."""
    extractor = extractors.load(protocol.features, protocol.feature_weights, protocol.feature_dtype, state.device)
    extractor, channels = extractor.of_images(*shape[1:]), protocol.feature_channels
    if channels is None:
        return extractor
    if max(channels) >= shape[0]:
        raise UserError(f"feature_channels {channels}: the images have the channels 0 to {shape[0] - 1}.")
    return extractor.of_channels(channels)


def _find_left_out(
    pipe_or_images: DiffusionPipeline | Images,
    reference: ImageData,
    protocol: Protocol,
    extractor: extractors.Extractor,
) -> dict[str, str | None]:
    """Returns why each metric that needs more than features cannot be measured, or None."""
    left_out = {"bits_per_dim": why_unavailable(pipe_or_images, reference, protocol)}
    has_some = has_conditions(pipe_or_images, protocol)
    obstacles = {
        "classifier_score": classifiers.why_impossible(reference),
        "feature_distance": perceptual.why_impossible(extractor),
        "condition_agreement": regressors.why_impossible(reference, has_some),
    }
    return left_out | {metric: protocol.leave_out(metric, obstacle) for metric, obstacle in obstacles.items()}


def _split_for_regressor(
    pipe_or_images: DiffusionPipeline | Images, reference: ImageData, unseen: ImageData | None
) -> tuple[tuple[ImageData, ImageData], list[str]]:
    """Returns the real images that the regressor is trained and tested on, and a note on what it can't read."""
    names = condition_names(pipe_or_images)
    training, held_out = regressors.split_real_images(regressors.with_conditions(reference, names), unseen)
    constant = [name for name in names if name not in training.condition_names]
    notes = []
    if constant:
        notes.append(
            f"The agreement with {', '.join(constant)} was not measured: the real images to train a regressor on have "
            "one value only."
        )
    return (training, held_out), notes


# Features, and figures that need other networks


def _extract_features(
    files: FeatureFiles,
    data: ImageData,
    reference: ImageData,
    training: ImageData | None,
    protocol: Protocol,
    shared: int,
) -> FeatureSets:
    """Extracts the features of the images, the real ones, and the baselines that are made from these."""
    generated = files.of_images(data, "the images", limit=protocol.num_images)
    real = files.of_images(reference, "the reference")
    seen = None
    if training is not None and ("nearest_neighbor" in protocol.metrics or protocol.baselines):
        # The distance to the training set needs all of it, the baselines only as many images as were generated.
        limit = None if "nearest_neighbor" in protocol.metrics else len(generated)
        seen = files.of_images(training, "the training set", limit=limit)
    base = real if seen is None else seen
    baselines = {kind: files.of_baseline(kind, base, len(generated)) for kind in protocol.baselines if kind != "real"}
    return FeatureSets(generated, real, seen, baselines, shared)


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
