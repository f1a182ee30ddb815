"""Table of runs: their settings, losses and metrics, a row for each run."""

from collections.abc import Sequence
from typing import Any

from ..errors import UserError, markdown
from ..runs import RunFolder, read_log
from .report import FIGURES, Report, check_comparable, format_figure


# Settings that say where a run is and how it is watched: they are none of a comparison.
_NO_SETTINGS = (
    "resolved",  # the names of those that the run itself resolved
    *("output_dir", "logging_dir", "cache_dir", "report_to", "local_rank", "num_threads", "dataloader_num_workers"),
    *("push_to_hub", "hub_model_id", "hub_private_repo", "license"),
)


def tabulate_runs(folders: Sequence[str], all_settings: bool = False) -> str:
    """
    Puts runs into one Markdown table: the settings that differ, parameters, seconds, losses, and the metrics of those
    that are evaluated.

    Args:
        folders (`list[str]`): Output folders of the train scripts.
        all_settings (`bool`): Show the settings that are the same in all runs as well.

    Raises:
        [`~tiny_diffusers.errors.UserError`]: If a folder is none of a run, or if two reports were measured differently.
    """
    runs = {name: RunFolder(name) for name in dict.fromkeys(folders)}
    settings = {name: _settings(run) for name, run in runs.items()}
    names = list(dict.fromkeys(key for values in settings.values() for key in values if key not in _NO_SETTINGS))
    same = [key for key in names if len({repr(values.get(key)) for values in settings.values()}) == 1]
    shown = names if all_settings else [key for key in names if key not in same]
    found = {name: run.find_report() for name, run in runs.items()}
    reports = {name: Report.load(path) for name, path in found.items() if path.is_file()}
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
    return f"{caption}{table}\n" + (f"\n{hidden} settings are the same in all runs.\n" if hidden else "")


def _settings(run: RunFolder) -> dict[str, Any]:
    """Returns a run's settings, as its `config.yaml` has them."""
    if not run.config.is_file():
        raise UserError(f"'{run.path}' has no config.yaml: --settings is for the folders of runs.")
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
