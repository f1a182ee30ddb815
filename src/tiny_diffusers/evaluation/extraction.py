"""Features of sets of images, extracted once by all processes together and kept in the package's cache."""

from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import torch
from accelerate import PartialState

from .. import __version__
from ..data import ImageData, cache_root
from . import images as image_sets
from .features import Extractor, perceptual_distance
from .measurement import FeatureSet, ImageSet


CACHE_FORMAT = 3  # raised when the same key would get other values
FEATURE_BATCH = 64


class FeatureFiles:
    """
    Features on disk. A file's name is a hash of everything that its features depend on.

    Args:
        extractor ([`Extractor`]): The extractor.
        shape (`tuple[int, int, int]`): (C, H, W) of the images.
        state (`PartialState`): The processes, which share the batches.
    """

    def __init__(self, extractor: Extractor, shape: tuple[int, int, int], state: PartialState):
        self.extractor, self.state = extractor, state
        self.dim = extractor(torch.zeros(1, *shape, dtype=torch.uint8)).shape[1]
        self.cache = cache_root() / "features"

    def of_images(self, data: ImageData, desc: str, limit: int | None = None) -> ImageSet:
        """Returns the features of images in the order of their hashes; of the first `limit` if given."""
        images = data.images.numpy()
        order = image_sets.order_of(images)[:limit]
        labels = None if data.labels is None else data.labels.numpy()[order]
        fingerprint = image_sets.fingerprint(images)
        entry = self._entry(fingerprint, len(order))
        features = self._extract(entry, len(order), lambda start, stop: images[order[start:stop]], desc)
        return ImageSet(features, labels, data, order, fingerprint)

    def of_baseline(self, kind: str, base: ImageSet, count: int) -> FeatureSet:
        """Returns the features of `count` images of a baseline that is made from real images."""
        labels = None
        if kind == "blurred":  # real images, of which there may be fewer
            count = min(count, len(base))
            labels = None if base.labels is None else base.labels[:count]
        entry = self._entry(base.fingerprint, kind, image_sets.BLUR_SIGMA, count)
        draw = image_sets.BASELINES[kind](base.data.images.numpy(), base.order)
        return FeatureSet(self._extract(entry, count, draw, kind), labels)

    def of_pairs(self, images: ImageSet, pairs: np.ndarray, desc: str) -> np.ndarray:
        """Returns the perceptual distance (P,) of each pair of rows of a set, (P, 2)."""
        pixels, rows = images.data.images.numpy(), images.order[pairs]

        def compute(start: int, stop: int) -> np.ndarray:
            first, second = (torch.from_numpy(pixels[rows[start:stop, side]]) for side in (0, 1))
            return perceptual_distance(self.extractor, first, second).numpy()

        entry = self._entry("pairs", images.fingerprint, image_sets.fingerprint(rows))
        return self._fill(entry, (len(pairs),), compute, f"Perceptual distance: {desc}")

    def _entry(self, *key: object) -> Path:
        described = [self.extractor.name, self.extractor.preprocessing, self.state.device.type, libraries()]
        return self.cache / image_sets.digest(CACHE_FORMAT, described, FEATURE_BATCH, *key)

    def _extract(self, entry: Path, rows: int, read: Callable[[int, int], np.ndarray], desc: str) -> np.ndarray:
        """Extracts the features (rows, D) of the images that `read(start, stop)` returns."""

        def compute(start: int, stop: int) -> np.ndarray:
            return self.extractor(torch.from_numpy(read(start, stop))).numpy()

        return self._fill(entry, (rows, self.dim), compute, f"Features: {desc}")

    def _fill(
        self, entry: Path, shape: tuple[int, ...], compute: Callable[[int, int], np.ndarray], desc: str
    ) -> np.ndarray:
        return image_sets.fill(
            entry, shape, np.float32, compute, batch_size=FEATURE_BATCH, state=self.state, desc=desc
        )


def libraries() -> dict[str, str]:
    """Returns the versions of what draws images and computes features."""
    return {"tiny-diffusers": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
