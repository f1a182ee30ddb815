"""All pictures: grids and strips of images (`grids`), curves (`curves`), and diagrams of networks (`diagrams`)."""

from ..runs import read_log
from .curves import (
    Curve,
    Curves,
    Panel,
    add_legend,
    compare_losses,
    line_style,
    loss_curves,
    loss_curves_of_run,
    loss_curves_of_runs,
    new_axes,
    schedule_curves,
    smooth,
)
from .diagrams import Stage, draw_network
from .grids import Strip, animation, captioned_strips, image_grid, pad_to_one_size, strip, to_pil, to_uint8


__all__ = [
    "Curve",
    "Curves",
    "Panel",
    "Stage",
    "Strip",
    "add_legend",
    "animation",
    "captioned_strips",
    "compare_losses",
    "draw_network",
    "image_grid",
    "line_style",
    "loss_curves",
    "loss_curves_of_run",
    "loss_curves_of_runs",
    "new_axes",
    "pad_to_one_size",
    "read_log",
    "schedule_curves",
    "smooth",
    "strip",
    "to_pil",
    "to_uint8",
]
