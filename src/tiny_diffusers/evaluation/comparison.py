"""Tables that put several checkpoints side by side: their metrics, and for runs their settings and losses as well."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError, markdown
from ..runs import RunFolder, read_log
from ..zoo import find_published
from .report import BASELINE_NAMES, FIGURES, Report, format_figure, format_table


# Settings that say where a run is and how it is watched: they are none of a comparison.
_NO_SETTINGS = (
    "resolved",  # the names of those that the run itself resolved
    *("output_dir", "logging_dir", "cache_dir", "report_to", "local_rank", "num_threads", "dataloader_num_workers"),
    *("push_to_hub", "hub_model_id", "hub_private_repo", "license"),
)


def check_comparable(reports: dict[str, Report]) -> None:
    """
    Checks that all reports were measured in the same way.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If two were not; it names the first difference.
    """
    for (first_name, first), (name, other) in itertools.combinations(reports.items(), 2):
        # The same images and weights may come from different places, and the same training may round differently. What
        # bits/dim are given, a note says.
        ignored = {"load", "file", "name", "accuracy", "likelihood_given", "likelihood_kind"}
        if not ("nearest_neighbor" in first.figures and "nearest_neighbor" in other.figures):
            ignored.add("training")
        if not ("bits_per_dim" in first.figures and "bits_per_dim" in other.figures):
            ignored |= {"likelihood_images", "likelihood_levels"}
        if not ("classifier_score" in first.figures and "classifier_score" in other.figures):
            ignored.add("classifier")
        one, two = (
            {"report version": report.format, "kind": report.kind, **report.measured_by} for report in (first, other)
        )
        difference = _difference(one, two, ignored)
        if difference is not None:
            key, a, b = difference
            raise UserError(
                f"'{first_name}' and '{name}' cannot be compared: their {key} differ, {a} and {b}. Evaluate both with "
                "the same protocol."
            )


def compare(reports: dict[str, Report]) -> str:
    """
    Puts several reports into one Markdown table, a row for each.

    Args:
        reports (`dict[str, Report]`): name -> report.

    Returns:
        `str`: The table, below one line that states the common protocol.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If two were measured differently; it names the first difference.
    """
    check_comparable(reports)
    first = next(iter(reports.values()))
    rows = {
        f"{name} ({report.sampling})" if report.sampling else name: report.figures for name, report in reports.items()
    }
    rows |= {BASELINE_NAMES[name]: entry["figures"] for name, entry in first.baselines.items()}
    return f"{first.images} {first.against}.\n\n{format_table(first, rows, '')}\n{_note_on_likelihoods(reports)}"


def _note_on_likelihoods(reports: dict[str, Report]) -> str:
    """Returns a note for below a table, if its bits/dim are given different things; none if not."""
    given = {name: report.likelihood_given for name, report in reports.items() if "bits_per_dim" in report.figures}
    if len({tuple(each) for each in given.values()}) < 2:
        return ""
    words = [f"{markdown(name)} {markdown(', '.join(each) or 'nothing')}" for name, each in given.items()]
    return f"\n**Note:** Bits/dim are no ranking here, as what is given of each image differs: {'; '.join(words)}.\n"


def _difference(a: Any, b: Any, ignored: set[str], where: str = "") -> tuple[str, Any, Any] | None:
    """Returns the first key at which two nested dicts differ, and the two values; None if they are equal."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted((a.keys() | b.keys()) - ignored):
            found = _difference(a.get(key), b.get(key), ignored, f"{where} {key}".strip())
            if found is not None:
                return found
        return None
    return None if a == b else (where, a, b)


def tabulate_runs(folders: Sequence[str], all_settings: bool = False) -> str:
    """
    Puts runs into one Markdown table: the settings that differ, parameters, seconds, losses, and the metrics of those
    that are evaluated.

    Args:
        folders (`list[str]`): Output folders of the train scripts, or names of published models; of a run with several
            reports, one of these.
        all_settings (`bool`): Show the settings that are the same in all runs as well.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If a folder is none of a run, or if two reports were measured differently.
    """
    found = {name: _find_run(Path(find_published(name))) for name in dict.fromkeys(folders)}
    runs = {name: run for name, (run, _) in found.items()}
    settings = {name: _settings(run) for name, run in runs.items()}
    names = list(dict.fromkeys(key for values in settings.values() for key in values if key not in _NO_SETTINGS))
    same = [key for key in names if len({repr(values.get(key)) for values in settings.values()}) == 1]
    shown = names if all_settings else [key for key in names if key not in same]
    reports = {name: Report.load(path) for name, (_, path) in found.items() if path.is_file()}
    check_comparable(reports)
    figures = [key for key in FIGURES if any(key in report.figures for report in reports.values())]

    rows = {name: [_plain(settings[name].get(key)) for key in shown] + _results(run) for name, run in runs.items()}
    for name, row in rows.items():
        metrics = reports[name].figures if name in reports else {}
        row += [format_figure(metrics.get(key)) for key in figures]
    first = next(iter(reports.values()), None)
    results = ["parameters", "seconds", "training loss, last", "validation loss, lowest"]
    head = ["run", *shown, *results, *(first.label(key) for key in figures)]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *([name, *row] for name, row in rows.items())]
    table = "\n".join("| " + " | ".join(map(markdown, line)) + " |" for line in lines)
    caption = f"{first.images} {first.against}.\n\n" if first is not None else ""
    hidden = len(names) - len(shown)
    footer = f"\n{hidden} settings are the same in all runs.\n" if hidden else ""
    return f"{caption}{table}\n{_note_on_likelihoods(reports)}{footer}"


def _find_run(path: Path) -> tuple[RunFolder, Path]:
    """Returns the run that a folder is, or that a report is of, and the file of its report, if there is one."""
    run, place = RunFolder(path), path.resolve()
    report = place if place.name == "report.json" else place / "report.json"
    if not run.config.is_file() and report.is_file() and report.parents[1].name == "reports":
        return RunFolder(report.parents[2]), report
    return run, run.find_report()


def _settings(run: RunFolder) -> dict[str, Any]:
    """Returns a run's settings, as its `config.yaml` has them."""
    if not run.config.is_file():
        raise UserError(f"'{run.path}' has no config.yaml: --settings takes the folders of runs, and reports in them.")
    return run.read_config()


def _results(run: RunFolder) -> list[str]:
    """Returns the parameters of all networks, the seconds of training, and the losses, as cells."""
    facts = run.read_facts()
    parameters = facts.get("parameters")
    counts = parameters.values() if isinstance(parameters, dict) else ()
    total = sum(count for count in counts if isinstance(count, int))
    seconds = facts.get("seconds")
    series = read_log(run.log) if run.log.is_file() else {}
    training, validation = series.get("loss"), series.get("val_loss")
    return [
        f"{total:,}" if total else "–",
        f"{seconds:,.0f}" if seconds is not None else "–",
        f"{training[1][-1]:.4g}" if training is not None else "–",
        f"{validation[1].min():.4g} (step {validation[0][validation[1].argmin()]:,})"
        if validation is not None
        else "–",
    ]


def _plain(value: Any) -> str:
    """Returns a setting as a cell."""
    if value is None:
        return "–"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
