"""`tiny-diffusers describe`."""

import argparse
from pathlib import Path

from ..errors import UserError, refusals, say
from .shared import FIGURE_SUFFIXES, add_checkpoint_argument, load_checkpoint, make_parser, prepare_picture


def describe_parser() -> argparse.ArgumentParser:
    parser = make_parser("describe", "Prints the layers of a network, and draws it.")
    add_checkpoint_argument(parser)
    parser.add_argument(
        "--leaves",
        action="store_true",
        help="list each convolution, norm and linear layer, not the blocks they are in",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("network.png"),
        metavar="FILE",
        help="the diagram, .png, .svg or .pdf; of several networks, a file each (default: network.png)",
    )
    return parser


def describe(args: argparse.Namespace) -> None:
    """Prints a table for each network of the checkpoint, and draws its diagram."""
    import torch

    from ..data.images import spell_values
    from ..network_summary import stages, summarize
    from ..plots import draw_network

    prepare_picture(args.output, FIGURE_SUFFIXES)
    pipe = load_checkpoint(args)
    networks = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    if not networks:
        raise UserError(f"'{args.checkpoint}' is a {type(pipe).__name__} without a network.")
    if pipe._value_range is not None:
        say(f"images: {spell_values(pipe._value_range)}")
    statistics = getattr(pipe, "_condition_statistics", None)
    if statistics is not None:
        say(f"conditions: {', '.join(f'{name} {values}' for name, values in statistics.ranges.items())}")
    for name, network in networks.items():
        output = args.output
        if len(networks) > 1:
            output = output.with_stem(f"{output.stem}-{name}")
        with refusals():
            rows = summarize(network, args.leaves)
            parts = stages(network)
        total = sum(row.parameters for row in rows)
        table = [("layer", "type", "output", "parameters")]
        table += [
            (row.name, row.type, "x".join(map(str, row.shape)) if row.shape else "-", f"{row.parameters:,}")
            for row in rows
        ]
        say(f"{name}: {type(network).__name__}, {total:,} parameters\n\n{_format(table)}\n")
        draw_network(parts, f"{type(network).__name__}, {total:,} parameters", output)
        say(f"wrote {output}")


def _format(table: list[tuple[str, ...]]) -> str:
    """Aligns the columns of a table, the last one to the right; its first row is the head."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)]
        lines.append("  ".join([*cells, row[-1].rjust(widths[-1])]))
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
