"""
Post-hoc EMA (arXiv 2312.02696, section 3.2): averages of the weights of any length, rebuilt after training.

During training two power averages of each network are kept, and saved from time to time as snapshots. The profile of an
average is how much the weights of each step count in it. That of any other length is approximated by a linear
combination of the snapshots' profiles, and the same combination of the snapshots approximates its weights.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import UserError
from ..files import find_damage
from ..runs import RunFolder
from .ema import PowerEMA, gamma_of


logger = logging.getLogger(__name__)

SIGMA_RELS = (0.05, 0.1)  # of the averages that are kept, as in the paper
MAX_SIGMA_REL = 0.28  # that of gamma = 0, the mean of all steps, is 1 / sqrt(12) = 0.289
NUM_SNAPSHOTS = 32  # a run


def is_snapshot_due(step: int, num_steps: int) -> bool:
    """Checks that a snapshot is saved after this step, of 32 at equal distances, the last after the last step."""
    return NUM_SNAPSHOTS * step // num_steps > NUM_SNAPSHOTS * (step - 1) // num_steps


def save_snapshot(averages: dict[str, dict[float, PowerEMA]], folder: Path) -> None:
    """
    Saves the averages of each network, by name and sigma_rel, to a folder. They stay in float32: when the learning rate
    ends at 0 they differ by a thousandth, of which half precision would keep little.
    """
    for name, by_length in averages.items():
        for sigma_rel, average in by_length.items():
            tensors = {key: value.contiguous().cpu() for key, value in average.module.state_dict().items()}
            save_file(tensors, folder / _file_name(name, sigma_rel))


def _file_name(name: str, sigma_rel: float) -> str:
    return f"{name}_sigma_rel-{sigma_rel:g}.safetensors"


def inner_product(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """
    Returns the inner products of power profiles p(s) = (gamma + 1) s^gamma / t^(gamma + 1), s in [0, t] (arXiv
    2312.02696, algorithm 3). The arguments broadcast.
    """
    ratio = np.where(t_a < t_b, t_a / t_b, t_b / t_a) ** np.where(t_a < t_b, gamma_b, gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) * ratio / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))


def solve_coefficients(steps: np.ndarray, gammas: np.ndarray, step: int, gamma: float) -> tuple[np.ndarray, float]:
    """
    Solves for the linear combination of snapshots whose profile is nearest to that of an average, in least squares.

    Beyond the paper, the coefficients are held to a sum of 1: without, an average of what hardly changes would be off by
    a share of the weights themselves.

    Args:
        steps (`np.ndarray` of shape `(N,)`), gammas (`np.ndarray` of shape `(N,)`): Those of the snapshots.
        step (`int`), gamma (`float`): Those of the average.

    Returns:
        `tuple[np.ndarray, float]`: The coefficients, `(N,)`, and the profile's distance as a share of its norm.
    """
    times = np.asarray(steps) / step
    products = inner_product(times[:, None], gammas[:, None], times, gammas)  # (N, N)
    target, norm = inner_product(times, gammas, 1.0, gamma), inner_product(1.0, gamma, 1.0, gamma)
    ones = np.ones((len(times), 1))
    system = np.block([[products, ones], [ones.T, np.zeros((1, 1))]])  # with a Lagrange multiplier
    solution = np.linalg.lstsq(system, np.append(target, 1.0), rcond=None)[0][:-1]
    squared = solution @ products @ solution - 2 * solution @ target + norm
    return solution, float(np.sqrt(max(squared, 0.0) / norm))


def find_snapshots(folder: RunFolder, step: int | None = None) -> list[Path]:
    """
    Finds the snapshots of a run up to that of a step, the last by default. Damaged ones are skipped with a warning.

    Raises:
        UserError: If there are none, or none of this step.
    """
    intact = []
    for path in folder.list_snapshots():
        reason = find_damage(path)
        if reason is None:
            intact.append(path)
        else:
            logger.warning(f"{path.name} is damaged ({reason}): the averages are rebuilt without it.")
    if not intact:
        raise UserError(f"{folder.path} has no snapshots to rebuild averages from: train with --posthoc_ema.")
    steps = [folder.snapshot_step(path) for path in intact]
    if step is None:
        return intact
    if step not in steps:
        nearest = min(steps, key=lambda other: abs(other - step))
        raise UserError(
            f"--step {step}: there is no snapshot of it; {folder.path} has {len(steps)}, of steps {steps[0]} to "
            f"{steps[-1]}, the nearest of step {nearest}."
        )
    return intact[: steps.index(step) + 1]


def rebuild(
    modules: dict[str, nn.Module], folder: RunFolder, snapshots: list[Path], sigma_rels: list[float]
) -> Iterator[tuple[float, float]]:
    """
    Rebuilds averages at the step of the last snapshot. Yields (sigma_rel, error of its profile) after it has put the
    average's weights into the modules, with the statistics of batch norms; counters are those of the last snapshot.

    Args:
        modules (`dict[str, nn.Module]`): The networks by name.
        folder ([`RunFolder`]): The run.
        snapshots (`list[Path]`): From [`find_snapshots`].
        sigma_rels (`list[float]`): Lengths, each in (0, 0.28].

    Raises:
        UserError: If the snapshots are of other networks, or not finite.
    """
    steps = np.array([folder.snapshot_step(path) for path in snapshots])
    gammas = np.array([gamma_of(sigma_rel) for sigma_rel in SIGMA_RELS])
    all_steps, all_gammas = np.repeat(steps, len(gammas)), np.tile(gammas, len(steps))
    solved = [solve_coefficients(all_steps, all_gammas, steps[-1], gamma_of(sigma_rel)) for sigma_rel in sigma_rels]
    files = [(path, sigma_rel) for path in snapshots for sigma_rel in SIGMA_RELS]  # in the order of the coefficients

    rebuilt = {}
    for name, module in modules.items():
        averaged = {key: value for key, value in module.state_dict().items() if value.is_floating_point()}
        sums = [{key: torch.zeros_like(value, dtype=torch.float64) for key, value in averaged.items()} for _ in solved]
        try:
            for i, (path, sigma_rel) in enumerate(files):
                tensors = load_file(path / _file_name(name, sigma_rel))
                for total, (coefficients, _) in zip(sums, solved, strict=True):
                    for key in total:
                        total[key].add_(tensors[key], alpha=coefficients[i])
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise UserError(
                f"The snapshots in {folder.path} are not of the {name} that it holds ({error}): they are of another run."
            ) from error
        if not all(value.isfinite().all() for total in sums for value in total.values()):
            raise UserError(f"The snapshots of the {name} in {folder.path} are not finite: give an earlier --step.")
        rebuilt[name] = [{**tensors, **total} for total in sums]

    for i, sigma_rel in enumerate(sigma_rels):
        for name, module in modules.items():
            module.load_state_dict(rebuilt[name][i])
        yield sigma_rel, solved[i][1]
