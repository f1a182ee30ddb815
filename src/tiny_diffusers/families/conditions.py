"""Conditions of any family, numbers and labels by name: their flags, and how they are standardized."""

import dataclasses
import logging
from dataclasses import dataclass

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
    checkpoint to start from keeps its means and deviations. Returns them with the data, without labels that no training
    image, or each, has.

    Raises:
        UserError: If a condition has one value only, or the checkpoint has others.
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
    values = data.conditions[split_indices(settings, data)[0]]
    is_constant_label = (values == values[0]).all(dim=0) & ((values[0] == 0) | (values[0] == 1))
    columns = (~is_constant_label).nonzero().flatten().tolist()
    if columns and len(columns) < len(data.condition_names):
        constant = [name for name, each in zip(data.condition_names, is_constant_label.tolist(), strict=True) if each]
        logger.warning(f"left out, as all training images or none have these labels: {abbreviate(constant)}")
        names = [data.condition_names[column] for column in columns]
        data = dataclasses.replace(data, conditions=data.conditions[:, columns], condition_names=names)
        values = values[:, columns]
    with refusals("--condition_columns: "):
        statistics = ConditionStatistics.measure(values, data.condition_names)
    earlier = getattr(load_pretrained(settings, TinyPipeline), "_condition_statistics", None)
    if earlier is None:
        return data, statistics
    if earlier.names != statistics.names:
        raise UserError(
            f"--pretrained_model_name_or_path: {settings.pretrained_model_name_or_path} has the conditions "
            f"{', '.join(earlier.names)}, and --condition_columns gives {', '.join(statistics.names)}: give the same ones in "
            "the same order."
        )
    return data, dataclasses.replace(statistics, means=earlier.means, deviations=earlier.deviations)
