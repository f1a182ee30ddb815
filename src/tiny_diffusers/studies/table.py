"""The `README.md` of a study: its table, what can be told from it, and its pictures."""

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import markdown
from ..evaluation.report import BASELINE_NAMES, BASELINES, FIGURES, arrow, figure_label, format_figure
from ..files import replace_file
from ..training.arguments import LENGTHS
from .results import (
    Rows,
    Sampler,
    find_winner,
    floor_of,
    group,
    list_samplers,
    list_scripts,
    lowest_loss,
    mean_of,
    value_of,
    why_not_compared,
)


def write_table(content: dict[str, Any], pictures: Mapping[str, list[Path]], folder: Path) -> Path:
    """
    Writes `README.md`.

    Args:
        content (`dict`): Of `study.json`.
        pictures (`Mapping`): Images of a group -> its pictures, which lie in `folder`.
        folder (`Path`): The folder of the study.
    """
    asked, rows = content["asked"], content["rows"]
    parts = [f"# Study of `{markdown(asked['recipe'])}`", _introduction(content)]
    groups = group(rows)
    for data, cells in groups.items():
        if len(groups) > 1:
            parts.append(f"## {markdown(data)}")
        parts += _section(content, cells)
        parts += [f"![{path.stem.replace('_', ' ')}]({path.name})" for path in pictures.get(data, [])]
    if not rows:
        parts.append("Nothing is measured yet.")
    text = "\n\n".join(part for part in parts if part) + "\n"
    replace_file(folder / "README.md", text)
    return folder / "README.md"


def _introduction(content: dict[str, Any]) -> str:
    asked, rows = content["asked"], content["rows"]
    seeds = sorted({int(row["seed"]) for row in rows})
    minutes = None
    if asked["train flags"].keys().isdisjoint(LENGTHS):
        minutes = asked["budget"] or asked["max_train_minutes"] or asked["settings"].get("max_train_minutes")
    lines = [
        f"{len({row['cell'] for row in rows})} of the {len(asked['grid'])} cells, trained by "
        + ", ".join(
            f"`tiny-diffusers train {_code(script)}`" for script in list_scripts(asked, rows) or [asked["script"]]
        )
        + (f" for {minutes:g} minutes each" if minutes else "")
        + f" with the seed{'s' if len(seeds) != 1 else ''} {', '.join(map(str, seeds)) or 'none'}."
    ]
    changed = {name: value for name, value in asked["train flags"].items() if value is not None}
    if changed:
        lines.append(f"Beside the recipe: {_settings(changed)}.")
    narrowed = {cell: options for cell, options in content["networks"].items() if options}
    if narrowed:
        widths = {" ".join(map(str, options["block_out_channels"])) for options in narrowed.values()}
        which = "" if len(narrowed) == len(content["networks"]) else f" of {', '.join(narrowed)}"
        lines.append(
            f"**Narrower networks than the recipe's**{markdown(which)}, for a budget of "
            f"{asked['budget']:g} minutes: widths "
            f"{markdown(', '.join(sorted(widths)))}."
        )
    return "\n".join(lines)


def _code(value: Any) -> str:
    """Spells a value between two backticks."""
    return markdown(" ".join(map(str, value)) if isinstance(value, list) else str(value)).replace("`", "'")


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"`{_code(name)} {_code(value)}`" for name, value in settings.items())


def _changes(cells: Iterable[str], grid: Mapping[str, Mapping[str, Any]]) -> str:
    """Lists what each cell changes."""
    return "\n".join(f"- {markdown(cell)}: {_settings(grid[cell]) or 'the recipe'}" for cell in cells)


def _section(content: dict[str, Any], cells: Mapping[str, Rows]) -> list[str]:
    """Returns the tables of the cells with the same images, and what can be told from them."""
    metric, protocol = content["main_metric"], content["asked"]["protocol"]
    label, samplers = markdown(figure_label(metric, protocol["features"])), list_samplers(_all(cells))
    measured = next((row for row in _all(cells) if "against" in row), None)
    parts = []
    if measured is not None:
        parts.append(f"**{label}**{arrow(metric)}: {markdown(measured['against'])}.")
    shows_losses = len(list_scripts(content["asked"], _all(cells))) == 1
    parts.append(_main_table(cells, samplers, metric, shows_losses))
    parts.append(_changes(cells, content["asked"]["grid"]))
    parts.append(_failures(cells))
    if measured is None:
        return parts
    parts.append(_explain_errors(cells, samplers, metric))
    parts.append(_verdict(cells, samplers, metric, label))
    parts.append(_other_table(cells, samplers, metric, protocol["features"]))
    return parts + _notes(cells)


def _notes(cells: Mapping[str, Rows]) -> list[str]:
    """Returns the warnings of the reports, with the cells' names where they are not of all."""
    measured = {name: [row["warnings"] for row in rows if "warnings" in row] for name, rows in cells.items()}
    measured = {name: dict.fromkeys(found[0]) for name, found in measured.items() if found}  # of the first seed
    notes = []
    for warning in dict.fromkeys(itertools.chain.from_iterable(measured.values())):
        names = [name for name, warnings in measured.items() if warning in warnings]
        where = "" if len(names) == len(measured) else f" ({', '.join(map(markdown, names))})"
        notes.append(f"**Note{where}:** {markdown(warning)}")
    return notes


def _all(cells: Mapping[str, Rows]) -> Rows:
    return [row for rows in cells.values() for row in rows]


def _main_table(cells: Mapping[str, Rows], samplers: list[Sampler], metric: str, shows_losses: bool) -> str:
    facts = ["parameters", "steps", "seconds", *(["validation loss"] if shows_losses else [])]
    head = ["cell", *facts, *(markdown(str(each)) for each in samplers)]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    values = {sampler: {name: value_of(rows, sampler, metric) for name, rows in cells.items()} for sampler in samplers}
    winners = {sampler: find_winner(values[sampler], metric) for sampler in samplers}
    for name, rows in cells.items():
        known = [mean_of(rows, fact) for fact in facts[:3]]
        words = ["–" if fact is None else f"{fact.value:,.0f}" for fact in known]
        if shows_losses:
            loss = lowest_loss(rows)
            words.append(format_figure(None if loss is None else loss.as_dict()))
        for sampler in samplers:
            value = values[sampler][name]
            text = format_figure(None if value is None else value.as_dict())
            words.append(f"**{text}**" if winners[sampler] == name else text)
        lines.append(f"| {markdown(name)} | " + " | ".join(words) + " |")
    for baseline in BASELINES:
        floor = floor_of(cells, metric, baseline)
        if floor is not None:
            words = ["–"] * len(facts) + [format_figure(floor)] * len(samplers)
            lines.append(f"| *{BASELINE_NAMES[baseline]}* | " + " | ".join(words) + " |")
    return "\n".join(lines)


def _failures(cells: Mapping[str, Rows]) -> str:
    """Lists what went wrong: each error of a run once, with the samplers that it concerns unless it concerns all of them."""
    lines = []
    for row in _all(cells):
        run = f"- {markdown(row['cell'])}, seed {int(row['seed'])}"
        if row["state"] == "failed":
            lines.append(f"{run}, **failed**: {markdown(row['error'])}")
        measured = row.get("measured", [])
        met_with: dict[str, list[str]] = {}  # error -> samplers
        for entry in measured:
            if "error" in entry:
                met_with.setdefault(entry["error"], []).append(str(Sampler.of(entry)))
        for error, names in met_with.items():
            which = "" if len(names) == len(measured) else f", {markdown(', '.join(names))}"
            lines.append(f"{run}{which}, not measured: {markdown(error)}")
    return "\n".join(lines)


def _explain_errors(cells: Mapping[str, Rows], samplers: list[Sampler], metric: str) -> str:
    values = [value_of(rows, sampler, metric) for rows in cells.values() for sampler in samplers]
    seeds = {value.seeds for value in values if value is not None and value.error is not None}
    sentences = []
    if seeds - {1}:
        sentences.append("± is the standard error over the seeds.")
    if 1 in seeds:
        entries = [e for row in _all(cells) for e in row.get("measured", [])]
        kinds = {e["figures"][metric]["error_kind"] for e in entries if metric in e.get("figures", {})}
        sentences.append(
            f"{'With one seed it' if seeds - {1} else '±'} is the {markdown('; '.join(sorted(filter(None, kinds))))}. Training with "
            "another seed may move a metric by more."
        )
    return " ".join(sentences)


def _verdict(cells: Mapping[str, Rows], samplers: list[Sampler], metric: str, label: str) -> str:
    """Says which cell is best with each sampler, if it is clear of the error of each other."""
    if len(cells) < 2 or FIGURES[metric][2] is None:
        return ""
    lines = []
    for sampler in samplers:
        values = {name: value_of(rows, sampler, metric) for name, rows in cells.items()}
        known = {name: value for name, value in values.items() if value is not None}
        if len(known) < 2:
            continue
        winner = find_winner(values, metric)
        where = "" if str(sampler) == "samples" else f" ({markdown(str(sampler))})"
        if winner is not None:
            lines.append(f"- {label}{where}: **{markdown(winner)}** is best, clear of the error of every other cell.")
            continue
        best = (min if FIGURES[metric][2] else max)(known, key=lambda name: known[name].value)
        reason = (
            why_not_compared(known.values())
            or f"the best value, of {markdown(best)}, is not clear of the others' error"
        )
        lines.append(f"- {label}{where}: no winner: {reason}.")
    return "\n".join(lines)


def _other_table(cells: Mapping[str, Rows], samplers: list[Sampler], metric: str, features: str) -> str:
    """Returns the table of all other metrics: of one cell with each sampler, of several with the last that measured any."""
    others = [name for name in FIGURES if name != metric]
    known = [
        each for each in samplers if any(value_of(rows, each, name) for rows in cells.values() for name in others)
    ]
    if not known:
        return ""
    last = known[-1]
    measured = {cell: (rows, last) for cell, rows in cells.items()}
    head = str(last)
    if len(cells) == 1:
        (head, rows), *_ = cells.items()
        measured = {str(sampler): (rows, sampler) for sampler in samplers}
    names = [name for name in others if any(value_of(*m, name) for m in measured.values())]
    lines = [
        f"| {markdown(head)} | " + " | ".join(figure_label(name, features) + arrow(name) for name in names) + " |",
        "| --- |" + " ---: |" * len(names),
    ]
    for label, row in measured.items():
        values = [value_of(*row, name) for name in names]
        words = [format_figure(None if value is None else value.as_dict()) for value in values]
        lines.append(f"| {markdown(label)} | " + " | ".join(words) + " |")
    for baseline in BASELINES:
        floor = [floor_of(cells, name, baseline) for name in names]
        if any(floor):
            lines.append(f"| *{BASELINE_NAMES[baseline]}* | " + " | ".join(map(format_figure, floor)) + " |")
    return "\n".join(lines)
