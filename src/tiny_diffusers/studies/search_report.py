"""The results of a search: a table, the same as JSON, pictures, and the best trial as a recipe."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .. import __version__
from ..errors import UserError, code_block, first_line, markdown
from ..files import load_json, read_text, replace_file, replacing
from .search_plan import VAL_LOSS, SearchPlan, show, spell
from .search_plots import draw_history, draw_importances, draw_parallel_coordinates


if TYPE_CHECKING:
    import optuna

# Fewer trials say nothing about importances
MIN_TRIALS_OF_IMPORTANCES = 4

# Of a file that may be a stranger's
_FORM = {
    **dict.fromkeys(("recipe", "script", "command", "objective"), str),
    "lower_is_better": bool,
    "ranges": dict,
    "trials": list,
}
_MAX_RANGES = 100

_PICTURES = {
    "parallel_coordinates.png": (draw_parallel_coordinates, "A line a trial, through its settings to its result."),
    "history.png": (draw_history, "The trials in the order of their numbers, and the best so far."),
    "importances.png": (
        draw_importances,
        "The share of the variance of the finished trials' results that each setting explains (fANOVA).",
    ),
}


def describe(plan: SearchPlan, study: "optuna.Study", command: str, with_importances: bool) -> dict[str, Any]:
    """
    Returns the content of `search.json`, which has all that the table and the pictures show.

    Args:
        plan ([`SearchPlan`]): What is searched.
        study (`optuna.Study`): The trials.
        command (`str`): The command line.
        with_importances (`bool`): Compute the importances as well, which takes longer than the rest.
    """
    arguments = plan.arguments
    trials = [_describe_trial(plan, entry) for entry in study.get_trials(deepcopy=False)]
    finished = [trial for trial in trials if trial["outcome"] == "finished"]
    sign = 1 if arguments.lower_is_better else -1
    best = min(finished, key=lambda trial: sign * trial["value"], default=None)
    return {
        "recipe": plan.recipe.name,
        "script": plan.script,
        "command": command,
        "objective": arguments.objective,
        "lower_is_better": arguments.lower_is_better,
        "length": arguments.length,
        "ranges": {name: entry.describe() for name, entry in plan.ranges.items()},
        "trials": trials,
        "best": best and best["trial"],
        "importances": _importances(plan, study) if with_importances else None,
        "versions": {"tiny-diffusers": __version__},
    }


def _describe_trial(plan: SearchPlan, entry: "optuna.trial.FrozenTrial") -> dict[str, Any]:
    attributes, losses = entry.user_attrs, list(entry.intermediate_values.values())
    outcome = outcome_of(entry)
    sign = 1 if plan.arguments.lower_is_better else -1
    return {
        "trial": entry.number,
        "outcome": outcome,
        "value": sign * entry.value if outcome == "finished" else None,
        "val_loss": min(losses, default=None),
        "flags": {name: _as_json(plan.ranges[name].value_of(value)) for name, value in entry.params.items()},
        "steps": attributes.get("steps"),
        "seconds": attributes.get("seconds"),
        "note": attributes.get("note"),
        "val_losses": losses,
    }


def outcome_of(entry: "optuna.trial.FrozenTrial") -> str:
    """Returns how a trial has ended. One that was killed while its end was written down is still running."""
    return entry.user_attrs.get("outcome", "running") if entry.state.is_finished() else "running"


def _as_json(value: Any) -> Any:
    return value if isinstance(value, list) else spell(value)


def _importances(plan: SearchPlan, study: "optuna.Study") -> dict[str, float]:
    """Returns the importance of each flag, the largest first; empty if there are too few trials."""
    import optuna

    values = {trial.value for trial in study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])}
    if len(values) < MIN_TRIALS_OF_IMPORTANCES:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=plan.arguments.sampler_seed)
    importances = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {name: float(value) for name, value in importances.items()}


def write_table(results: dict[str, Any], plan: SearchPlan, folder: Path) -> None:
    """Writes `search.json`, `README.md` and, if a trial has finished, `best.yaml`."""
    replace_file(folder / "search.json", json.dumps(results, indent=2, allow_nan=False) + "\n")
    replace_file(folder / "README.md", _markdown(results))
    if results["best"] is not None:
        replace_file(folder / "best.yaml", _best_recipe(results, plan))


def write_pictures(results: dict[str, Any], folder: Path) -> None:
    """Draws the pictures of a search from its results, where a trial has finished."""
    if results["best"] is not None:
        for name, (draw, _) in _PICTURES.items():
            draw(results, folder / name)


def show_again(file: Path) -> Path:
    """
    Writes `README.md` and the pictures of a `search.json`, which may be a stranger's, beside it, from that file alone.
    There are pictures only of a search that has ended.

    Raises:
        UserError: If there is no such file, or if it holds anything else.
    """
    if not file.is_file():
        raise UserError(f"There is no file '{file}'.")
    with tempfile.TemporaryDirectory() as drawn:
        try:
            results = load_json(read_text(file))
            _check_form(results)
            text = _markdown(results)
            if results["importances"] is not None:
                write_pictures(results, Path(drawn))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError) as error:
            raise UserError(f"'{file}' is not a search's file, or it is damaged ({first_line(error)}).") from error
        for picture in Path(drawn).iterdir():
            with replacing(file.parent / picture.name) as staging:
                shutil.copyfile(picture, staging)
    replace_file(file.parent / "README.md", text)
    return file.parent


def _check_form(results: dict[str, Any]) -> None:
    """Raises a ValueError if a file's content is not what [`describe`] returns, as far as table and pictures need it."""
    json.dumps(results, allow_nan=False)
    for name, kind in _FORM.items():
        if not isinstance(results.get(name), kind):
            raise ValueError(f"its {name} is no {kind.__name__}")
    if not 0 < len(results["ranges"]) <= _MAX_RANGES or len(results["importances"] or ()) > _MAX_RANGES:
        raise ValueError(f"its ranges must be 1 to {_MAX_RANGES}")
    finished = [trial["trial"] for trial in results["trials"] if trial["outcome"] == "finished"]
    if results["best"] not in (finished or [None]):
        raise ValueError("its best is no trial that has finished")


def _markdown(results: dict[str, Any]) -> str:
    trials = sorted(results["trials"], key=lambda trial: _rank(results, trial))
    outcomes = [trial["outcome"] for trial in trials]
    counts = {outcome: outcomes.count(outcome) for outcome in dict.fromkeys(outcomes)}
    parts = [
        f"# Search of {markdown(results['recipe'])}",
        code_block(results["command"], "bash"),
        f"{len(trials)} trials: {', '.join(f'{count} {outcome}' for outcome, count in counts.items())}. The best is first; "
        f"{'lower' if results['lower_is_better'] else 'higher'} {results['objective']} is better"
        f"{', the lowest of each run' if results['objective'] == VAL_LOSS else ''}.",
        _table(results, trials),
    ]
    if results["best"] is not None:
        parts += [
            "The best settings, in the recipe's own length:",
            code_block(f"tiny-diffusers train {results['script']} --config best.yaml", "bash"),
            "Each trial is one run from one seed: train settings that are close again with other seeds before you choose.",
        ]
    if results["best"] is not None and results["importances"] is not None:  # it is complete, and has its pictures
        parts += [f"![{name}]({name})\n\n{caption}" for name, (_, caption) in _PICTURES.items()]
    return "\n\n".join(parts) + "\n"


def _rank(results: dict[str, Any], trial: dict[str, Any]) -> tuple:
    """Returns what the rows are sorted by: finished trials, the best first, then pruned, failed and running ones."""
    order = ("finished", "pruned", "failed", "running").index(trial["outcome"])
    value = trial["val_loss"] if trial["value"] is None else trial["value"]
    sign = 1 if results["lower_is_better"] or trial["value"] is None else -1
    return order, value is None, sign * (value or 0), trial["trial"]


def _table(results: dict[str, Any], trials: list[dict[str, Any]]) -> str:
    metrics = list(dict.fromkeys([results["objective"], VAL_LOSS]))
    names = list(results["ranges"])
    header = ["trial", "outcome", *metrics, *names, "steps", "seconds"]
    lines = [" | ".join(header), " | ".join("---" if name in ("outcome", *names) else "---:" for name in header)]
    for trial in trials:
        values = {results["objective"]: trial["value"], VAL_LOSS: trial["val_loss"]}
        cells = [trial["trial"], trial["outcome"] + (f": {trial['note']}" if trial["note"] else "")]
        cells += [values[name] for name in metrics] + [trial["flags"].get(name) for name in names]
        lines.append(" | ".join(markdown(show(cell)) for cell in [*cells, trial["steps"], trial["seconds"]]))
    return "\n".join(f"| {line} |" for line in lines)


def _best_recipe(results: dict[str, Any], plan: SearchPlan) -> str:
    best = results["trials"][results["best"]]
    length = "".join(f" with --{name} {value}" for name, value in results["length"].items())
    title = (
        f"# Trial {best['trial']} of the search of {results['recipe']}: {results['objective']} {best['value']:.5g}"
        f"{length}, the best of {len(results['trials'])}.\n"
    )
    return title + "\n" + yaml.safe_dump(plan.best_recipe(best["flags"]), sort_keys=False, default_flow_style=None)
