"""What a study trains, with which flags, and where: a folder, a log, a lock and a result for each cell and seed."""

import dataclasses
import hashlib
import json
import re
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, unknown
from ..evaluation.report import Protocol
from ..files import load_json, read_mapping, replace_file
from ..flags import FlagParser, as_flags
from ..paths import local_path, public_name
from ..runs import RunFolder
from ..samplers import SCHEDULERS
from ..training.arguments import LENGTHS, TrainingArguments, load_cells, load_section, parse_arguments
from ..training.recipes import script_of
from .settings import (
    SAMPLERS,
    SAMPLING,
    StudyArguments,
    check_conditions,
    check_family,
    choose_main_metric,
    protocol_of,
)
from .training import OWN_FLAGS, arguments_class, fix_validation


_OWN_FLAGS = (*OWN_FLAGS, "seed")
_MINUTES = ("max_train_minutes", "budget")  # of a run, of which one replaces the other
DONE = ("measured", "failed")  # states of a run that stays as it is
_OF_DATA = ("dataset_name", "dataset_config_name", "classes", "resolution", "split")


@dataclass(frozen=True)
class Run:
    """One cell, trained with one seed."""

    cell: str
    seed: int
    script: str  # that trains it
    folder: RunFolder
    flags: dict[str, Any]  # of the train script
    data: str  # the images, in words

    def _beside(self, suffix: str) -> Path:
        return self.folder.path.with_name(self.folder.path.name + suffix)

    @property
    def log(self) -> Path:
        return self._beside(".log")

    @property
    def lock(self) -> Path:
        return self._beside(".lock")

    @property
    def result(self) -> Path:
        """What is known of the run: a row of study.json."""
        return self._beside(".json")

    @property
    def name(self) -> str:
        return f"{self.cell}, seed {self.seed}"

    def read(self) -> dict[str, Any]:
        return read_mapping(self.result, load_json)

    def write(self, row: Mapping[str, Any]) -> None:
        self.result.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.result, json.dumps(row, allow_nan=False) + "\n")

    def log_error(self) -> None:
        """Appends the traceback of the exception that is being handled to the log."""
        with self.log.open("a", encoding="utf-8") as file:
            traceback.print_exc(file=file)

    @property
    def is_done(self) -> bool:
        return self.read().get("state") in DONE


@dataclass(frozen=True)
class Study:
    """
    A grid of experiments, and how it is to be trained and measured.

    Attributes:
        recipe (`Path`): The recipe.
        scripts (`dict[str, str]`): Cell -> the script that it is for.
        folder (`Path`): The folder of the study.
        arguments ([`StudyArguments`]): How the cells are trained, sampled and shown.
        protocol ([`Protocol`]): How they are measured.
        train_flags (`dict`): Flags of the train script that win over the recipe.
        main_metric (`str`): The figure that is plotted and names the winner.
        cells (`dict`): Cell -> what it changes, of those that are trained.
        asked (`dict`): What must agree before the study is continued.
    """

    recipe: Path
    scripts: dict[str, str]
    folder: Path
    arguments: StudyArguments
    protocol: Protocol
    train_flags: dict[str, Any]
    main_metric: str
    cells: dict[str, dict[str, Any]]
    asked: dict[str, Any]

    def runs(self, networks: Mapping[str, Mapping[str, Any]]) -> list[Run]:
        """
        Lists the runs: all cells with the first seed, then with the next, as the speed of a machine changes.

        Args:
            networks (`Mapping`): Cell -> options of its network that a budget has changed.

        Raises:
            UserError: If a cell is not what its script takes, or if no asked sampler is for its objective.
        """
        return [self._run(cell, seed, networks.get(cell, {})) for seed in self.arguments.seeds for cell in self.cells]

    def _run(self, cell: str, seed: int, network: Mapping[str, Any]) -> Run:
        flags = self._flags(cell, seed, network)
        arguments = parse_flags(self.scripts[cell], flags)
        self._check_samplers(cell, arguments)
        flags |= fix_validation(arguments)
        images = [getattr(arguments, name) for name in _OF_DATA]
        if arguments.train_data_dir is not None:
            images[0] = arguments.train_data_dir
        images.append(arguments.channels and f"{arguments.channels} channels")
        images.append(arguments.value_range and f"values {' '.join(arguments.value_range)}")
        data = ", ".join(public_name(str(value)) for value in images if value not in (None, "train"))
        return Run(cell, seed, self.scripts[cell], RunFolder(self.folder / cell / f"seed-{seed}"), flags, data)

    def _check_samplers(self, cell: str, arguments: TrainingArguments) -> None:
        """Refuses samplers of which none can draw the images of a cell: of several objectives, some may do."""
        schedulers, objective = self.arguments.schedulers, getattr(arguments, "prediction_type", None)
        fitting = SCHEDULERS.get(objective, SCHEDULERS["betas"])
        if schedulers and not fitting.keys() & schedulers:
            raise UserError(
                f"--schedulers {' '.join(schedulers)}: none has a form for the objective of {cell}, {objective}: give one of "
                f"{', '.join(fitting)}."
            )

    def _flags(self, cell: str, seed: int, network: Mapping[str, Any]) -> dict[str, Any]:
        flags = {"config": str(self.recipe), "cell": cell, **self.train_flags, **network, "seed": seed}
        minutes = None if self.num_steps else self.arguments.budget or self.arguments.max_train_minutes
        return flags if minutes is None else {**flags, "max_train_minutes": minutes}

    @property
    def num_steps(self) -> int | None:
        """The steps of each run, if it was asked for these rather than for minutes or the recipe's length."""
        return self.train_flags.get("max_train_steps")

    def arguments_of(self, cell: str) -> TrainingArguments:
        """Returns the arguments of a cell with the first seed, as the recipe has its network."""
        return parse_flags(self.scripts[cell], self._flags(cell, self.arguments.seeds[0], {}))


def parse_flags(script: str, flags: Mapping[str, Any]) -> TrainingArguments:
    """Parses the flags of a run, as its script does."""
    return parse_arguments(arguments_class(script), as_flags(flags))


def plan_study(recipe: Path, given: Mapping[str, Any], train_flags: list[str], output_dir: str | None) -> Study:
    """
    Reads what a recipe asks for in its section `study:`, and what is given over it. Nothing is written.

    Args:
        recipe (`Path`): A recipe with a grid.
        given (`Mapping`): Values of [`StudyArguments`] and [`Protocol`] that win over the section.
        train_flags (`list[str]`): Flags of the train script that win over the recipe.
        output_dir (`str`, *optional*): Folder of the study; `runs/studies/RECIPE` if not given.

    Raises:
        UserError: If the recipe has no grid or no such section, or if anything in it is unknown or of the wrong type.
    """
    shared, grid = load_cells(recipe)
    if not grid:
        raise UserError(
            f"{recipe} has no grid to study: give it a list 'cells:', each with a name and what it changes."
        )
    for name in grid:
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise UserError(
                f"{recipe}: the cell '{name}' gives its name to a folder: use letters, digits and _.+- only."
            )
    asked = _read_section(recipe, given)
    for cell in asked.get("cells") or []:
        if cell not in grid:
            raise unknown(f"cell of {recipe}", cell, grid)
    cells = {name: grid[name] for name in asked.get("cells") or grid}
    scripts = _scripts_of(recipe, shared, grid, asked.get("script"))
    families, are_mixed = list(dict.fromkeys(scripts[name] for name in cells)), len({*scripts.values()}) > 1

    flags = _read_train_flags(families, train_flags)
    asked = _settle_length(asked, given, flags)
    arguments, protocol = (
        c(**{field.name: asked[field.name] for field in dataclasses.fields(c) if field.name in asked})
        for c in (StudyArguments, Protocol)
    )
    main_metric = choose_main_metric(arguments, protocol)
    for script in families:
        check_family(script, arguments, protocol_of(script, protocol) if are_mixed else protocol, main_metric)
    for cell in cells:
        check_conditions(scripts[cell], shared | grid[cell] | flags, protocol, main_metric, f"the cell {cell}")

    if are_mixed:
        grid = {name: {**changes, "script": scripts[name]} for name, changes in grid.items()}
    identity = {
        "recipe": recipe.stem,
        "script": " ".join(dict.fromkeys(scripts.values())),
        **_identify_settings(shared, grid, flags),
        **{name: getattr(arguments, name) for name in _MINUTES},
        **{name: getattr(arguments, name) for name in (*SAMPLERS, *SAMPLING)},
        "protocol": {name: value for name, value in protocol.describe().items() if name != "batch_size"},
    }
    return Study(
        recipe=recipe,
        scripts=scripts,
        folder=Path(output_dir or Path("runs", "studies", recipe.stem)),
        arguments=arguments,
        protocol=protocol,
        train_flags=flags,
        main_metric=main_metric,
        cells=cells,
        asked=json.loads(json.dumps(identity, default=str)),  # as it is read back
    )


def _read_section(recipe: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the recipe's section `study:` asks for, with what is given over it."""
    section = load_section(recipe, "study")
    known = [
        field.name for c in (StudyArguments, Protocol) for field in dataclasses.fields(c) if field.name != "sampling"
    ]
    for name, value in section.items():
        if name not in known:
            raise unknown(f"key in the section 'study' of {recipe}", name, known)
        if any(isinstance(item, (list, dict)) for item in (value if isinstance(value, list) else [value])):
            raise UserError(f"{recipe}: '{name}' in the section 'study' must be a value, or a list of values.")
    try:
        return FlagParser(StudyArguments, Protocol).given(as_flags(section)) | dict(given)
    except UserError as error:
        raise UserError(f"{recipe}: study: {error}") from error


def _read_train_flags(families: list[str], train_flags: list[str]) -> dict[str, Any]:
    """Returns the values of `--set`, which the scripts of all cells must take."""
    flags = {}
    for script in families:
        try:
            flags |= FlagParser(arguments_class(script), prog=f"tiny-diffusers train {script}").given(train_flags)
        except UserError as error:
            where = f" (the cells are of {', '.join(families)}; --set gives what all of them take)"
            raise UserError(f"{error}{where if len(families) > 1 else ''}") from error
    for name in _OWN_FLAGS:
        if name in flags:
            raise UserError(f"--{name} is the study's own to give: leave it out of --set.")
    return flags


def _settle_length(asked: dict[str, Any], given: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what is asked for without the minutes that another length of the runs replaces."""
    own_minutes = {*_MINUTES}
    lengths = [name for name in LENGTHS if name in flags]
    if lengths == ["max_train_steps"]:
        own_minutes.remove("budget")  # which is that of the networks, of which so many steps fit into it
    conflicting = [name for name in given if name in own_minutes]
    if lengths and conflicting:
        raise UserError(
            f"--set {lengths[0]}={flags[lengths[0]]} --{conflicting[0]}: both are the length of a run, so give one of them."
        )
    if not lengths and given.keys().isdisjoint(_MINUTES):
        return asked
    return {name: value for name, value in asked.items() if name not in own_minutes or name in given}


def _identify_settings(
    shared: Mapping[str, Any], grid: Mapping[str, Mapping[str, Any]], flags: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the settings of all runs as anyone may read them, with digests that tell one local path from another."""
    values_of = {"settings": shared, **{f"cell {name}": changes for name, changes in grid.items()}, "--set": flags}
    return {
        "settings": _public(shared),
        "grid": {name: _public(changes) for name, changes in grid.items()},
        "train flags": _public(flags),
        "digests of paths": {
            f"{name} of {where}": hashlib.sha256(str(local_path(value)).encode()).hexdigest()
            for where, values in values_of.items()
            for name, value in values.items()
            if _is_path(name, value)
        },
    }


def _scripts_of(
    recipe: Path, shared: Mapping[str, Any], grid: Mapping[str, Mapping[str, Any]], asked: str | None
) -> dict[str, str]:
    """Returns the script of each cell: its own, or the study's, or the recipe's."""
    if asked is not None and all("script" in changes for changes in grid.values()):
        raise UserError(f"--script {asked}: each cell of {recipe} names its own script: leave it out.")
    common = asked or shared.get("script")
    return {name: script_of(recipe, changes.get("script", common)) for name, changes in grid.items()}


def _is_path(name: str, value: Any) -> bool:
    """Checks that a setting names a file or folder of this machine."""
    names_one = name == "dataset_name" or name.endswith(("_dir", "_path"))
    return names_one and isinstance(value, str) and local_path(value) is not None


def _public(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings as study.json holds them, which may be shared: without secrets, and with paths by their last names."""
    return {
        name: public_name(value) if isinstance(value, str) and value else value
        for name, value in settings.items()
        if name not in _OWN_FLAGS
    }
