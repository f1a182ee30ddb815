"""Diagrams of networks: the resolutions that the images pass through, as boxes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


_BOX_WIDTH, _GAP = 1.7, 0.5
_BOX_HEIGHTS = (1.15, 2.6)  # of a vector, and of the finest feature maps
_COLORS = {"end": "#ffffff", "maps": "#dce8f4", "vector": "#f6edd6", "embedding": "#e6e6e6"}
_ATTENTION_COLOR = "#a9c3e0"


@dataclass
class Stage:
    """
    Part of a network whose feature maps have one resolution.

    Args:
        title (`str`): The first line in its box, such as `"16x16"`.
        lines (`list[str]`): Further lines.
        side (`int`): Longer side of the feature maps in pixels, 0 for vectors.
        kind (`str`): `"end"` for the input and output, `"maps"`, `"vector"` or `"embedding"`.
        has_attention (`bool`): Whether attention is among its layers.
        skips_to (`int`, *optional*): The later stage that takes its feature maps, by its position.
    """

    title: str
    lines: list[str]
    side: int
    kind: str = "maps"
    has_attention: bool = False
    skips_to: int | None = None


def draw_network(stages: Sequence[Stage], title: str, output: str | Path) -> Path:
    """
    Draws a network from left to right. A box is the lower, the coarser its feature maps are. One with attention is darker,
    has a thick edge and says so; skip connections are dashed. Embeddings, which all stages take, are below.

    Args:
        stages (`list[Stage]`): The stages in order.
        title (`str`): Title of the diagram.
        output (`str` or `Path`): The picture to write; its suffix determines the format.

    Returns:
        `Path`: `output`.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch

    flow = [stage for stage in stages if stage.kind != "embedding"]
    embeddings = [stage for stage in stages if stage.kind == "embedding"]
    sides = sorted({stage.side for stage in flow}, reverse=True)
    span = _BOX_HEIGHTS[1] - _BOX_HEIGHTS[0]
    step = span / max(1, len(sides) - 1)
    heights = {side: _BOX_HEIGHTS[1] - rank * step for rank, side in enumerate(sides)}
    tops = {side: -1.1 * rank for rank, side in enumerate(sides)}
    width = len(flow) * (_BOX_WIDTH + _GAP)
    lowest = min(tops[stage.side] - heights[stage.side] for stage in flow)
    bottom = lowest - (0.4 + _BOX_HEIGHTS[0] if embeddings else 0) - 0.1
    height = 0.9 - bottom  # with the title

    figure = Figure(figsize=(max(width, 4) * 0.85, height * 0.85), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()

    def box(stage: Stage, x: float, top: float, box_height: float) -> None:
        axes.add_patch(
            FancyBboxPatch(
                (x, top - box_height),
                _BOX_WIDTH,
                box_height,
                boxstyle="round,pad=0,rounding_size=0.08",
                facecolor=_ATTENTION_COLOR if stage.has_attention else _COLORS[stage.kind],
                edgecolor="#333333",
                linewidth=2.5 if stage.has_attention else 1,
            )
        )
        text = "\n".join([stage.title, *stage.lines, *(["with attention"] if stage.has_attention else [])])
        middle = (x + _BOX_WIDTH / 2, top - box_height / 2)
        axes.text(*middle, text, ha="center", va="center", fontsize=8, parse_math=False)

    lefts = [i * (_BOX_WIDTH + _GAP) for i in range(len(flow))]
    middles = [tops[stage.side] - heights[stage.side] / 2 for stage in flow]
    for i, stage in enumerate(flow):
        box(stage, lefts[i], tops[stage.side], heights[stage.side])
        if i:
            arrow = {"arrowstyle": "-|>", "color": "#333333", "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", (lefts[i], middles[i]), (lefts[i - 1] + _BOX_WIDTH, middles[i - 1]), arrowprops=arrow)
        if stage.skips_to is not None:
            y = tops[stage.side] - 0.12
            ends = (lefts[stage.skips_to], y), (lefts[i] + _BOX_WIDTH, y)
            axes.annotate("", *ends, arrowprops={"arrowstyle": "-|>", "color": "#777777", "linestyle": "--"})
    for i, stage in enumerate(embeddings):
        left = width / 2 - len(embeddings) * (_BOX_WIDTH + _GAP) / 2 + i * (_BOX_WIDTH + _GAP)
        box(stage, left, lowest - 0.4, _BOX_HEIGHTS[0])
    axes.set_xlim(-0.1, max(width - _GAP, 4) + 0.1)
    axes.set_ylim(bottom, 0.1)
    axes.set_title(title, parse_math=False, fontsize=11)
    figure.savefig(output)
    return Path(output)
