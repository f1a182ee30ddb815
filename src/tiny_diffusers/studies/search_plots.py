"""The pictures of a search, drawn from its `search.json`. Markers and lines tell the trials apart in gray as well."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import plots
from .search_plan import VAL_LOSS, show


if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DARK, _LIGHT, _ACCENT = "#1f5fa8", "#9a9a9a", "#d9622b"
_NUM_TICKS = 5
_SPREAD = 0.08  # share of an axis that the lines of one choice take


def draw_parallel_coordinates(results: dict[str, Any], output: Path) -> Path:
    """
    Draws a line for each trial, through its settings, an axis each, to its objective on the last axis.

    The better the result, the darker the line. Trials that did not finish are dashed; a pruned one ends at its validation
    loss, if that is the objective. An axis is logarithmic where its range is, and lines of one choice run side by side.

    Args:
        results (`dict`): The content of `search.json`.
        output (`Path`): The picture to write.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    trials = [trial for trial in results["trials"] if trial["outcome"] != "running"]
    values = {trial["trial"]: value for trial in trials if (value := _result(results, trial)) is not None}
    scales = [_Scale.of_range(entry) for entry in results["ranges"].values()]
    scales.append(_Scale.of_values(list(values.values())))
    finished = {trial["value"] for trial in trials if trial["value"] is not None}
    ranks = {value: i + 1 for i, value in enumerate(sorted(finished, reverse=not results["lower_is_better"]))}
    colors, norm = colormaps["viridis"], Normalize(1, max(2, len(ranks)))

    axes = plots.new_axes(1.6 + 1.9 * len(scales))[0]
    for trial in sorted(trials, key=lambda trial: trial["trial"] == results["best"]):  # the best on top
        points = [*(trial["flags"].get(name) for name in results["ranges"]), values.get(trial["trial"])]
        offset = _SPREAD * ((trial["trial"] + 0.5) / len(results["trials"]) - 0.5)
        heights = [
            math.nan if point is None else scale.position(point) + (offset if scale.choices is not None else 0)
            for scale, point in zip(scales, points, strict=True)
        ]
        is_finished, is_best = trial["outcome"] == "finished", trial["trial"] == results["best"]
        color = _ACCENT if is_best else colors(0.9 * norm(ranks[trial["value"]])) if is_finished else _LIGHT
        style = {"linewidth": 3.0 if is_best else 1.3, "linestyle": "-" if is_finished else "--"}
        axes.plot(range(len(scales)), heights, color=color, **style)

    for x, scale in enumerate(scales):
        axes.axvline(x, color="black", linewidth=0.8)
        for position, label in scale.ticks():
            axes.plot([x - 0.02, x + 0.02], [position, position], color="black", linewidth=0.8)
            text = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}
            axes.text(x + 0.04, position, label, va="center", fontsize=8, bbox=text, zorder=3)
    names = [*results["ranges"], _objective(results)]
    axes.set_xticks(range(len(scales)), names, fontsize=9)
    axes.set(yticks=[], ylim=(-0.05, 1.05), xlim=(-0.1, len(scales) - 0.6))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)

    shown = {"finished": Line2D([], [], color=_DARK), "pruned or failed": Line2D([], [], color=_LIGHT, linestyle="--")}
    shown[f"best (trial {results['best']})"] = Line2D([], [], color=_ACCENT, linewidth=3)
    axes.legend(shown.values(), shown.keys(), frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1.0))
    bar = axes.figure.colorbar(ScalarMappable(norm, colors), ax=axes, pad=0.01, ticks=MaxNLocator(integer=True))
    bar.set_label("rank of a finished trial, 1 is the best")
    return _save(axes, output)


def draw_history(results: dict[str, Any], output: Path) -> Path:
    """Draws the objective of each trial over its number, and the best so far."""
    axes = plots.new_axes(7, 4)[0]
    trials, objective = results["trials"], results["objective"]
    best_of = min if results["lower_is_better"] else max
    finished = [trial for trial in trials if trial["outcome"] == "finished"]
    numbers, values = [trial["trial"] for trial in finished], [trial["value"] for trial in finished]
    axes.plot(numbers, values, "o", color=_DARK, label="finished")
    axes.step(
        [*numbers, trials[-1]["trial"]],
        [*(best_of(values[: i + 1]) for i in range(len(values))), best_of(values)],
        where="post",
        color=_ACCENT,
        linewidth=1.8,
        label="best so far",
    )
    if objective == VAL_LOSS:
        pruned = [trial for trial in trials if trial["outcome"] == "pruned"]
        if pruned:
            xs, ys = [trial["trial"] for trial in pruned], [trial["val_loss"] for trial in pruned]
            axes.plot(xs, ys, "v", color=_LIGHT, markerfacecolor="white", label="pruned: lowest until then")
    without = ("failed",) if objective == VAL_LOSS else ("failed", "pruned")
    lost = [trial["trial"] for trial in trials if trial["outcome"] in without]
    if lost:
        bottom = axes.get_xaxis_transform()
        axes.plot(lost, [0.02] * len(lost), "x", color="black", transform=bottom, label=" or ".join(without))
    axes.set(xlabel="trial", ylabel=_objective(results).replace("\n", " "))
    if 0 < 10 * min(values) < max(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return _save(axes, output)


def draw_importances(results: dict[str, Any], output: Path) -> Path:
    """Draws the importance of each setting as a bar; says so if there are too few trials for any."""
    importances = dict(reversed(results["importances"].items()))
    axes = plots.new_axes(7, 1.2 + 0.4 * max(1, len(importances)))[0]
    bars = axes.barh(list(importances), list(importances.values()), color=_DARK)
    axes.bar_label(bars, [f"{100 * value:.0f}%" for value in importances.values()], padding=3)
    axes.set(xlim=(0, 1.1), xlabel=f"share of the variance of {results['objective']} (finished trials)")
    if not importances:
        axes.set(yticks=[])
        axes.text(0.5, 0.5, "too few finished trials", ha="center", transform=axes.transAxes)
    return _save(axes, output)


class _Scale:
    """Positions from 0 to 1 of the values on one axis: numbers on a linear or logarithmic scale, or choices in order."""

    def __init__(self, low: float, high: float, log: bool = False, choices: list[Any] | None = None):
        self.low, self.high, self.log, self.choices = low, high, log, choices

    @classmethod
    def of_range(cls, entry: dict[str, Any]) -> "_Scale":
        if "choices" in entry:
            return cls(0, len(entry["choices"]) - 1, choices=entry["choices"])
        return cls(entry["low"], entry["high"], entry["log"])

    @classmethod
    def of_values(cls, values: list[float]) -> "_Scale":
        low, high = min(values), max(values)
        return cls(low, high, log=low > 0 and high > 10 * low)

    def position(self, value: Any) -> float:
        low, high = self.low, self.high
        if self.choices is not None:
            value = self.choices.index(value)
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low) if high > low else 0.5

    def ticks(self) -> list[tuple[float, str]]:
        if self.choices is not None:
            return [(self.position(choice), show(choice)) for choice in self.choices]
        shares = [i / (_NUM_TICKS - 1) for i in range(_NUM_TICKS)]
        if self.log:
            values = [self.low * (self.high / self.low) ** share for share in shares]
        else:
            values = [self.low + (self.high - self.low) * share for share in shares]
        return [(share, f"{value:.3g}") for share, value in zip(shares, values, strict=True)]


def _result(results: dict[str, Any], trial: dict[str, Any]) -> float | None:
    """Returns the objective of a trial; of a pruned one the lowest validation loss, if that is the objective."""
    return trial["val_loss"] if trial["value"] is None and results["objective"] == VAL_LOSS else trial["value"]


def _objective(results: dict[str, Any]) -> str:
    if results["objective"] == VAL_LOSS:
        return "val_loss\n(lowest of the run)"
    return f"{results['objective']}\n({'lower' if results['lower_is_better'] else 'higher'} is better)"


def _save(axes: "Axes", output: Path) -> Path:
    from matplotlib.text import Text

    for text in axes.figure.findobj(Text):
        text.set_parse_math(False)  # a name may hold a dollar
    axes.figure.savefig(output)
    return output
