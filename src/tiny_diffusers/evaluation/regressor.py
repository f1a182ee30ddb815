"""
A small regressor of a dataset's conditions, trained on real images in about a minute: it reads off a generated image the
numbers and labels that it was asked to have.

    regressor = load_regressor(training, held_out)       # ImageData with conditions
    regressor.predict(images)                            # uint8 (N, C, H, W) -> values (N, D) in the data's units
    compare(values, wanted, are_labels=[False, True])    # metrics of each condition
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..data import ImageData, held_out
from ..errors import UserError
from ..pipelines.pipeline_tiny_conditions import ConditionStatistics
from .classifier import HELD_OUT, PREDICTED, SEED, SmallNetwork, describe_training, load_or_train, train_network
from .measurement import share
from .metrics import Estimate


class SmallRegressor(SmallNetwork):
    """
    The blocks of [`SmallNetwork`] and a linear layer over all positions, as conditions may be positions.

    Args:
        image_shape (`tuple[int, int, int]`): (C, H, W) of the images.
        num_conditions (`int`): Number D of conditions.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_conditions: int):
        super().__init__(image_shape[0])
        with torch.no_grad():
            features = self.eval().features(torch.zeros(1, *image_shape, dtype=torch.uint8))
        self.head = nn.Linear(features.shape[1], num_conditions)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the last block: (B, 128 h w)."""
        return self.layers(images)[-1].flatten(1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns standardized values (B, D) of uint8 images (B, C, H, W)."""
        return self.head(self.features(images))


@dataclass
class Regressor:
    """
    A trained regressor, on the CPU.

    Args:
        network ([`SmallRegressor`]): The network, which gives standardized values.
        statistics ([`ConditionStatistics`]): Names and standardization of the conditions.
        are_labels (`list[bool]`): Whether each condition is a label of 0 or 1, and not a number.
        training, held_out ([`~tiny_diffusers.data.ImageData`]): The images that it was trained and tested on.
        description (`dict`): Everything that decides it.
    """

    network: SmallRegressor
    statistics: ConditionStatistics
    are_labels: list[bool]
    training: ImageData
    held_out: ImageData
    description: dict[str, Any]

    @torch.inference_mode()
    def predict(self, images: torch.Tensor) -> torch.Tensor:
        """Predicts the conditions (N, D) of uint8 images (N, C, H, W), in the units of the data."""
        return self.statistics.restore(torch.cat([self.network(batch) for batch in images.split(PREDICTED)]))

    def compare(self, data: ImageData) -> dict[str, dict[str, Estimate]]:
        """Compares the conditions of images with what it reads off them: condition -> metric -> value."""
        data = with_conditions(data, self.statistics.names)
        figures = compare(self.predict(data.images).numpy(), data.conditions.numpy(), self.are_labels)
        return dict(zip(self.statistics.names, figures, strict=True))

    def summary(self) -> str:
        """Returns in one sentence how it was trained and how well it reads held-out images."""
        words = []
        for name, figures in self.compare(self.held_out).items():
            if "condition_agreement" in figures:
                words.append(f"{name} right for {figures['condition_agreement'].value:.1%}")
            else:
                correlation = figures.get("condition_correlation")
                beside = "" if correlation is None else f" (correlation {correlation.value:.3f})"
                words.append(f"{name} with a mean error of {figures['condition_error'].value:.3g}{beside}")
        return (
            f"The regressor of the conditions was trained on {len(self.training):,} images of {self.training.name} "
            f"({self.training.split}). Of {len(self.held_out):,} held-out real images ({self.held_out.split}) it finds "
            f"{', '.join(words)}."
        )


def why_impossible(reference: ImageData, has_conditions: bool) -> str | None:
    """Returns why the agreement with conditions cannot be measured, or None; `has_conditions` is of the images."""
    if not has_conditions:
        return "the images are drawn by no conditions"
    if reference.conditions is None:
        return "the reference images have no conditions: name their columns by --condition_columns"
    if (reference.conditions == reference.conditions[0]).all():
        return "all reference images have the same conditions"
    return None


def with_conditions(data: ImageData, names: Sequence[str]) -> ImageData:
    """
    Returns images with the named conditions, in this order.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If they lack one.
    """
    own = data.condition_names or []
    missing = [name for name in names if name not in own]
    if missing:
        raise UserError(
            f"The model draws by the conditions {', '.join(names)}, and '{data.name}' ({data.split}) has no "
            f"{', '.join(missing)}: name the columns that it was trained on by --condition_columns, and give labels that no "
            "image has as a ClassLabel."
        )
    columns = [own.index(name) for name in names]
    return replace(data, conditions=data.conditions[:, columns], condition_names=list(names))


def split_real_images(reference: ImageData, others: ImageData | None) -> tuple[ImageData, ImageData]:
    """
    Returns the images to train a regressor on and those to test it on: other real images and the reference, or else two
    parts of the reference. Conditions of which the images to train on have one value only are left out.

    Args:
        reference ([`~tiny_diffusers.data.ImageData`]): The reference, with conditions.
        others ([`~tiny_diffusers.data.ImageData`], *optional*): Real images that are not the reference's.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If no condition is left.
    """
    if others is not None and others.conditions is not None:
        parts = with_conditions(others, reference.condition_names), reference
    else:
        parts = tuple(reference.take(rows) for rows in held_out(len(reference), HELD_OUT, SEED))
    varies = (parts[0].conditions != parts[0].conditions[0]).any(dim=0).tolist()
    names = [name for name, each in zip(reference.condition_names, varies, strict=True) if each]
    if not names:
        raise UserError(
            "Leave out the metric condition_agreement: the real images to train a regressor on have the same conditions."
        )
    return tuple(with_conditions(part, names) for part in parts)


def load_regressor(training: ImageData, held_out: ImageData, labels: Collection[str] | None = None) -> Regressor:
    """
    Loads the regressor of a dataset's conditions from the package's cache, or trains it and keeps it there, as
    [`~tiny_diffusers.evaluation.classifier.load_classifier`] does: on the CPU in float32 from a fixed seed.

    Args:
        training ([`~tiny_diffusers.data.ImageData`]): Images with conditions, to train on.
        held_out ([`~tiny_diffusers.data.ImageData`]): Other images with the same conditions, to test it on.
        labels (collection of `str`, *optional*): The conditions that are labels and not numbers; by default those of
            which the training images have 0 and 1 alone.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If a condition has one value only.
    """
    try:
        statistics = ConditionStatistics.measure(training.conditions, training.condition_names)
    except ValueError as error:
        raise UserError(f"The regressor of the conditions cannot be trained: {error}") from error
    network = build_regressor(tuple(training.images.shape[1:]), len(statistics.names))
    head, loss = "linear over all positions", "squared error of standardized values"
    description = describe_training(head, loss, training, held_out) | {"conditions": training.condition_names}

    def train() -> dict[str, Any]:
        wanted = statistics.standardize(training.conditions)
        train_network(network, training.images, lambda values, rows: F.mse_loss(values, wanted[rows]))
        return {}

    load_or_train(network, "regressor", description, train)
    are_labels = statistics.are_labels if labels is None else [name in labels for name in statistics.names]
    return Regressor(network, statistics, are_labels, training, held_out, description)


def build_regressor(image_shape: tuple[int, int, int], num_conditions: int, seed: int = SEED) -> SmallRegressor:
    """Builds a network with weights from a seed; torch's global generator stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SmallRegressor(image_shape, num_conditions).to(memory_format=torch.channels_last)


def compare(values: np.ndarray, wanted: np.ndarray, are_labels: Sequence[bool]) -> list[dict[str, Estimate]]:
    """
    Compares predicted values (N, D) with those that were asked for, (N, D), condition by condition: of a label of 0 or 1
    the share that agrees; of a number the correlation, unless one of both is constant, and the mean absolute error.
    """
    figures = []
    for value, want, is_label in zip(
        values.T.astype(np.float64), wanted.T.astype(np.float64), are_labels, strict=True
    ):
        if is_label:
            figures.append({"condition_agreement": share((value > 0.5) == (want > 0.5))})
            continue
        errors = np.abs(value - want)
        standard_error = float(errors.std() / np.sqrt(len(errors)))
        found = {"condition_error": Estimate(float(errors.mean()), standard_error, "standard error over images")}
        if value.std() > 0 and want.std() > 0:
            found["condition_correlation"] = Estimate(float(np.corrcoef(value, want)[0, 1]))
        figures.append(found)
    return figures


def summarize(figures: dict[str, dict[str, Estimate]]) -> dict[str, Estimate]:
    """Returns the mean correlation over the numbers, and the mean agreement over the labels."""
    means = {}
    for metric in ("condition_correlation", "condition_agreement"):
        values = [found[metric].value for found in figures.values() if metric in found]
        if values:
            means[metric] = Estimate(float(np.mean(values)))
    return means
