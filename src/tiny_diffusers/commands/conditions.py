"""`--condition NAME=VALUE`: the conditions of a checkpoint, by name and in the units of its data."""

import argparse
import inspect
import itertools
import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import UserError, refusals, say
from .shared import finite_numbers


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def add_condition_argument(
    parser: argparse.ArgumentParser, values: str = "one value for all images", name: str = "condition"
) -> None:
    parser.add_argument(
        f"--{name}",
        type=named_numbers,
        action="append",
        metavar="NAME=VALUE",
        help=f"a condition that the network takes, such as age=30; {values}; may be repeated for several conditions",
    )


def named_numbers(text: str) -> tuple[str, list[float]]:
    name, is_pair, numbers = text.rpartition("=")
    if not is_pair or not name:
        raise argparse.ArgumentTypeError(f"'{text}' is not a name and its value, such as age=30")
    return name.strip(), finite_numbers(numbers)


def conditions_to_draw(
    pipe: "DiffusionPipeline", args: argparse.Namespace, most: int | None
) -> tuple[list[dict[str, float]], list[str]]:
    """
    Returns each combination of the values of `--condition`, with a text for it; without the flag, some that show what the
    first condition does, `most` at most; of a network without conditions, none.
    """
    if args.condition is None:
        statistics = getattr(pipe, "_condition_statistics", None)
        if statistics is None or args.guidance_scale == 0:
            return [], []
        rows, texts = (each[:most] for each in statistics.examples())
        say(f"{', '.join(texts)}; --condition gives other values", sys.stderr)
        return rows, texts
    from ..pipelines.pipeline_tiny_conditions import spell_numbers

    values = condition_options(pipe.__call__, pipe, args, math.inf)["conditions"]
    rows = [dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())]
    shown = [name for name, numbers in values.items() if len(numbers) > 1] or list(values)
    texts = [[f"{name} {text}" for text in spell_numbers([row[name] for row in rows])] for name in shown]
    return rows, [", ".join(text) for text in zip(*texts, strict=True)]


def condition_options(
    call: Callable, pipe: "DiffusionPipeline", args: argparse.Namespace, most: float
) -> dict[str, Any]:
    """
    Returns `conditions` for `call`, the pipeline's own or its interpolation, as `--condition` gives them: name -> values,
    `most` of each at most; empty for a network without conditions, and for samples without any.

    Raises:
        UserError: If the network takes no such conditions, a name is missing or given twice, or has too many values.
    """
    from ..data.folders import abbreviate

    statistics, guidance_scale = getattr(pipe, "_condition_statistics", None), getattr(args, "guidance_scale", None)
    if args.condition is not None and guidance_scale == 0:
        raise UserError("--guidance_scale 0 draws samples without conditions: leave out that or --condition.")
    if args.condition is None and statistics is not None and guidance_scale != 0:
        names = abbreviate([f"{name} ({values})" for name, values in statistics.ranges.items()])
        is_guided = "guidance_scale" in inspect.signature(call).parameters
        hint = ", or --guidance_scale 0 for none" if is_guided else ""
        raise UserError(
            f"'{args.checkpoint}' draws by conditions: give --condition NAME=VALUE for each of {names}{hint}."
        )
    return given_conditions("condition", call, pipe, args, most)


def given_conditions(
    flag: str, call: Callable, pipe: "DiffusionPipeline", args: argparse.Namespace, most: float
) -> dict[str, Any]:
    """Returns what `--condition`, or another flag of its kind, gives to `call`: as [`condition_options`], or nothing."""
    given = getattr(args, flag)
    if given is None:
        return {}
    statistics = getattr(pipe, "_condition_statistics", None)
    if statistics is None or f"{flag}s" not in inspect.signature(call).parameters:
        raise UserError(f"--{flag} means nothing to '{args.checkpoint}', which takes no conditions: leave it out.")
    values = dict(given)
    for name, numbers in given:
        if numbers is not values[name]:
            raise UserError(f"--{flag} {name}: it is given twice; give its values with commas, such as {name}=1,2.")
        if len(numbers) > most:
            raise UserError(f"--{flag} {name} has {len(numbers)} values: give {most} at most.")
    with refusals(f"--{flag}: "):
        statistics.parse({name: numbers[:1] for name, numbers in values.items()})
    return {f"{flag}s": values}
