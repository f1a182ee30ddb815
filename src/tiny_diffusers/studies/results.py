"""What the rows of a `study.json` say together: means over seeds, their errors, and which cell is best if one is."""

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ..evaluation.report import FIGURES


_CONFIDENCE = 0.95  # that the best cell is better than each other


class Sampler(NamedTuple):
    """How images were drawn: the name of a scheduler, a number of steps and a guidance scale, None for the run's own."""

    scheduler: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None

    def __str__(self) -> str:
        steps = None if self.num_inference_steps is None else f"{self.num_inference_steps} steps"
        guidance = None if self.guidance_scale is None else f"guidance {self.guidance_scale:g}"
        return ", ".join(word for word in (self.scheduler, steps, guidance) if word) or "samples"

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> "Sampler":
        """Returns the sampler of an entry of `measured`."""
        return cls(*(entry.get(name) for name in cls._fields))


class Value(NamedTuple):
    """
    The mean over the seeds. Its error is the standard error over them, or that of the one report. Of bits/dim, `given` is
    what the model is told of each image, and `kind` says whether they are exact or a bound.
    """

    value: float
    error: float | None
    seeds: int
    given: tuple[str, ...] = ()
    kind: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {"value": self.value, "error": self.error}


Rows = list[dict[str, Any]]  # of one cell, a row for each seed


def group(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Rows]]:
    """
    Groups rows by the images that they were measured against, among which metrics are compared: images -> cell -> rows. A
    run that was not measured is beside those whose images have the same name.
    """
    rows = list(rows)
    images = {row["data"]: tuple(row["images"]) for row in reversed(rows) if "images" in row}
    names: dict[tuple, str] = {}
    groups: dict[str, dict[str, Rows]] = {}
    for row in rows:
        key = tuple(row.get("images") or images.get(row["data"], (row["data"],)))
        if key not in names:
            others = sum(name.partition(" (other images")[0] == row["data"] for name in names.values())
            names[key] = f"{row['data']} (other images {others})" if others else row["data"]
        groups.setdefault(names[key], {}).setdefault(row["cell"], []).append(row)
    return groups


def list_scripts(asked: Mapping[str, Any], rows: Iterable[dict[str, Any]]) -> list[str]:
    """Lists the scripts that trained the rows. The losses of several have nothing in common."""
    return list(dict.fromkeys(str(asked["grid"][row["cell"]].get("script", asked["script"])) for row in rows))


def list_samplers(rows: Iterable[dict[str, Any]]) -> list[Sampler]:
    """Lists the samplers that anything was measured with, in the order in which they were asked for."""
    entries = itertools.chain.from_iterable(row.get("measured", []) for row in rows)
    return list(dict.fromkeys(map(Sampler.of, entries)))


def value_of(rows: Rows, sampler: Sampler, figure: str) -> Value | None:
    """Returns a figure of one cell; None if no seed has it."""
    found = [
        entry["figures"][figure]
        for row in rows
        for entry in row.get("measured", [])
        if Sampler.of(entry) == sampler and figure in entry.get("figures", {})
    ]
    value = _combine([entry["value"] for entry in found], [_standard_error(entry) for entry in found])
    if value is None or figure != "bits_per_dim":
        return value
    given = (row["likelihood_given"] for row in rows if row.get("likelihood_given"))
    kinds = (row["likelihood_kind"] for row in rows if row.get("likelihood_kind"))
    return value._replace(given=tuple(next(given, [])), kind=next(kinds, ""))


def _standard_error(figure: Mapping[str, Any]) -> float | None:
    """Returns the error of a figure; None for a standard deviation, which the Inception Score has."""
    return None if str(figure["error_kind"]).startswith("standard deviation") else figure["error"]


def mean_of(rows: Rows, name: str) -> Value | None:
    """Returns the mean over the seeds of a fact: `parameters`, `steps` or `seconds`."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return _combine(values, [None] * len(values))


def lowest_loss(rows: Rows) -> Value | None:
    """Returns the mean over the seeds of the lowest validation loss."""
    values = [min(loss for _, loss in row["val_loss"]) for row in rows if row.get("val_loss")]
    return _combine(values, [None] * len(values))


def floor_of(cells: Mapping[str, Rows], figure: str, baseline: str = "real") -> dict[str, Any] | None:
    """Returns a figure of a baseline, which is the same for all cells of a group; None if it was not measured."""
    rows = itertools.chain.from_iterable(cells.values())
    found = (row.get("baselines", {}).get(baseline, {}).get(figure) for row in rows)
    return next((entry for entry in found if entry is not None), None)


def find_winner(values: Mapping[str, Value | None], figure: str) -> str | None:
    """
    Returns the cell that is better than each other one, by more than chance explains; None if there is none.

    The difference to each other cell must exceed t * sqrt(e_1^2 + e_2^2), with their standard errors e and t the 97.5%
    quantile of Student's distribution (of the Gaussian, for errors over images). Errors of both kinds are not compared.
    """
    from scipy.stats import norm, t

    lower = FIGURES[figure][2]
    known = {cell: value for cell, value in values.items() if value is not None}
    if lower is None or len(known) < 2 or why_not_compared(known.values()) is not None:
        return None
    best = (min if lower else max)(known, key=lambda cell: known[cell].value)
    share = (1 + _CONFIDENCE) / 2
    for cell, value in known.items():
        seeds = known[best].seeds + value.seeds - 2
        quantile = t.ppf(share, seeds) if seeds else norm.ppf(share)
        error = math.hypot(known[best].error, value.error)
        if cell != best and abs(known[best].value - value.value) <= quantile * error:
            return None
    return best


def why_not_compared(values: Iterable[Value]) -> str | None:
    """Returns the reason why no value can be called the best, or None."""
    values = list(values)
    if any(value.error is None for value in values):
        return "not all values have an error"
    if len({value.seeds > 1 for value in values}) > 1:
        return "some values are of one seed, and others of several"
    kinds = sorted({value.kind for value in values if value.kind})
    if len(kinds) > 1:
        return f"some bits/dim are {kinds[0]}, and others {kinds[1]}"
    given = {value.given for value in values}
    if len(given) > 1:
        return f"some bits/dim are given {', '.join(max(given, key=len))}, and others are not"
    return None


def _combine(values: list[float], errors: list[float | None]) -> Value | None:
    if not values:
        return None
    mean, count = sum(values) / len(values), len(values)
    if count == 1:
        return Value(mean, errors[0], 1)
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    return Value(mean, math.sqrt(variance / count), count)
