"""Mean perceptual distance of images from one another: how different they look, beside real images."""

import numpy as np

from .extraction import FeatureFiles
from .features import Extractor
from .measurement import ImageSet, OtherFigures
from .metrics import Estimate


MIN_PAIRS, MAX_PAIRS = 2, 1000  # that the mean is taken over; one has no standard error


def why_impossible(extractor: Extractor) -> str | None:
    """Returns why an extractor gives no perceptual distance, or None."""
    return None if extractor.layers is not None else f"'{extractor.name}' has no layers; use efficientnet-lite0"


def measure_distances(files: FeatureFiles, generated: ImageSet, real: ImageSet) -> OtherFigures:
    """
    Measures the mean distance of pairs of generated images and of real ones; of the same class, if both have classes.

    Args:
        files ([`FeatureFiles`]): Computes and keeps the distances.
        generated, real ([`ImageSet`]): The images, and the reference.
    """
    within_classes = have_classes(generated, real)
    found = []
    for images, name in ((generated, "the images"), (real, "the reference")):
        pairs = choose_pairs(images, within_classes)
        few = len(pairs) < MIN_PAIRS
        found.append({} if few else {"feature_distance": _mean(files.of_pairs(images, pairs, name), within_classes)})
    return OtherFigures(found[0], {"real": found[1]})


def find_gaps(generated: ImageSet, real: ImageSet) -> list[str]:
    """Returns a warning for each set that has too few pairs for [`measure_distances`]."""
    within_classes = have_classes(generated, real)
    found = {
        name: len(choose_pairs(images, within_classes))
        for images, name in ((generated, "images"), (real, "reference images"))
    }
    return [
        f"The perceptual distance of the {name} was not measured: it needs {MIN_PAIRS} pairs of images"
        f"{' of one class' if within_classes else ''}, and there {'is' if count == 1 else 'are'} {count}."
        for name, count in found.items()
        if count < MIN_PAIRS
    ]


def have_classes(generated: ImageSet, real: ImageSet) -> bool:
    """Returns whether both sets have classes: their pairs are then of one class."""
    return generated.labels is not None and real.labels is not None


def choose_pairs(images: ImageSet, within_classes: bool) -> np.ndarray:
    """
    Chooses at most `MAX_PAIRS` pairs of images, none of them in two pairs.

    Returns:
        `np.ndarray` of shape `(P, 2)`: Rows of the set; of the same class if `within_classes`.
    """
    rows = np.arange(len(images))
    classes = [rows[images.labels == label] for label in np.unique(images.labels)] if within_classes else [rows]
    pairs = np.concatenate([rows[: len(rows) // 2 * 2].reshape(-1, 2) for rows in classes])
    return pairs[np.argsort(pairs[:, 0])][:MAX_PAIRS]  # in the order of the hashes: each class has its share


def _mean(distances: np.ndarray, within_classes: bool) -> Estimate:
    kind = f"standard error over {len(distances):,} pairs{' within classes' if within_classes else ''}"
    return Estimate(float(distances.mean()), float(distances.std(ddof=1) / np.sqrt(len(distances))), kind)
