"""The pictures of a study, drawn from its `study.json` alone. Lines differ in style and marker, to be told apart in gray."""

import base64
import io
import itertools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from .. import plots
from ..evaluation.report import BASELINE_NAMES, figure_label
from ..files import replacing
from .results import Rows, Sampler, Value, floor_of, group, list_samplers, list_scripts, mean_of, value_of


if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MIN_LOG_RATIO = 3  # of the values on an axis, from which on it is logarithmic


def draw(content: dict[str, Any], folder: Path) -> dict[str, list[Path]]:
    """
    Draws the pictures that a study asks for, as far as there is something to show.

    Args:
        content (`dict`): Of `study.json`.
        folder (`Path`): The folder to draw into.

    Returns:
        `dict`: Images of a group -> its pictures.
    """
    groups = group(content["rows"])
    drawn: dict[str, list[Path]] = {data: [] for data in groups}
    for number, (data, cells) in enumerate(groups.items(), start=1):
        suffix = f"-{number}" if len(groups) > 1 else ""
        for plot in content["plots"]:
            name, picture = _PLOTS[plot](cells, content)
            if picture is None:
                continue
            path = folder / f"{name}{suffix}.png"
            with replacing(path) as staging:
                if isinstance(picture, Image.Image):
                    picture.save(staging, format="PNG")
                else:
                    picture.figure.savefig(staging, format="png")
            drawn[data].append(path)
    return drawn


def _losses(cells: Mapping[str, Rows], content: dict[str, Any]) -> tuple[str, "Axes | None"]:
    """Draws the validation losses of all cells and seeds over the steps."""
    name = "validation_losses"
    rows = [row for rows in cells.values() for row in rows]
    if not any(row.get("val_loss") for row in rows) or len(list_scripts(content["asked"], rows)) > 1:
        return name, None
    axes = _axes("training step", "validation loss")
    for number, (cell, rows) in enumerate(cells.items()):
        label = cell
        for row in rows:
            if row.get("val_loss"):
                axes.plot(*zip(*row["val_loss"], strict=True), label=label, **plots.line_style(number), markersize=3)
                label = None  # one line of the legend for all seeds
    _set_log(axes, "y")
    plots.add_legend(axes)
    return name, axes


def _by_sampling(
    field: str, title: str, short: str
) -> Callable[[Mapping[str, Rows], dict[str, Any]], tuple[str, "Axes | None"]]:
    """Returns a function that draws the metric over a number of the samplers, a line for each cell and all else of them."""

    def draw_by_sampling(cells: Mapping[str, Rows], content: dict[str, Any]) -> tuple[str, "Axes | None"]:
        metric, samplers = content["main_metric"], list_samplers(row for rows in cells.values() for row in rows)
        name, numbers = f"{metric}_by_{short}", sorted({getattr(each, field) for each in samplers} - {None})
        others = list(dict.fromkeys(each._replace(**{field: None}) for each in samplers))
        if len(numbers) < 2:
            return name, None
        axes = _axes(title, _label(content))
        for number, (cell, other) in enumerate(itertools.product(cells, others)):
            points = {x: value_of(cells[cell], other._replace(**{field: x}), metric) for x in numbers}
            label = cell if len(others) == 1 else f"{cell}, {'its own sampler' if other == Sampler() else other}"
            _plot(axes, points.items(), number, label, line=True)
        _draw_floor(axes, cells, content)
        if numbers[0] > 0:
            _set_log(axes, "x", numbers)
        plots.add_legend(axes)
        return name, axes

    return draw_by_sampling


def _by_fact(fact: str, title: str) -> Callable[[Mapping[str, Rows], dict[str, Any]], tuple[str, "Axes | None"]]:
    """Returns a function that draws the metric, with the last sampler, over a fact of the cells."""

    def draw_by_fact(cells: Mapping[str, Rows], content: dict[str, Any]) -> tuple[str, "Axes | None"]:
        metric, samplers = content["main_metric"], list_samplers(row for rows in cells.values() for row in rows)
        name, facts = f"{metric}_by_{fact}", {cell: mean_of(rows, fact) for cell, rows in cells.items()}
        if not samplers or len({value.value for value in facts.values() if value is not None}) < 2:
            return name, None
        axes = _axes(title, f"{_label(content)} ({samplers[-1]})")
        for number, (cell, rows) in enumerate(cells.items()):
            if facts[cell] is not None:
                _plot(axes, [(facts[cell].value, value_of(rows, samplers[-1], metric))], number, cell, line=False)
        _draw_floor(axes, cells, content)
        _set_log(axes, "x")
        plots.add_legend(axes)
        return name, axes

    return draw_by_fact


def _samples(cells: Mapping[str, Rows], content: dict[str, Any]) -> tuple[str, Image.Image | None]:
    """Puts the samples of the cells, a row each, below each other: a column has the same seed."""
    rows = {cell: next((row["samples"] for row in rows if row.get("samples")), None) for cell, rows in cells.items()}
    strips = {cell: Image.open(io.BytesIO(base64.b64decode(png))) for cell, png in rows.items() if png is not None}
    if not strips:
        return "samples", None
    return "samples", plots.image_grid(list(strips.values()), columns=1, padding=1, row_labels=list(strips))


_PLOTS = {
    "losses": _losses,
    "steps": _by_sampling("num_inference_steps", "sampling steps", "steps"),
    "guidance": _by_sampling("guidance_scale", "guidance scale", "guidance"),
    "parameters": _by_fact("parameters", "parameters"),
    "seconds": _by_fact("seconds", "training time (seconds)"),
    "samples": _samples,
}


def _label(content: dict[str, Any]) -> str:
    return figure_label(content["main_metric"], content["asked"]["protocol"]["features"])


def _axes(x: str, y: str) -> "Axes":
    axes = plots.new_axes()[0]
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.25)
    return axes


def _set_log(axes: "Axes", which: str, ticks: list[float] | None = None) -> None:
    """Makes an axis logarithmic, with plain numbers beside it, if its values spread enough for more than one."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = getattr(axes.dataLim, f"interval{which}")
    if ticks is None and not 0 < _MIN_LOG_RATIO * low < high:
        return
    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    axis.set_minor_locator(NullLocator())
    if ticks is not None:
        axis.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        return
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def _short(value: float) -> str:
    """Spells a number of an axis: 1,500,000 as 1.5 M."""
    return next((f"{value / unit:g} {name}" for unit, name in ((1e6, "M"), (1e3, "k")) if value >= unit), f"{value:g}")


def _plot(axes: "Axes", points: Iterable[tuple[float, Value | None]], number: int, label: str, line: bool) -> None:
    """Plots the values that are known, with their errors."""
    known = [(x, value) for x, value in points if value is not None]
    if not known:
        return
    style = plots.line_style(number) | ({} if line else {"linestyle": "none"})
    errors = [value.error or 0.0 for _, value in known]
    axes.errorbar([x for x, _ in known], [value.value for _, value in known], errors, label=label, capsize=3, **style)


def _draw_floor(axes: "Axes", cells: Mapping[str, Rows], content: dict[str, Any]) -> None:
    floor = floor_of(cells, content["main_metric"])
    if floor is not None:
        axes.axhline(floor["value"], color="#8a8a8a", linewidth=1, linestyle=(0, (1, 3)), label=BASELINE_NAMES["real"])
