"""What a study trains, with which flags, and where: a folder, a log, a lock and a result for each cell and seed."""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, unknown
from ..evaluation.report import Protocol
from ..files import load_json, read_mapping, replace_file
from ..flags import FlagParser, as_flags
from ..paths import public_name
from ..runs import RunFolder
from ..training.arguments import TrainingArguments, load_cells, load_section, parse_arguments
from ..training.recipes import script_of
from .settings import StudyArguments, check_family, choose_main_metric
from .training import arguments_class


_OWN_FLAGS = ("config", "cell", "seed", "output_dir", "resume_from_checkpoint", "overwrite_output_dir", "push_to_hub")
_LENGTH = {"max_train_steps", "max_train_minutes", "num_epochs"}
_OF_DATA = ("train_data_dir", "dataset_name", "dataset_config_name", "classes", "resolution", "split")


@dataclass(frozen=True)
class Run:
    """One cell, trained with one seed."""

    cell: str
    seed: int
    folder: RunFolder
    flags: dict[str, Any]  # of the train script
    data: str  # the images, in words: metrics are compared among runs of the same

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

    @property
    def is_done(self) -> bool:
        return self.read().get("state") in ("measured", "failed")


@dataclass(frozen=True)
class Study:
    """
    A grid of experiments, and how it is to be trained and measured.

    Attributes:
        recipe (`Path`): The recipe.
        script (`str`): The script that it is for.
        folder (`Path`): The folder of the study.
        arguments ([`StudyArguments`]): How the cells are trained, sampled and shown.
        protocol ([`Protocol`]): How they are measured.
        train_flags (`dict`): Flags of the train script that win over the recipe.
        main_metric (`str`): The figure that is plotted and names the winner.
        cells (`dict`): Cell -> what it changes, of those that are trained.
        asked (`dict`): What must agree before the study is continued.
    """

    recipe: Path
    script: str
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
            UserError: If a cell is not what its script takes.
        """
        return [self._run(cell, seed, networks.get(cell, {})) for seed in self.arguments.seeds for cell in self.cells]

    def _run(self, cell: str, seed: int, network: Mapping[str, Any]) -> Run:
        flags = {"config": str(self.recipe), "cell": cell, **self.train_flags, **network, "seed": seed}
        minutes = self.arguments.budget or self.arguments.max_train_minutes
        if minutes is not None and not self.train_flags.keys() & _LENGTH:
            flags["max_train_minutes"] = minutes
        arguments = self.parse(flags)
        images = [getattr(arguments, name) for name in _OF_DATA[1:]]
        if arguments.train_data_dir is not None:
            images[0] = arguments.train_data_dir
        data = ", ".join(public_name(str(value)) for value in images if value not in (None, "train"))
        return Run(cell, seed, RunFolder(self.folder / cell / f"seed-{seed}"), flags, data)

    def parse(self, flags: Mapping[str, Any]) -> TrainingArguments:
        """Parses the flags of a run, as its script does."""
        return parse_arguments(arguments_class(self.script), as_flags(flags))


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

    parser = FlagParser(StudyArguments, Protocol)
    section = load_section(recipe, "study")
    known = [field.name for c in (StudyArguments, Protocol) for field in dataclasses.fields(c)]
    for name, value in section.items():
        if name not in known or name == "sampling":
            raise unknown(f"key in the section 'study' of {recipe}", name, [n for n in known if n != "sampling"])
        if any(isinstance(item, (list, dict)) for item in (value if isinstance(value, list) else [value])):
            raise UserError(f"{recipe}: '{name}' in the section 'study' must be a value, or a list of values.")
    own_minutes = {"max_train_minutes", "budget"}
    if given.keys() & own_minutes:  # one of them replaces the other
        section = {name: value for name, value in section.items() if name not in own_minutes}
    values = parser.given(as_flags(section)) | dict(given)
    arguments, protocol = (
        c(**{field.name: values[field.name] for field in dataclasses.fields(c) if field.name in values})
        for c in (StudyArguments, Protocol)
    )

    script = script_of(recipe, arguments.script)
    main_metric = choose_main_metric(arguments, protocol)
    check_family(script, arguments, protocol, main_metric)
    for cell in arguments.cells or []:
        if cell not in grid:
            raise unknown(f"cell of {recipe}", cell, grid)
    flags = FlagParser(arguments_class(script), prog=f"tiny-diffusers train {script}").given(train_flags)
    for name in _OWN_FLAGS:
        if name in flags:
            raise UserError(f"--{name} is the study's own to give: leave it out of --set.")

    asked = {
        "recipe": recipe.stem,
        "script": script,
        "settings": shared,
        "grid": grid,
        "train flags": {k: public_name(v) if isinstance(v, str) and v else v for k, v in flags.items()},
        **{name: getattr(arguments, name) for name in ("max_train_minutes", "budget")},
        **{name: getattr(arguments, name) for name in ("num_inference_steps", "schedulers", "eta", "guidance_scale")},
        "protocol": {name: value for name, value in protocol.describe().items() if name != "batch_size"},
    }
    return Study(
        recipe=recipe,
        script=script,
        folder=Path(output_dir or Path("runs", "studies", recipe.stem)),
        arguments=arguments,
        protocol=protocol,
        train_flags=flags,
        main_metric=main_metric,
        cells={name: grid[name] for name in arguments.cells or grid},
        asked=json.loads(json.dumps(asked, default=str)),  # as it is read back
    )
