"""Conditions of any family, numbers and labels by name: their flags, and how they are standardized."""

import dataclasses
import logging
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..data import ImageData
from ..data.folders import abbreviate
from ..errors import UserError, refusals
from ..flags import flag
from ..pipelines.pipeline_tiny import TinyPipeline
from ..pipelines.pipeline_tiny_conditions import ConditionStatistics
from ..training.arguments import TrainingArguments
from ..training.family import load_pretrained
from ..training.settings import split_indices


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConditionArguments(TrainingArguments):
    """The columns of the conditions."""

    TITLE: ClassVar[str] = "conditions"

    condition_columns: str | None = flag(
        None,
        "Columns of numbers, of 0 and 1, or of lists of labels that the network is given by name, beside a class or "
        "without one: 'age,smiling'.",
    )
    drop_missing: bool = flag(
        False, "Leave out images without a value in --condition_columns, instead of refusing them."
    )

    def __post_init__(self):
        super().__post_init__()
        if self.drop_missing and self.condition_columns is None:
            raise UserError("--drop_missing is for images without a value in --condition_columns: leave it out.")


def measure_conditions(settings: ConditionArguments, data: ImageData) -> tuple[ImageData, ConditionStatistics | None]:
    """
    Measures the conditions of the training images, those of the held-out ones left out; None without conditions. A
    checkpoint to start from keeps its means and deviations, and its ranges are widened. Returns them with the data, without
    labels that no training image, or each, has and that no checkpoint knows.

    Raises:
        UserError: If a condition has one value only and is new, or if the checkpoint has others.
    """
    if data.conditions is None:
        return data, None
    geometric = ("random_flip", "random_crop_padding", "augment_prob")  # the last is of diffusion alone
    moving = [name for name in geometric if getattr(settings, name, 0)]
    if moving:
        logger.warning(
            f"--{' --'.join(moving)} with --condition_columns: the conditions stay as they are, so leave it out if one "
            "depends on where things are or which way they point."
        )
    earlier = getattr(load_pretrained(settings, TinyPipeline), "_condition_statistics", None)
    rows = split_indices(settings, data)[0]
    data = _without_constant_labels(data, rows, [] if earlier is None else earlier.names)
    values = data.conditions[rows]
    if earlier is None:
        with refusals("--condition_columns: "):
            return data, ConditionStatistics.measure(values, data.condition_names)
    source = settings.pretrained_model_name_or_path
    if earlier.names != data.condition_names:
        raise UserError(
            f"--pretrained_model_name_or_path: {source} has the conditions {', '.join(earlier.names)}, and "
            f"--condition_columns gives {', '.join(data.condition_names)}: give the same ones in the same order, and labels that "
            "no image has as a ClassLabel."
        )
    with refusals(f"--condition_columns: of {source}, "):
        return data, earlier.widen(values)


def _without_constant_labels(data: ImageData, rows: torch.Tensor, known: list[str]) -> ImageData:
    """Returns the data without the labels that all images in `rows` have, or none, those of known names aside."""
    values = data.conditions[rows]
    is_constant = (values == values[0]).all(dim=0) & ((values[0] == 0) | (values[0] == 1))
    constant = [
        name
        for name, each in zip(data.condition_names, is_constant.tolist(), strict=True)
        if each and name not in known
    ]
    names = [name for name in data.condition_names if name not in constant]
    if not constant or not names:
        return data
    logger.warning(f"left out, as all training images or none have these labels: {abbreviate(constant)}")
    columns = [data.condition_names.index(name) for name in names]
    return dataclasses.replace(data, conditions=data.conditions[:, columns], condition_names=names)
