"""`tiny-diffusers completion`: a script that knows all commands and flags, so that a shell completes them without Python."""

import argparse
from collections.abc import Mapping
from pathlib import Path

from ..errors import say
from ..training.recipes import SCRIPTS
from .shared import checkpoint_name, make_parser


def completion_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "completion",
        "Prints a script that completes commands, flags, choices and files in a shell. Make it again after an update "
        "of the package.",
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    return parser


def completion(args: argparse.Namespace) -> None:
    import shtab

    say(shtab.complete(build_tree(), args.shell))


def build_tree() -> argparse.ArgumentParser:
    """Builds one parser of all commands, of which the command line itself builds only the one that it runs."""
    from ..cli import COMMANDS
    from ..flags import FlagParser, KindParser
    from ..studies.training import arguments_class

    parsers = {name: command.parser() for name, command in COMMANDS.items()}
    for name, parser in parsers.items():
        if isinstance(parser, KindParser):
            parsers[name] = _join({kind: build() for kind, build in parser.parsers.items()})
    parsers["train"] = _join({script: FlagParser(arguments_class(script)) for script in SCRIPTS})
    return _join(parsers, {name: command.help for name, command in COMMANDS.items()})


def _join(
    parsers: Mapping[str, argparse.ArgumentParser], helps: Mapping[str, str] | None = None
) -> argparse.ArgumentParser:
    """
    Returns a parser of which others are the commands, with their lines of help, or else their descriptions. What takes
    words but has no choices is completed by files.
    """
    import shtab

    root = argparse.ArgumentParser("tiny-diffusers")
    commands = root.add_subparsers()
    for name, parser in parsers.items():
        commands.add_parser(name, help=(helps or {}).get(name) or parser.description or name)
        commands.choices[name] = parser
        for action in parser._actions:
            if action.choices is None and action.type in (None, str, Path, checkpoint_name) and action.nargs != 0:
                action.complete = shtab.FILE
    return root
