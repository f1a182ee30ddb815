"""All metrics of a protocol, computed from features: of the images, of each class, and of the baselines."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ..data import ImageData
from . import metrics
from .features import Extractor
from .metrics import Estimate
from .report import Protocol


_MIN_CLASS_IMAGES = 10  # a class with fewer images has no metrics of its own


@dataclass
class FeatureSet:
    """Features of images in the order of their hashes."""

    features: np.ndarray  # (N, D)
    labels: np.ndarray | None  # (N,)

    def __len__(self) -> int:
        return len(self.features)

    def subset(self, rows: slice | np.ndarray) -> "FeatureSet":
        return FeatureSet(self.features[rows], None if self.labels is None else self.labels[rows])

    def halves(self) -> tuple["FeatureSet", "FeatureSet"]:
        half = len(self) // 2
        return self.subset(slice(half)), self.subset(slice(half, None))

    @cached_property
    def frechet(self) -> metrics.FrechetReference:
        """These features as the reference of Frechet distances, factored at the first use."""
        return metrics.FrechetReference(self.features)


@dataclass
class ImageSet(FeatureSet):
    """Features with their images: row i belongs to `data.images[order[i]]`."""

    data: ImageData
    order: np.ndarray  # (N,)
    fingerprint: str  # of all images of `data`


@dataclass
class FeatureSets:
    """All sets that a protocol compares."""

    generated: ImageSet
    real: ImageSet  # the reference
    training: ImageSet | None  # the training set, if a metric or a baseline needs it
    baselines: dict[str, FeatureSet]  # without "real", whose features are those of the other sets
    shared: int = 0  # images of the reference that are among the training images

    @property
    def has_other_real_images(self) -> bool:
        """True if there are real images beside the reference: a training set that shares less than half of its images."""
        return self.training is not None and are_mostly_other(self.shared, len(self.real))

    @cached_property
    def real_against_real(self) -> tuple[FeatureSet, FeatureSet]:
        """As many training images as were generated and the reference, or else the halves of the reference."""
        if self.has_other_real_images:
            return self.training.subset(slice(len(self.generated))), self.real
        return self.real.halves()

    def compared(self, baseline: str) -> tuple[FeatureSet, FeatureSet]:
        """Returns the images of a baseline, and the real images that they are compared with."""
        return self.real_against_real if baseline == "real" else (self.baselines[baseline], self.real)

    @cached_property
    def nearest_in_training(self) -> tuple[np.ndarray, np.ndarray]:
        """The distance of each generated image to the nearest training image, and the row of the latter."""
        return metrics.nearest_neighbors(self.generated.features, self.training.features)


@dataclass
class OtherFigures:
    """Metrics that are not computed from the protocol's features."""

    generated: dict[str, Estimate]
    baselines: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    per_class: dict[int, dict[str, Estimate]] = field(default_factory=dict)
    per_condition: dict[str, dict[str, Estimate]] = field(default_factory=dict)


class Measurement:
    """
    Metrics of a protocol.

    Args:
        protocol ([`Protocol`]): The protocol.
        extractor ([`Extractor`]): The extractor of the features, for its classifier.
        sets ([`FeatureSets`]): The features.
        others (list of [`OtherFigures`]): Metrics that do not depend on these features.

    Attributes:
        figures (`dict[str, Estimate]`): metric -> value.
        per_class (`dict[int, dict[str, Estimate]]`): class -> metric -> value.
        per_condition (`dict[str, dict[str, Estimate]]`): condition -> metric -> value.
        baselines (`dict[str, dict[str, Estimate]]`): baseline -> metric -> value.
    """

    def __init__(self, protocol: Protocol, extractor: Extractor, sets: FeatureSets, others: list[OtherFigures]):
        self.protocol, self.extractor, self.sets = protocol, extractor, sets
        self._kernel = metrics.KernelReference(sets.real.features[: protocol.max_neighbors])
        self.figures = self._compare(sets.generated, sets.real)
        if protocol.num_jackknife:
            self._add_frechet_errors(protocol.num_jackknife)
        self.baselines = {
            name: self._compare(*sets.compared(name), extrapolate=name == "real") for name in protocol.baselines
        }
        self.per_class, self.per_condition = {}, {}
        labels = sets.real.labels
        if sets.generated.labels is not None and labels is not None and len(np.unique(labels)) > 1:
            self._measure_classes()
        if "nearest_neighbor" in protocol.metrics and sets.training is not None:
            self._measure_neighbors()
        for other in others:
            self.figures |= other.generated
            self.per_condition |= other.per_condition
            for ours, theirs in ((self.baselines, other.baselines), (self.per_class, other.per_class)):
                for name in ours.keys() & theirs.keys():
                    ours[name] |= theirs[name]

    def _compare(self, judged: FeatureSet, real: FeatureSet, extrapolate: bool = True) -> dict[str, Estimate]:
        """Computes the metrics of one set against real images. Sets that are too small for a metric go without it."""
        asked, most = self.protocol.metrics, self.protocol.max_neighbors
        smaller = min(len(judged), len(real))
        figures = {}
        if "frechet_distance" in asked:
            figures["frechet_distance"] = Estimate(real.frechet.distance(judged.features))
        if "frechet_infinity" in asked and extrapolate and len(judged) >= 4:
            figures["frechet_infinity"] = Estimate(metrics.frechet_infinity(judged.features, real.frechet))
        if "kernel_distance" in asked and smaller >= 4:
            known = self._kernel if real is self.sets.real else real.features[:most]
            figures["kernel_distance"] = metrics.kernel_distance(judged.features[:most], known)
        if "inception_score" in asked and self.extractor.classifier is not None:
            figures["inception_score"] = metrics.inception_score(self.extractor.probabilities(judged.features))
        if "precision_recall" in asked and smaller > 5:
            figures |= metrics.precision_recall(real.features[:most], judged.features[:most])
        if "density_coverage" in asked and smaller > 5:
            figures |= metrics.density_coverage(real.features[:most], judged.features[:most])
        if "diversity" in asked:
            figures |= _diversity(judged, real)
        return figures

    def _add_frechet_errors(self, num_groups: int) -> None:
        """Adds the standard errors to the Frechet distances of the images."""
        images, reference = self.sets.generated.features, self.sets.real.frechet
        asked = [name in self.figures for name in ("frechet_distance", "frechet_infinity")]
        if not any(asked) or len(images) < 4:
            return
        errors = metrics.frechet_errors(images, reference, num_groups)
        groups = min(num_groups, len(images))
        kind = f"standard error over images, with the reference held fixed: jackknife of {groups} groups"
        for name, error in zip(("frechet_distance", "frechet_infinity"), errors, strict=True):
            if name in self.figures:
                self.figures[name] = self.figures[name]._replace(error=error, error_kind=kind)

    def _measure_classes(self) -> None:
        """Measures each class on its own, and how often a classifier of real images finds the requested class."""
        generated, real = self.sets.generated, self.sets.real
        learned, tested = self.sets.real_against_real
        if learned.labels is None:
            learned, tested = real.halves()
        probe = metrics.class_probe(learned.features, learned.labels)
        agrees = probe(generated.features) == generated.labels
        self.figures["class_agreement"] = share(agrees)
        if "real" in self.baselines:
            self.baselines["real"]["class_agreement"] = share(probe(tested.features) == tested.labels)

        for label in np.unique(generated.labels):
            rows, real_rows = generated.labels == label, real.labels == label
            if min(rows.sum(), real_rows.sum()) < _MIN_CLASS_IMAGES:
                continue
            figures = self._compare(generated.subset(rows), real.subset(real_rows), extrapolate=False)
            self.per_class[int(label)] = {**figures, "class_agreement": share(agrees[rows])}

    def _measure_neighbors(self) -> None:
        """Measures the distance to the training set, beside that of real images that are not in it."""
        sets, most = self.sets, self.protocol.max_neighbors
        distances = sets.nearest_in_training[0][:most]
        self.figures["nearest_neighbor"] = Estimate(float(np.median(distances)))
        if not sets.has_other_real_images:
            return
        unseen, _ = metrics.nearest_neighbors(sets.real.features[:most], sets.training.features)
        self.figures["near_copies"] = share(distances < np.quantile(unseen, 0.01))
        if "real" in self.baselines:
            self.baselines["real"]["nearest_neighbor"] = Estimate(float(np.median(unseen)))
            self.baselines["real"]["near_copies"] = Estimate(0.01)


def are_mostly_other(shared: int, count: int) -> bool:
    """Checks that less than half of `count` images are shared with another set."""
    return 2 * shared < count


def score_classes(
    extractor: Extractor, generated: FeatureSet, baselines: dict[str, FeatureSet], num_groups: int
) -> OtherFigures:
    """
    Computes the scores of a classifier of the data's own classes.

    Args:
        extractor ([`Extractor`]): The classifier.
        generated ([`FeatureSet`]): Its features of the images. With labels, the share of images that the classifier
            assigns to their class is computed too.
        baselines (`dict[str, FeatureSet]`): Its features of the baselines' images.
        num_groups (`int`): Groups of the jackknife for the standard error of the score.
    """

    def score(images: FeatureSet) -> tuple[dict[str, Estimate], np.ndarray | None]:
        probabilities = extractor.probabilities(images.features)
        figures, agrees = {"classifier_score": metrics.classifier_score(probabilities, num_groups)}, None
        if generated.labels is not None and images.labels is not None:
            agrees = probabilities.argmax(1) == images.labels
            figures["classifier_agreement"] = share(agrees)
        return figures, agrees

    figures, agrees = score(generated)
    classes = [] if agrees is None else np.unique(generated.labels)
    per_class = {int(k): {"classifier_agreement": share(agrees[generated.labels == k])} for k in classes}
    return OtherFigures(figures, {name: score(images)[0] for name, images in baselines.items()}, per_class)


def _diversity(judged: FeatureSet, real: FeatureSet) -> dict[str, Estimate]:
    """Computes the spread of images relative to that of real ones; if both have classes, the mean over classes."""
    if judged.labels is not None and real.labels is not None:
        ours = metrics.spread_within_classes(judged.features, judged.labels)
        theirs = metrics.spread_within_classes(real.features, real.labels)
        ratios = [ours[label] / theirs[label] for label in ours if theirs.get(label)]
    else:
        ours, theirs = metrics.spread(judged.features), metrics.spread(real.features)
        ratios = [ours / theirs] if theirs else []
    return {"diversity": Estimate(float(np.mean(ratios)))} if ratios else {}


def share(flags: np.ndarray) -> Estimate:
    """Returns the share of flags that are true, with its standard error."""
    mean = float(flags.mean())
    return Estimate(mean, float(np.sqrt(mean * (1 - mean) / len(flags))), "standard error over images")
