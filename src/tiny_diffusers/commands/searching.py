"""`tiny-diffusers search`."""

import argparse
from pathlib import Path

from ..errors import UserError, say
from .evaluation import SAMPLING, evaluate_parser
from .shared import positive_number


def search_parser() -> argparse.ArgumentParser:
    from ..flags import FlagParser
    from ..studies.search_plan import SearchArguments

    class Parser(FlagParser):
        """Parser that leaves the flags of the train script, which follows from the recipe, to be read with it."""

        def parse_args(self, args=None, namespace=None):
            namespace, namespace.train_argv = self.parse_known_args(args, namespace)
            return namespace

    parser = Parser(
        SearchArguments,
        prog="tiny-diffusers search",
        description="Trains with settings that Optuna suggests, from the ranges in the section 'search:' of a "
        "recipe. Flags override the section; flags of the train script are accepted as well, and "
        "override the recipe. The same command resumes a search that was stopped or killed; if it is "
        "started twice, the two processes share the trials. Given a search.json, it makes the table again and, "
        "if the search has ended, the plots.",
    )
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        help="YAML file with a section 'search:', the name of a recipe of the package, or a search.json",
    )
    parser.add_argument("--output_dir", type=Path, metavar="DIR", help="default: runs/search/RECIPE")
    parser.add_argument(
        "--workers",
        type=positive_number,
        default=1,
        metavar="N",
        help="number of trials at a time, which share the cores",
    )
    return parser


def search(args: argparse.Namespace) -> int | None:
    from ..evaluation.references import RealImages
    from ..evaluation.report import Protocol
    from ..flags import as_flags
    from ..paths import public_command
    from ..studies.search import Search
    from ..studies.search_plan import SearchArguments, check_objective, read_plan
    from ..studies.search_report import show_again
    from ..training.recipes import find_recipe

    if args.recipe.endswith(".json"):
        if args.argv != [args.recipe]:
            raise UserError(f"{args.recipe}: its table and plots are made again, and take no flags.")
        say(f"written again: {show_again(Path(args.recipe))}")
        return None
    recipe = find_recipe(args.recipe)
    names = SearchArguments.__dataclass_fields__
    given = {name: value for name, value in search_parser().given(args.argv).items() if name in names}
    plan = read_plan(recipe, given, args.train_argv)
    try:
        flags = evaluate_parser().given(as_flags(plan.evaluate_flags()))
    except UserError as error:
        raise UserError(f"{recipe}: search: protocol: {error}") from error
    allowed = {
        *Protocol.__dataclass_fields__,
        *RealImages.__dataclass_fields__,
        *SAMPLING,
        "scheduler",
        "timestep_spacing",
    }
    for name in flags:
        if name not in allowed:
            raise UserError(
                f"{recipe}: search: protocol: '{name}' does not say how a trial is measured: leave it out."
            )
    check_objective(plan, flags)
    folder = args.output_dir or Path("runs", "search", recipe.stem)
    command = public_command(["tiny-diffusers", "search", *args.argv])
    return Search(plan, folder, command).run(args.workers)
