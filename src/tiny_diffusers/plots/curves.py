"""
Curves: losses of runs and noise schedules.

    curves = loss_curves_of_runs({"a": "runs/a/train_log.jsonl", "b": "runs/b/train_log.jsonl"})
    curves.draw("losses.png")
    curves.save("losses.json")              # the values that were drawn
    Curves.load("losses.json").draw("losses.svg")

Curves differ by color, dashes and markers, so they can be told apart in gray as well.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from ..errors import UserError, printable
from ..files import load_json, read_text, replace_file
from ..runs import read_log


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.legend import Legend

FORMAT = 1  # of the JSON file
Look = Literal["line", "thin", "points", "faint"]

COLORS = ("#1f5fa8", "#d9622b", "#2f7d32", "#111111", "#8e44ad", "#b8860b", "#c2185b", "#5f6b75")
DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "x", "P")
FAINT_COLORS = ("#a9c7e8", "#f0c3ab", "#b9dcb4")
MARKERS_PER_CURVE = 8  # of a line with many points
_MAX_LINES_INSIDE, _MAX_LINES = 5, 20  # of a legend, and of a column of one beside the plot

# Limits on a file that may be a stranger's.
_MAX_PANELS, _MAX_CURVES, _MAX_POINTS, _MAX_LABEL, _MAX_VALUE = 8, 200, 1_000_000, 120, 1e300

_LOSSES = {"train": ("loss", "training loss"), "validation": ("val_loss", "validation loss")}


@dataclass
class Curve:
    """
    One curve.

    Args:
        label (`str`): Its name in the legend; empty for none.
        x (`list[float]`): Positions.
        y (`list[float]`): Values, as many.
        style (`int`): Number of its color, dashes and marker: curves of one style belong together.
        look (`str`): `"line"`; `"thin"` beside another curve of its style; `"points"` with a marker at each value; or
            `"faint"` for values before smoothing.
    """

    label: str
    x: list[float]
    y: list[float]
    style: int = 0
    look: Look = "line"


@dataclass
class Panel:
    """Axes with curves: their title, the names of both axes with units, and whether y is logarithmic."""

    title: str
    xlabel: str
    ylabel: str
    is_logarithmic: bool
    curves: list[Curve] = field(default_factory=list)


@dataclass
class Curves:
    """Picture of one or several panels side by side. Its JSON file holds all that is drawn."""

    panels: list[Panel]

    def save(self, path: str | Path) -> Path:
        """Writes the values to a JSON file."""
        replace_file(Path(path), json.dumps({"format": FORMAT, **asdict(self)}, allow_nan=False) + "\n")
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> "Curves":
        """
        Reads a file that [`Curves.save`] has written.

        Raises:
            [`~tiny_diffusers.errors.UserError`]: If there is no such file, or if it holds anything else.
        """
        try:
            content = load_json(read_text(Path(path)))
        except OSError as error:
            raise UserError(
                f"There is no file '{path}' of curves: `tiny-diffusers plot losses` writes one."
            ) from error
        except ValueError as error:
            raise UserError(f"'{path}' is no file of curves: {error}.") from error
        try:
            if content["format"] != FORMAT:
                raise UserError(
                    f"'{path}' has format {content['format']!r:.40} of curves, and this version reads {FORMAT}."
                )
            panels = [
                Panel(**{**panel, "curves": [Curve(**c) for c in panel["curves"]]}) for panel in content["panels"]
            ]
        except (TypeError, KeyError) as error:
            raise UserError(f"'{path}' is no file of curves: `tiny-diffusers plot` writes such files.") from error
        mistake = _find_mistake(panels)
        if mistake is not None:
            raise UserError(f"'{path}' is no file of curves: {mistake}.")
        return cls(panels)

    def draw(self, output: str | Path) -> Path:
        """Draws the panels to a picture, whose suffix determines the format; returns its path."""
        width = 8 if len(self.panels) == 1 else 5.5 * len(self.panels)
        all_axes = new_axes(width, columns=len(self.panels))
        named: set[str] = set()  # in the legend of an earlier panel
        for axes, panel in zip(all_axes, self.panels, strict=True):
            _draw_panel(axes, panel, has_legend=not {curve.label for curve in panel.curves} <= named)
            named |= {curve.label for curve in panel.curves}
        all_axes[0].figure.savefig(output)
        return Path(output)


def new_axes(width: float = 8, height: float = 4.5, columns: int = 1) -> "list[Axes]":
    """Returns axes beside each other in a figure of that many inches, with no frame at the top and on the right."""
    from matplotlib.figure import Figure  # unlike pyplot it has no global state and needs no display

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    all_axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
    return all_axes


def line_style(number: int) -> dict[str, Any]:
    """Returns the color, dashes and marker of the curve of that number, for matplotlib."""
    kinds = {"color": COLORS, "linestyle": DASHES, "marker": MARKERS}
    return {name: values[number % len(values)] for name, values in kinds.items()}


def add_legend(axes: "Axes") -> "Legend":
    """Adds the legend: beside the plot if it is long, where it hides no line, in a figure that is wider by as much."""
    lines = len(axes.get_legend_handles_labels()[1])
    if lines <= _MAX_LINES_INSIDE:
        return axes.legend(frameon=False, handlelength=3.5)
    beside = {
        "loc": "center left",
        "bbox_to_anchor": (1.0, 0.5),
        "fontsize": 8,
        "ncols": math.ceil(lines / _MAX_LINES),
    }
    legend, figure = axes.legend(frameon=False, handlelength=3.5, **beside), axes.figure
    figure.set_figwidth(figure.get_figwidth() + legend.get_window_extent().width / figure.dpi)
    return legend


def _find_mistake(panels: list[Panel]) -> str | None:
    """Returns what is wrong with the panels of a file, which may be a stranger's, or None."""
    curves = [curve for panel in panels for curve in panel.curves]
    texts = [text for panel in panels for text in (panel.title, panel.xlabel, panel.ylabel)]
    texts += [curve.label for curve in curves]
    has_curves = all(panel.curves for panel in panels) and len(curves) <= _MAX_CURVES
    if not 1 <= len(panels) <= _MAX_PANELS or not has_curves:
        return f"it must have 1 to {_MAX_PANELS} panels, each with curves, and at most {_MAX_CURVES} curves"
    if not all(isinstance(text, str) and len(text) <= _MAX_LABEL for text in texts):
        return f"its titles and labels must be text of at most {_MAX_LABEL} characters"
    if not all(isinstance(panel.is_logarithmic, bool) for panel in panels):
        return "is_logarithmic must be true or false"
    for curve in curves:
        if type(curve.style) is not int or not 0 <= curve.style < _MAX_CURVES or curve.look not in get_args(Look):
            return f"the style of {curve.label!r} must be a number from 0, and its look one of {', '.join(get_args(Look))}"
        if not all(isinstance(values, list) and len(values) <= _MAX_POINTS for values in (curve.x, curve.y)):
            return f"x and y of {curve.label!r} must be lists of at most {_MAX_POINTS:,} numbers"
        if len(curve.x) != len(curve.y) or not curve.x:
            return f"{curve.label!r} must have as many values of y as of x, and some"
        if not all(type(v) in (int, float) and abs(v) < _MAX_VALUE for values in (curve.x, curve.y) for v in values):
            return f"the values of {curve.label!r} must be finite numbers"
    return None


def _draw_panel(axes: "Axes", panel: Panel, has_legend: bool) -> None:
    for curve in panel.curves:
        axes.plot(curve.x, curve.y, **_options(curve))
    if panel.is_logarithmic:
        _set_log_scale(axes, [value for curve in panel.curves for value in curve.y])
    axes.set(xlabel=_plain(panel.xlabel), ylabel=_plain(panel.ylabel), title=_plain(panel.title))
    axes.grid(alpha=0.25)
    texts = [axes.title, axes.xaxis.label, axes.yaxis.label]
    if has_legend:
        texts += add_legend(axes).get_texts()
    for text in texts:
        text.set_parse_math(False)  # a name may hold a dollar


def _options(curve: Curve) -> dict[str, Any]:
    """Returns how matplotlib is to draw a curve."""
    style, label = line_style(curve.style), _plain(curve.label) or None
    marker = {"marker": style.pop("marker"), "markersize": 4}
    if curve.look == "faint":
        return {"color": FAINT_COLORS[curve.style % len(FAINT_COLORS)], "linewidth": 0.8, "label": label}
    options = {**style, "linewidth": 1.8, "label": label}
    if curve.look == "thin":
        return options | {"linewidth": 0.9}
    if curve.look == "points":
        return options | marker
    every = max(1, len(curve.x) // MARKERS_PER_CURVE)
    if curve.style == 0:
        return options
    return options | marker | {"markevery": (curve.style * every // len(MARKERS) % every, every)}


def _plain(text: str) -> str:
    """Returns text as one line that matplotlib takes as it is: it leaves out labels that begin with an underscore."""
    text = " ".join(printable(text).split())
    return f" {text}" if text.startswith("_") else text


def _set_log_scale(axes: "Axes", values: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    is_narrow = max(values) < 100 * min(values)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if is_narrow else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


# --------------------------------------------------------------------------------------------------------------- losses


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """
    Computes the means (N,) of values (N,) over a centered window of `window` values, so the result has no lag. At the
    ends the window is cut off.
    """
    window = min(window, len(values))
    ones = np.ones(window)
    return np.convolve(values, ones, "same") / np.convolve(np.ones_like(values), ones, "same")


def _smooth_if_long(values: np.ndarray) -> np.ndarray:
    """Smooths more than 20 values, and returns fewer as they are."""
    return smooth(values, max(5, len(values) // 30)) if len(values) > 20 else values


def _short(name: str) -> str:
    """Returns the end of a long name: that of a path says more than its beginning."""
    return name if len(name) <= _MAX_LABEL else "..." + name[3 - _MAX_LABEL :]


def _curve(label: str, x: np.ndarray, y: np.ndarray, style: int, look: Look = "line") -> Curve:
    """Returns a curve without the values that no picture has room for."""
    kept = np.abs(y) < _MAX_VALUE  # and no NaN
    return Curve(_short(label), x[kept].tolist(), y[kept].tolist(), style, look)


def _loss_panel(title: str, curves: list[Curve]) -> Curves:
    """Returns a picture of losses over steps, on a logarithmic axis where all are above 0."""
    curves = [curve for curve in curves if curve.x]
    if not 1 <= len(curves) <= _MAX_CURVES:
        raise UserError(f"There are {len(curves)} losses to plot: it must be 1 to {_MAX_CURVES}.")
    is_logarithmic = all(value > 0 for curve in curves for value in curve.y)
    return Curves([Panel(_short(title), "step", "loss", is_logarithmic, curves)])


def loss_curves_of_run(log: str | Path, title: str = "") -> Curves:
    """
    Returns the losses of a run over its steps: the training loss (of each network, if there are several) and the
    validation loss.

    Args:
        log (`str` or `Path`): The run's `train_log.jsonl`, as read by [`~tiny_diffusers.runs.read_log`].
        title (`str`): Title of the plot.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If the log does not exist or has no loss.
    """
    series = read_log(log)
    losses = [name for name in series if name.endswith("loss") and name != "val_loss"]
    if not losses and "val_loss" not in series:
        raise UserError(f"'{log}' has no loss in it yet: there is nothing to plot.")
    curves = []
    for name, style in zip(losses, (0, 2), strict=False):
        steps, values = series[name]
        smoothed = _smooth_if_long(values)
        if smoothed is not values:
            curves.append(_curve("", steps, values, style, "faint"))
        label = name.removesuffix("loss").strip("_") or "training"
        curves.append(_curve(label, steps, smoothed, style))
    if "val_loss" in series:
        steps, values = series["val_loss"]
        best = values.argmin()
        label = f"validation (lowest: {values[best]:.3g} at step {steps[best]:,})"
        curves.append(_curve(label, steps, values, 1, "points"))
    return _loss_panel(title, curves)


def loss_curves_of_runs(logs: Mapping[str, str | Path], which: str | None = None) -> Curves:
    """
    Returns the training loss of several runs over their steps (of each network, if there are several), their validation
    loss, or both.

    All losses share one axis, but losses of different kinds (l2 and Huber, a diffusion model's and a VAE's) cannot be
    compared.

    Args:
        logs (`dict[str, str]`): A run's name in the legend -> its `train_log.jsonl`.
        which (`str`, *optional*): `"train"`, `"validation"` or `"both"`; by default the validation loss if all runs
            have it, else the training loss.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If a log does not exist, or if a run lacks the loss.
    """
    runs = {name: read_log(log) for name, log in logs.items()}
    first = next(iter(runs.values()), {})
    common = [key for key in first if key.endswith("loss") and all(key in series for series in runs.values())]
    keys_of = {
        "train": [key for key in common if key != "val_loss"],
        "validation": [key for key in common if key == "val_loss"],
    }
    if which is None:
        which = next((kind for kind in ("validation", "train") if keys_of[kind]), None)
        if which is None:
            raise UserError(f"{', '.join(runs)} have no loss in common: there is nothing to plot.")
    kinds = list(_LOSSES) if which == "both" else [which]
    for kind in kinds:
        if not keys_of[kind]:
            key, title = _LOSSES[kind]
            lacking = next(name for name, series in runs.items() if key not in series)
            raise UserError(f"'{lacking}' has no {title} in its log: leave it out, or choose another.")
    keys = [key for kind in kinds for key in keys_of[kind]]
    titles = {key: key.removesuffix("_loss") for key in keys} | dict(_LOSSES.values())
    curves = []
    for style, (name, series) in enumerate(runs.items()):
        for key in keys:
            steps, values = series[key]
            label = f"{name}, {titles[key]}" if len(keys) > 1 else name
            look = "points" if key == "val_loss" else "thin"
            if len(kinds) == 1 and key == keys[0]:
                look = "line"
            shown = values if key == "val_loss" else _smooth_if_long(values)
            curves.append(_curve(label, steps, shown, style, look))
    title = "training and validation losses" if len(kinds) > 1 else _LOSSES[which][1]
    return _loss_panel(title, curves)


def loss_curves(log: str | Path, output: str | Path, title: str = "") -> Path:
    """Draws [`loss_curves_of_run`] to a picture; returns its path."""
    return loss_curves_of_run(log, title).draw(output)


def compare_losses(logs: Mapping[str, str | Path], output: str | Path) -> Path:
    """Draws [`loss_curves_of_runs`] to a picture; returns its path."""
    return loss_curves_of_runs(logs).draw(output)


# ------------------------------------------------------------------------------------------------------------ schedules


def schedule_curves(schedules: Mapping[str, Mapping[str, np.ndarray]]) -> Curves:
    """
    Returns noise schedules: the share of the image in the variance of x_t, the log-SNR, and the betas of those that
    have them.

    Args:
        schedules (`dict[str, dict]`): The name of a schedule -> `signal` and `noise` of x_t = signal x_0 + noise eps at
            t = 0, 1, ..., each (T,), and `betas` (T,) or None.
    """
    has_edm = any((schedule["signal"] == 1).all() for schedule in schedules.values())
    time = "timestep t (EDM: steps of its sampling, from the image)" if has_edm else "timestep t"
    share = Panel("share of the image in x_t", time, "alphas_cumprod = a² / (a² + s²)", False)
    ratio = Panel("log-SNR of x_t = a x_0 + s eps", time, "ln(a² / s²), nats", False)
    betas = Panel("noise added at each timestep", time, "beta", True)
    for style, (name, schedule) in enumerate(schedules.items()):
        signal, noise = (schedule[key].astype(np.float64) ** 2 for key in ("signal", "noise"))
        steps = np.arange(len(signal))
        with np.errstate(divide="ignore"):
            log_snr = np.log(signal) - np.log(noise)
        for panel, values in ((share, signal / (signal + noise)), (ratio, log_snr), (betas, schedule["betas"])):
            if values is not None:
                kept = np.isfinite(values)  # flow's t = 0 has no noise
                if panel.is_logarithmic:
                    kept &= values > 0
                if kept.any():
                    panel.curves.append(Curve(_short(name), steps[kept].tolist(), values[kept].tolist(), style))
    return Curves([panel for panel in (share, ratio, betas) if panel.curves])
