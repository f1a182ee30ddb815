"""`tiny-diffusers study`."""

import argparse
import dataclasses
from pathlib import Path

from ..errors import say


def study_parser() -> argparse.ArgumentParser:
    from ..evaluation.report import Protocol
    from ..flags import FlagParser
    from ..studies.settings import StudyArguments

    parser = FlagParser(
        StudyArguments,
        Protocol,
        prog="tiny-diffusers study",
        description="Trains each cell of a recipe's grid with each seed, evaluates all of them with one protocol, "
        "and writes study.json, README.md and plots. The section 'study:' of the recipe takes the same "
        "names as these flags, which override it. The same command resumes a study that was stopped, and "
        "several processes may share one. Given a study.json, it makes the table and the plots again, "
        "also with other --plots or another --main_metric.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="file or name of a recipe, or a study.json")
    parser.add_argument("--output_dir", metavar="DIR", help="folder of the study (default: runs/studies/RECIPE)")
    parser.add_argument(
        "--set",
        metavar="NAME=VALUE",
        nargs="+",
        default=[],
        help="flags of the train script that override the recipe, such as dataset_name=my/folder",
    )
    return parser


def study(args: argparse.Namespace) -> None:
    from ..evaluation.report import Protocol
    from ..studies.cells import plan_study
    from ..studies.settings import StudyArguments
    from ..studies.study import run_study, show_again
    from ..training.recipes import find_recipe

    given = {name: value for name, value in study_parser().given(args.argv).items() if name != "recipe"}
    if args.recipe.endswith(".json"):
        say(f"written again: {show_again(Path(args.recipe), given)}")
        return
    names = {field.name for c in (StudyArguments, Protocol) for field in dataclasses.fields(c)}
    given = {name: value for name, value in given.items() if name in names}
    train_flags = [f"--{setting}" for setting in args.set]
    folder = run_study(plan_study(find_recipe(args.recipe), given, train_flags, args.output_dir))
    say((folder / "README.md").read_text(encoding="utf-8"))
    say(f"study: {folder}")
