"""`ConditionsMixin`: conditions by name (numbers, and labels of 0 or 1), in the units of the data."""

import difflib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch


Values = float | Sequence[float] | np.ndarray | torch.Tensor
Conditions = Mapping[str, Values] | Sequence[Mapping[str, float]] | np.ndarray | torch.Tensor

_FAR = 0.1  # share of the range of training values that a value may lie outside of it without a warning
_FIELDS = ("names", "means", "deviations", "lows", "highs")


class FarValueWarning(UserWarning):
    """A condition is far outside the range of the training images."""


def spell_numbers(values: Sequence[float]) -> list[str]:
    """Returns each number as text, with six digits, or as many as tell different numbers apart."""
    texts = ([f"{value:.{digits}g}" for value in values] for digits in range(6, 18))
    return next(each for each in texts if len(set(each)) == len(set(values)))


@dataclass(frozen=True)
class ConditionStatistics:
    """
    Names of the conditions of the training images, with the statistics that standardize their values.

    Args:
        names (`list[str]`): Name of each of the D conditions.
        means, deviations (`list[float]`): A value x is given to the network as (x - mean) / deviation. A label of 0 or 1
            has a mean and a deviation of 1/2, and is given as -1 or 1.
        lows, highs (`list[float]`): The smallest and the largest value of the training images.

    Raises:
        ValueError: If these are not as described.
    """

    names: list[str]
    means: list[float]
    deviations: list[float]
    lows: list[float]
    highs: list[float]

    def __post_init__(self):
        lists = [getattr(self, name) for name in _FIELDS]
        if not all(isinstance(each, (list, tuple)) and 0 < len(each) == len(self.names) for each in lists):
            raise ValueError(f"`condition_statistics` must hold lists of one length: {', '.join(_FIELDS)}.")
        if not all(isinstance(name, str) and name for name in self.names) or len(set(self.names)) < len(self.names):
            raise ValueError(
                f"`condition_statistics` must hold a name of its own for each condition, got {self.names}."
            )
        for field, values in zip(_FIELDS[1:], lists[1:], strict=True):
            for name, value in zip(self.names, values, strict=True):
                is_number = isinstance(value, (int, float)) and math.isfinite(value)
                if not is_number or (field == "deviations" and value <= 0):
                    raise ValueError(f"`condition_statistics` has a wrong value in {field} for '{name}': {value!r}.")

    @classmethod
    def from_config(cls, config: Mapping[str, list]) -> "ConditionStatistics":
        """
        Reads the fields from the config of a pipeline.

        Raises:
            ValueError: If there are other fields, or they are not as described.
        """
        if not isinstance(config, Mapping) or set(config) != set(_FIELDS):
            given = sorted(config) if isinstance(config, Mapping) else repr(config)
            raise ValueError(f"`condition_statistics` must be a dict of {', '.join(_FIELDS)}, got {given}.")
        return cls(**config)

    @classmethod
    def measure(cls, values: torch.Tensor, names: Sequence[str]) -> "ConditionStatistics":
        """
        Measures the values (N, D) of the training images.

        Raises:
            ValueError: If a condition has the same value for all of them.
        """
        values = values.double()
        lows, highs = values.min(dim=0).values, values.max(dim=0).values
        for name, low, high in zip(names, lows.tolist(), highs.tolist(), strict=True):
            if low == high:
                raise ValueError(f"the condition '{name}' is {low:g} for all training images: leave it out.")
        is_label = ((values == 0) | (values == 1)).all(dim=0)
        means = values.mean(dim=0).masked_fill(is_label, 0.5)
        deviations = values.std(dim=0, correction=0).masked_fill(is_label, 0.5)
        return cls(list(names), *(each.tolist() for each in (means, deviations, lows, highs)))

    def widen(self, values: torch.Tensor) -> "ConditionStatistics":
        """
        Returns these statistics with ranges that hold the values (N, D) of further training images as well.

        Raises:
            ValueError: If a label has another value than 0 or 1.
        """
        values = values.double()
        for name, is_label, column in zip(self.names, self.are_labels, values.T, strict=True):
            others = column[(column != 0) & (column != 1)]
            if is_label and len(others):
                raise ValueError(
                    f"the condition '{name}' is a label of 0 or 1, and there are images of {others[0]:g}."
                )
        lows, highs = (torch.tensor(each, dtype=torch.float64) for each in (self.lows, self.highs))
        lows, highs = lows.minimum(values.min(dim=0).values), highs.maximum(values.max(dim=0).values)
        return replace(self, lows=lows.tolist(), highs=highs.tolist())

    def to_config(self) -> dict[str, list]:
        """Returns the fields as the config of a pipeline holds them."""
        return {name: list(getattr(self, name)) for name in _FIELDS}

    @property
    def are_labels(self) -> list[bool]:
        """Returns, for each condition, whether it is a label of 0 or 1. No other values have this range and deviation."""
        columns = zip(self.means, self.deviations, self.lows, self.highs, strict=True)
        return [column == (0.5, 0.5, 0, 1) for column in columns]

    @property
    def ranges(self) -> dict[str, str]:
        """Returns the values of the training images by name, such as `{"age": "20 to 60", "hat": "0 or 1"}`."""
        limits = [" to ".join(spell_numbers(each)) for each in zip(self.lows, self.highs, strict=True)]
        return {
            name: "0 or 1" if is_label else limit
            for name, is_label, limit in zip(self.names, self.are_labels, limits, strict=True)
        }

    def standardize(self, values: torch.Tensor) -> torch.Tensor:
        """Standardizes values (B, D) in the units of the data, in float32."""
        means, deviations = self._tensors(values.device)
        return (values.float() - means) / deviations

    def restore(self, standardized: torch.Tensor) -> torch.Tensor:
        """Returns standardized values (B, D) in the units of the data."""
        means, deviations = self._tensors(standardized.device)
        return standardized * deviations + means

    def _tensors(self, device: torch.device) -> list[torch.Tensor]:
        return [torch.tensor(each, dtype=torch.float32, device=device) for each in (self.means, self.deviations)]

    def examples(self) -> tuple[list[dict[str, float]], list[str]]:
        """
        Returns conditions that show what the first one does, with a text for each: its lowest, middle and highest value, or
        both of a label. The other numbers are at their mean, and the other labels are 0.
        """
        is_label, low, high = self.are_labels[0], self.lows[0], self.highs[0]
        others = [0.0 if label else mean for label, mean in zip(self.are_labels, self.means, strict=True)]
        values = [0.0, 1.0] if is_label else [low, (low + high) / 2, high]
        rows = [dict(zip(self.names, [value, *others[1:]], strict=True)) for value in values]
        return rows, [f"{self.names[0]} {text}" for text in spell_numbers(values)]

    def parse(self, conditions: Conditions) -> torch.Tensor:
        """
        Converts conditions in any form to values (B, D) in the units of the data, float32 on the CPU.

        Raises:
            ValueError: If a name is unknown or missing, a shape is wrong, or a value is no finite number.
        """
        if isinstance(conditions, Mapping):
            values = self._parse_columns(conditions)
        elif isinstance(conditions, Sequence) and len(conditions) and all(isinstance(c, Mapping) for c in conditions):
            values = torch.cat([self._parse_columns(row) for row in conditions])
        else:
            values = _to_tensor(conditions, ", ".join(self.names))
            values = values[None] if values.ndim == 1 else values
        if values.ndim != 2 or values.shape[1] != len(self.names) or len(values) == 0:
            raise ValueError(
                f"`conditions` must be values of {', '.join(self.names)}: a dict of them, a list of dicts, or a tensor of "
                f"shape (B, {len(self.names)}), got the shape {tuple(values.shape)}."
            )
        for name, column in zip(self.names, values.T, strict=True):
            if not torch.isfinite(column).all():
                raise ValueError(f"`conditions` must be finite, got {column[~column.isfinite()][0]} for '{name}'.")
        return values

    def _parse_columns(self, columns: Mapping[str, Values]) -> torch.Tensor:
        unknown = [name for name in columns if name not in self.names]
        if unknown:
            near = difflib.get_close_matches(str(unknown[0]), self.names, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"Unknown condition '{unknown[0]}': the conditions are {', '.join(self.names)}.{hint}")
        omitted = [name for name in self.names if name not in columns]
        if omitted:
            raise ValueError(f"`conditions` lacks {', '.join(omitted)}: the network needs {', '.join(self.names)}.")
        parsed = [_to_tensor(columns[name], name).reshape(-1) for name in self.names]
        count = max(map(len, parsed))
        for name, column in zip(self.names, parsed, strict=True):
            if len(column) not in (1, count):
                raise ValueError(
                    f"`conditions` has {len(column)} values of '{name}': give one, or {count} as of others."
                )
        return torch.stack([column.expand(count) for column in parsed], dim=1)

    def find_far_values(self, values: torch.Tensor) -> torch.Tensor:
        """Returns which of the values (B, D) are far outside the range of the training images: bool (B, D)."""
        lows, highs = (torch.tensor(each, dtype=torch.float64) for each in (self.lows, self.highs))
        margins = _FAR * (highs - lows)
        return (values < lows - margins) | (values > highs + margins)

    def warn_of_far_values(self, values: torch.Tensor, stacklevel: int):
        """Warns of values (B, D) far outside the range of the training images."""
        are_far = self.find_far_values(values)
        columns = zip(self.names, values.T, are_far.T, self.lows, self.highs, strict=True)
        for name, column, is_far, low, high in columns:
            if is_far.any():
                warnings.warn(
                    f"{name} {column[is_far][0]:g} is far outside the values of the training images, {low:g} to {high:g}.",
                    FarValueWarning,
                    stacklevel=stacklevel,
                )


def _to_tensor(values: Any, name: str) -> torch.Tensor:
    try:
        return torch.as_tensor(values, dtype=torch.float32, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        given = repr(values)
        given = given if len(given) <= 60 else f"{given[:57]}..."
        raise ValueError(f"`conditions`: {given} is no number for '{name}'.") from error


class ConditionsMixin:
    """
    Mixin with conditions by name for a [`DiffusionPipeline`] whose network may have `num_conditions`. The config's
    `condition_statistics` holds the fields of [`ConditionStatistics`].
    """

    def _register_conditions(self, condition_statistics: dict | None):
        """Checks the statistics against the network and saves them in the pipeline's config."""
        count = self._network.config.get("num_conditions")
        self._condition_statistics = None
        if condition_statistics is not None:
            self._condition_statistics = ConditionStatistics.from_config(condition_statistics)
        names = [] if condition_statistics is None else self._condition_statistics.names
        if len(names) != (count or 0):
            raise ValueError(
                f"The network takes {count or 'no'} conditions and `condition_statistics` describes {len(names)}: they must "
                "be the same."
            )
        self.register_to_config(condition_statistics=condition_statistics)

    def _encode_conditions(
        self,
        conditions: Conditions | None,
        guidance_scale: float | None = None,
        batch_size: int | None = None,
        optional: bool = False,
    ) -> torch.Tensor | None:
        """
        Converts conditions to the network's input on the device: standardized values (1 or B, D), or None for a network
        without conditions. With `batch_size` B, one row stands for all. Without conditions, which needs a guidance scale of
        0 or `optional` ones, the row is NaN.
        """
        statistics = self._condition_statistics
        if statistics is None:
            if conditions is not None:
                raise ValueError("The network has no conditions: leave out `conditions`.")
            return None
        if conditions is not None:
            values = statistics.parse(conditions)
            statistics.warn_of_far_values(values, stacklevel=5)
            encoded = statistics.standardize(values)
        elif guidance_scale == 0 or optional:
            encoded = torch.full((1, len(statistics.names)), math.nan)
        else:
            hint = "" if guidance_scale is None else ", or `guidance_scale=0` for unconditional samples"
            raise ValueError(f"The network needs `conditions`: give {', '.join(statistics.names)}{hint}.")
        encoded = encoded.to(self._execution_device)
        return encoded if batch_size is None else self._expand_conditions(encoded, batch_size)

    @staticmethod
    def _count_rows(*given: torch.Tensor | None) -> int | None:
        """Returns the number of rows of the first tensor with several, or None if there is none."""
        counts = (len(each) for each in given if each is not None)
        return next((count for count in counts if count > 1), None)

    @staticmethod
    def _expand_conditions(encoded: torch.Tensor | None, batch_size: int) -> torch.Tensor | None:
        """Repeats one row for each image of the batch."""
        if encoded is None:
            return None
        if len(encoded) not in (1, batch_size):
            raise ValueError(
                f"`conditions` must be one row, or one for each of {batch_size} images, got {len(encoded)}."
            )
        return encoded.expand(batch_size, -1)

    @staticmethod
    def _interpolate_conditions(encoded: torch.Tensor | None, share: torch.Tensor) -> torch.Tensor | None:
        """Returns the conditions on the line between two rows, for shares (N, 1): (N, D)"""
        return None if encoded is None else torch.lerp(*encoded, share.to(encoded.dtype))
