"""The plan of a search: a recipe's `search:` section, checked against the train script's flags before work starts."""

import dataclasses
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ..errors import UserError, unknown
from ..evaluation.report import FIGURES, Protocol, metric_of
from ..flags import FlagParser, Flags, as_flags, flag
from ..training.arguments import LENGTHS, UNSAVED, load_cells, load_section, parse_arguments
from ..training.recipes import script_of
from .settings import SAMPLERS, SAMPLING, StudyArguments, check_conditions, check_family
from .training import OWN_FLAGS, arguments_class, fix_validation


if TYPE_CHECKING:
    import optuna

logger = logging.getLogger(__name__)

VAL_LOSS = "val_loss"
# Flags that change what the validation loss measures
_LOSS_FLAGS = (
    *("prediction_type", "loss_type", "huber_delta", "huber_schedule", "snr_gamma", "timestep_distribution"),
    *("ddpm_num_steps", "ddpm_beta_schedule", "beta_start", "beta_end", "reconstruction", "kl_weight", "num_levels"),
    *("dataset_name", "train_data_dir", "classes", "resolution", "channels", "value_range"),
    *("validation_split", "max_validation_samples"),
)


@dataclass(frozen=True)
class SearchArguments(Flags):
    """The values of a `search:` section. Each is a flag of `tiny-diffusers search` as well, which wins."""

    script: str | None = flag(None, "Train script of the recipe, if its name does not begin with it.")
    cell: str | None = flag(None, "Cell of the recipe's grid that the trials start from, if it has one.")
    trials: int = flag(20, "Number of trials, with those of earlier calls.", within="[1, 100000]")
    objective: str = flag(VAL_LOSS, "val_loss, the lowest of a run, or a metric of evaluate.")
    max_train_steps: int | None = flag(
        None, "Optimizer steps of a trial; the recipe's if not given.", within="[1, inf)"
    )
    max_train_minutes: float | None = flag(None, "Minutes of a trial, in place of steps.", within="(0, inf)")
    n_startup_trials: int = flag(
        10, "Trials that are drawn at random, and that finish before one is pruned.", within="[1, inf)"
    )
    prune: bool = flag(True, "Stop a trial whose validation loss is above the median of the others'.")
    sampler_seed: int = flag(0, "Seed of the suggestions; --seed is that of each run.", within="[0, inf)")

    def __post_init__(self):
        super().__post_init__()
        if self.max_train_steps is not None and self.max_train_minutes is not None:
            raise UserError(
                f"--max_train_steps {self.max_train_steps} --max_train_minutes {self.max_train_minutes:g}: give one of "
                "them."
            )
        allowed = [VAL_LOSS, *(name for name, (*_, lower_is_better) in FIGURES.items() if lower_is_better is not None)]
        if self.objective not in allowed:
            raise unknown("objective", self.objective, allowed)

    @property
    def lower_is_better(self) -> bool:
        return self.objective == VAL_LOSS or FIGURES[self.objective][-1]

    @property
    def length(self) -> dict[str, Any]:
        """The length of a trial, as a flag; empty if the recipe says it."""
        return {name: getattr(self, name) for name in LENGTHS[:2] if getattr(self, name) is not None}


@dataclass(frozen=True)
class Range:
    """
    Values of one flag to search among: some choices, or an interval of numbers.

    Args:
        name (`str`): The flag.
        choices (`list`): Its values; empty for an interval.
        low (`float`), high (`float`): Ends of the interval, both included.
        log (`bool`): Search on a logarithmic scale.
        step (`float`, *optional*): Distance of neighboring values from `low` on.
    """

    name: str
    choices: list[Any] = dataclasses.field(default_factory=list)
    low: float = 0
    high: float = 0
    log: bool = False
    step: float | None = None

    def suggest(self, trial: "optuna.Trial") -> Any:
        """Returns the value of a trial, drawn when it is asked for the first time."""
        if self.choices:
            return self.value_of(trial.suggest_categorical(self.name, [spell(choice) for choice in self.choices]))
        if isinstance(self.low, int):
            return trial.suggest_int(self.name, self.low, self.high, step=self.step or 1, log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log)

    def value_of(self, param: Any) -> Any:
        """Returns the value of the flag for a parameter of Optuna's, which has no lists."""
        return next((choice for choice in self.choices if spell(choice) == param), param)

    def describe(self) -> dict[str, Any]:
        if self.choices:
            return {"choices": [choice if isinstance(choice, list) else spell(choice) for choice in self.choices]}
        return {name: getattr(self, name) for name in ("low", "high", "log", "step")}


def spell(value: Any) -> Any:
    """Spells a list, and a number that JSON lacks, in one word, as it would be typed; other values stay."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def show(value: Any) -> str:
    """Spells a value for people: numbers with four digits, and nothing for None."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(spell(value))


@dataclass(frozen=True)
class SearchPlan:
    """
    What is searched, and how.

    Args:
        recipe (`Path`): The recipe.
        script (`str`): As in `tiny-diffusers train SCRIPT`.
        arguments ([`SearchArguments`]): From the section and the command line.
        ranges (`dict[str, Range]`): flag -> the values to search among.
        protocol (`dict[str, Any]`): Flags of `evaluate`, for an objective that it measures.
        base (`dict[str, Any]`): The recipe's values, with those of the cell.
        given (`dict[str, Any]`): Train flags on the command line.
    """

    recipe: Path
    script: str
    arguments: SearchArguments
    ranges: dict[str, Range]
    protocol: dict[str, Any]
    base: dict[str, Any]
    given: dict[str, Any]

    def train_flags(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the flags of a trial's run for the values that it tries."""
        flags = {"config": str(self.recipe)} | ({"cell": self.arguments.cell} if self.arguments.cell else {})
        asked = {*self.base, *self.given, *values}
        if not asked & {"save_images_steps", "save_images_epochs"}:
            flags["save_images_steps"] = 0  # the last grid is enough
        if "checkpoints_total_limit" not in asked:
            flags["checkpoints_total_limit"] = 1
        flags |= {**self.given, **self.arguments.length, **values}
        return flags | fix_validation(parse_arguments(arguments_class(self.script), as_flags(flags)))

    def evaluate_flags(self) -> dict[str, Any]:
        """Returns the flags of `evaluate` that measure the objective."""
        objective = self.arguments.objective
        metrics = {} if objective == VAL_LOSS else {"metrics": metric_of(objective)}
        return {**metrics, "baselines": "none", **self.protocol}

    def identity(self) -> dict[str, Any]:
        """Returns all that makes it this search, and no other: a folder holds trials of one only."""
        arguments = dataclasses.asdict(self.arguments)
        del arguments["trials"]  # more may be asked for later
        identity = {**arguments, "script": self.script, "protocol": self.protocol}
        identity |= {f"range of {name}": entry.describe() for name, entry in self.ranges.items()}
        identity |= {f"recipe's {name}": value for name, value in self.base.items()}
        return identity | {f"--{name}": value for name, value in self.given.items()}

    def best_recipe(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the recipe with the values of a trial in it, in the recipe's own length unless that was searched."""
        given = {name: value for name, value in self.given.items() if name not in (*UNSAVED, *LENGTHS)}
        changes = {**given, **values}
        fields = [field for field in dataclasses.fields(arguments_class(self.script)) if field.name in changes]
        replaced = {name for field in fields for name in field.metadata["replaces"]}
        return {name: value for name, value in self.base.items() if name not in replaced} | changes


def read_plan(recipe: Path, flags: Mapping[str, Any], train_argv: list[str]) -> SearchPlan:
    """
    Reads the plan of a search, and checks each of its values as the train script would.

    Args:
        recipe (`Path`): A recipe with a `search:` section.
        flags (`Mapping[str, Any]`): Values of [`SearchArguments`] from the command line, which win over the section.
        train_argv (`list[str]`): Flags of the train script, which win over the recipe.

    Raises:
        UserError: If the recipe has no such section, or if a key, flag or value in it is unknown or out of range.
    """
    section = load_section(recipe, "search")
    base = _read_base(recipe, flags.get("cell") or section.get("cell"))
    script = script_of(recipe, base.pop("script", None) or flags.get("script") or section.get("script"))
    train_class = arguments_class(script)
    given = FlagParser(train_class, prog="tiny-diffusers search").given(train_argv)
    if "budget" in given:
        raise UserError(
            "--budget: each trial would have widths of its own: give --max_train_minutes, and --block_out_channels."
        )
    for name in given:
        if name in OWN_FLAGS:
            raise UserError(f"--{name}: a search sets it for each run itself; leave it out.")
    arguments = _read_arguments(recipe, section, flags, given)
    plan = SearchPlan(recipe, script, arguments, {}, _read_protocol(recipe, section), base, given)
    settings = parse_arguments(train_class, as_flags(plan.train_flags({})))
    if arguments.objective == VAL_LOSS and settings.validation_split == 0:
        raise UserError(
            f"{recipe}: the objective is val_loss, but no images are held out (validation_split: 0): hold some out, or "
            "give a metric of evaluate as objective."
        )
    plan = dataclasses.replace(plan, ranges=_read_ranges(plan, section.get("ranges")))
    changing = [name for name in plan.ranges if name in _LOSS_FLAGS]
    if changing and arguments.objective == VAL_LOSS:
        logger.warning(
            f"{', '.join(changing)} changes what the validation loss measures: losses of different values cannot be "
            "compared. Take a metric of evaluate as objective, such as frechet_distance."
        )
    return plan


def _read_arguments(
    recipe: Path, section: Mapping[str, Any], flags: Mapping[str, Any], given: Mapping[str, Any]
) -> SearchArguments:
    names = [field.name for field in dataclasses.fields(SearchArguments)]
    for name in section:
        if name not in (*names, "ranges", "protocol"):
            raise unknown(f"key in search: of {recipe}", name, (*names, "ranges", "protocol"))
    values = {name: section[name] for name in names if name in section}
    if not {*flags, *given}.isdisjoint(LENGTHS):  # a length on the command line replaces the section's
        values = {name: value for name, value in values.items() if name not in LENGTHS}
    _check_values(recipe, values)
    try:
        parsed = FlagParser(SearchArguments).given(as_flags(values))
        return SearchArguments(**{**parsed, **flags})
    except UserError as error:
        raise UserError(f"{recipe}: search: {error}") from error


def _read_base(recipe: Path, cell: str | None) -> dict[str, Any]:
    shared, cells = load_cells(recipe)
    if cell is not None and cell not in cells:
        raise unknown(f"cell of {recipe}", str(cell), cells)
    if cells and cell is None:
        raise UserError(
            f"{recipe} holds several experiments: name the one that the trials start from, by cell: in its search: or "
            f"by --cell: {', '.join(cells)}."
        )
    return shared | cells.get(cell, {})


def _read_protocol(recipe: Path, section: Mapping[str, Any]) -> dict[str, Any]:
    protocol = section.get("protocol", {})
    if not isinstance(protocol, dict):
        raise UserError(f"{recipe}: search: 'protocol' must hold flags of evaluate, as 'name: value' lines.")
    _check_values(recipe, protocol)
    return protocol


def _check_values(recipe: Path, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        items = value if isinstance(value, list) else [value]
        if not items or any(item is None or isinstance(item, (list, dict)) for item in items):
            raise UserError(f"{recipe}: search: '{name}' must be a value, or a list of values.")


def _read_ranges(plan: SearchPlan, ranges: Any) -> dict[str, Range]:
    recipe, train_class = plan.recipe, arguments_class(plan.script)
    if not isinstance(ranges, dict) or not ranges:
        raise UserError(
            f"{recipe}: search: 'ranges' must hold at least one flag of the train script, with its values."
        )
    fields = {field.name: field for field in dataclasses.fields(train_class) if "help" in field.metadata}
    searched = [name for name in fields if name not in (*OWN_FLAGS, "smoke")]
    for name in ranges:
        if name not in searched:
            raise unknown(f"flag in the ranges of {recipe}", name, searched)
        if name in plan.given:
            raise UserError(f"--{name} {plan.given[name]}: the search of {recipe} tries values of it; leave it out.")
        if name in LENGTHS and plan.arguments.length:
            raise UserError(
                f"{recipe}: search: the ranges have '{name}', but {next(iter(plan.arguments.length))} is the length of "
                "each trial: leave one of them out."
            )
    return {name: _read_range(plan, fields[name], values) for name, values in ranges.items()}


def _read_range(plan: SearchPlan, field: dataclasses.Field, values: Any) -> Range:
    where = f"{plan.recipe}: search: '{field.name}'"
    if isinstance(values, list):
        if not values:
            raise UserError(f"{where} has no values: give some to choose from.")
        return Range(field.name, choices=[_parse(plan, where, field.name, value) for value in values])
    if not isinstance(values, dict) or not {"low", "high"} <= values.keys() <= {"low", "high", "log", "step"}:
        raise UserError(f"{where} must be a list of values, or {{low: ..., high: ..., log: true, step: ...}}.")
    kinds = {*get_args(field.type), field.type} & {int, float}
    if not kinds:
        raise UserError(f"{where} is no number, so it has no low and high: give a list of values.")
    low, high = (_parse(plan, where, field.name, values[end]) for end in ("low", "high"))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"{where} goes from {low} to {high}: give finite numbers, or a list of values.")
    if not low < high:
        raise UserError(f"{where} has an empty range: low is {low}, and must be below high, {high}.")
    log, step = values.get("log", False), values.get("step")
    if not isinstance(log, bool):
        raise UserError(f"{where}: log must be true or false, not {log!r}.")
    if log and (low <= 0 or step is not None):
        raise UserError(f"{where}: a logarithmic range has no step, and a low above 0, not {low}.")
    if step is not None:
        try:
            step = next(iter(kinds))(str(step))
        except ValueError:
            step = 0
        if not 0 < step <= high - low:
            raise UserError(f"{where}: step must be a number above 0, and at most high - low, not {values['step']!r}.")
    return Range(field.name, low=low, high=high, log=log, step=step)


def _parse(plan: SearchPlan, where: str, name: str, value: Any) -> Any:
    """Reads one value of a flag, as the train script does when it is given beside the recipe."""
    items = value if isinstance(value, list) else [value]
    if not items or any(item is None or isinstance(item, (list, dict)) for item in items):
        raise UserError(f"{where} has the value {value!r}: it must be a word, a number, or a list of these.")
    try:
        arguments = parse_arguments(arguments_class(plan.script), as_flags(plan.train_flags({name: value})))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return getattr(arguments, name)


def check_objective(plan: SearchPlan, flags: Mapping[str, Any]) -> None:
    """
    Checks that the objective can be measured, before anything is trained.

    Args:
        plan ([`SearchPlan`]): The plan.
        flags (`Mapping[str, Any]`): The flags of `evaluate` that it measures with, parsed.

    Raises:
        UserError: If the protocol or the models do not have the objective, or if its features are not installed.
    """
    from ..evaluation import features

    objective, where = plan.arguments.objective, f"{plan.recipe}: search: "
    fields = [field.name for field in dataclasses.fields(Protocol)]
    try:
        protocol = Protocol(**{name: value for name, value in flags.items() if name in fields})
        if objective == VAL_LOSS:
            return
        if objective not in protocol.figures:
            raise UserError(f"the protocol lacks the objective: add {metric_of(objective)} to its metrics.")
        asked = {name: flags.get(name) for name in SAMPLING}
        flag_of = {"schedulers": "scheduler"}  # of evaluate, whose other flags have the study's names
        asked |= {name: [flags[flag_of.get(name, name)]] for name in SAMPLERS if flag_of.get(name, name) in flags}
        check_family(plan.script, StudyArguments(**asked), protocol, objective)
        settings = plan.base | plan.given | dict.fromkeys(plan.ranges, True)  # what is searched, some trial has
        check_conditions(plan.script, settings, protocol, objective)
        features.load(protocol.features, protocol.feature_weights)
    except UserError as error:
        raise UserError(f"{where}{error}") from error
