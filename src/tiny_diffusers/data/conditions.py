"""
Conditions of images: numbers and labels, from the columns of a dataset to one float for each image and name.

A column of numbers, of 0 and 1 or of bools is a condition of its own name. A column of lists makes several: of names or
ids one for each label, 1 where an image has it and 0 elsewhere; of 0 and 1, or of floats, one for each position.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import UserError


_MAX_CONDITIONS = 4096
_MAX_ROUNDING = 1e-3  # by float32, of a standard deviation
_BOOLS = {"true": 1.0, "false": 0.0}  # as pandas writes them to a .csv


def as_columns(condition_columns: str | Sequence[str] | None) -> tuple[str, ...]:
    """
    Converts `"smiling,hat"` or a sequence of names to a tuple of names.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If a name is empty or given twice.
    """
    columns = condition_columns.split(",") if isinstance(condition_columns, str) else condition_columns or ()
    columns = tuple(column.strip() for column in columns)
    if not all(columns) or len(set(columns)) < len(columns):
        raise UserError(f"condition_columns '{','.join(columns)}': give each column once, such as age,smiling.")
    return columns


def parse_conditions(
    columns: Mapping[str, Sequence[Any]], name: str, labels: Mapping[str, Sequence[str] | None] | None = None
) -> tuple[np.ndarray, list[str]]:
    """
    Converts columns to conditions.

    Args:
        columns (`Mapping[str, Sequence]`): column -> the value of each image, None where it is missing.
        name (`str`): Name of the dataset in messages.
        labels (`Mapping`, *optional*): column of lists -> all its labels, which the images may lack;
            by default those that they have.

    Returns:
        `tuple[np.ndarray, list[str]]`: float32 values (N, D), NaN where they are missing, and the D names.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If a column holds text, nothing, infinite numbers or numbers that
            float32 rounds by much, or if two conditions have one name.
    """
    conditions: dict[str, np.ndarray] = {}
    for column, values in columns.items():
        for each, numbers in _parse_column(values, column, name, (labels or {}).get(column)).items():
            if each in conditions:
                raise UserError(f"condition_columns of '{name}' have two conditions named '{each}': rename one.")
            conditions[each] = numbers
    if len(conditions) > _MAX_CONDITIONS:
        raise UserError(
            f"condition_columns of '{name}' make {len(conditions):,} conditions: at most {_MAX_CONDITIONS:,} are possible."
        )
    with np.errstate(over="ignore"):
        rounded = {each: numbers.astype(np.float32) for each, numbers in conditions.items()}
    for each, numbers in conditions.items():
        rounding, deviation = np.nanmax(np.abs(rounded[each] - numbers)), np.nanstd(numbers)
        if math.isinf(rounding) or (deviation > 0 and rounding > _MAX_ROUNDING * deviation):
            raise UserError(
                f"condition '{each}' of '{name}' has numbers that float32 rounds by more than a thousandth of their standard "
                f"deviation, such as {numbers[np.nanargmax(np.abs(numbers))]:.17g}: subtract a constant, or scale them."
            )
    return np.stack(list(rounded.values()), axis=1), list(conditions)


def _parse_column(
    values: Sequence[Any], column: str, name: str, labels: Sequence[str] | None
) -> dict[str, np.ndarray]:
    """Returns the conditions of a column by name, float64 (N,) each."""
    known = [value for value in values if value is not None]
    if not known:
        raise UserError(f"condition column '{column}' of '{name}' has no values: leave it out.")
    if all(isinstance(value, str) and value.lower() in _BOOLS for value in known):
        values = [None if value is None else _BOOLS[value.lower()] for value in values]
    elif any(isinstance(value, str) for value in known):
        example = next(value for value in known if isinstance(value, str))
        raise UserError(
            f"condition column '{column}' of '{name}' holds text ('{example[:40]}'): a condition is a number, 0 or 1, or a "
            "list of labels. Give text of few values as label_column."
        )
    if any(isinstance(value, (list, tuple, np.ndarray)) for value in known):
        return _parse_lists(values, column, name, labels)
    return {column: _to_numbers(values, column, name)}


def _parse_lists(values: Sequence[Any], column: str, name: str, labels: Sequence[str] | None) -> dict[str, np.ndarray]:
    lists = [None if value is None else list(value) for value in values]
    known = [each for each in lists if each is not None]
    items = [item for each in known for item in each]
    of_numbers = all(isinstance(item, (bool, int, float, np.number, type(None))) for item in items)
    are_vectors = len({len(each) for each in known}) == 1 and of_numbers
    if items and are_vectors and (any(isinstance(item, float) for item in items) or set(items) <= {0, 1}):
        width = len(known[0])
        return {
            f"{column}_{i}": _to_numbers([None if each is None else each[i] for each in lists], column, name)
            for i in range(width)
        }
    if not (items or labels) or not all(isinstance(item, (str, int)) for item in items):
        raise UserError(
            f"condition column '{column}' of '{name}' holds lists of neither labels nor numbers: give names, ids, or as many "
            "numbers for each image."
        )
    conditions = {}
    for label in labels or sorted(set(items), key=lambda item: (isinstance(item, str), item)):
        has_label = [math.nan if each is None else float(label in each) for each in lists]
        conditions[label if isinstance(label, str) else f"{column}_{label}"] = np.array(has_label)
    return conditions


def _to_numbers(values: Iterable[Any], column: str, name: str) -> np.ndarray:
    try:
        numbers = np.array([math.nan if value is None else float(value) for value in values])
    except (TypeError, ValueError) as error:
        raise UserError(f"condition column '{column}' of '{name}' holds values that are no numbers.") from error
    if np.isinf(numbers).any():
        raise UserError(f"condition column '{column}' of '{name}' holds infinite numbers: repair or remove them.")
    return numbers
