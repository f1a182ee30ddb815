"""The networks of a study that has a budget of minutes: all are divided by one factor, which the study keeps."""

from collections.abc import Iterable
from typing import Any

from ..errors import UserError, say
from ..evaluation.evaluator import processes
from ..families.budget import choose_factor, narrow, stay_different, widths_of
from ..hardware import setup_torch
from ..training.process import load_data
from .cells import Study


def fit_networks(
    study: Study, cells: Iterable[str], factor: int | None = None
) -> tuple[int | None, dict[str, dict[str, Any]]]:
    """
    Narrows the networks of cells so that each trains for the study's steps, or for `MIN_STEPS`, in the budget. Says in one
    line what is changed.

    Only U-Nets that are built from options become narrower: other networks stay as they are.

    Args:
        study ([`Study`]): The study, with a budget.
        cells (`Iterable[str]`): Its cells.
        factor (`int`, *optional*): The factor by which the study has divided the widths of other cells; measured if not
            given.

    Returns:
        `tuple[int | None, dict]`: The factor, None if there is no network to narrow, and cell -> the options that change its
        network.

    Raises:
        UserError: If two cells that differ would have the same network by the given factor.
    """
    setup_torch()
    arguments = {cell: study.arguments_of(cell) for cell in cells}
    data = {cell: load_data(each, processes()) for cell, each in arguments.items()}
    diffusion = [cell for cell in arguments if study.scripts[cell] in ("unconditional", "conditional")]
    narrowed = {cell: arguments[cell] for cell in diffusion if widths_of(arguments[cell], data[cell])}
    others = [cell for cell in arguments if cell not in narrowed]
    if others:
        say(
            f"--budget {study.arguments.budget:g}: the networks of {', '.join(others)} stay"
            f"{'' if study.num_steps else ', and only their steps are fitted to it'}, as only U-Nets that are built from "
            "options become narrower."
        )
    if factor is None:
        factor = choose_factor(narrowed, data, study.arguments.budget, study.num_steps) if narrowed else None
    elif not stay_different(narrowed, data, factor):
        raise UserError(
            f"--cells {' '.join(study.cells)}: the study's networks are {factor} times narrower, and by that factor two of "
            "these cells would have the same: give another --output_dir."
        )
    return factor, {
        cell: narrow(each, data[cell], factor) if cell in narrowed else {} for cell, each in arguments.items()
    }
