"""
Command-line flags from dataclasses: a field is a flag, its type gives the allowed values, its metadata the rest.

    @dataclass(frozen=True)
    class Arguments:
        seed: int = flag(0, "Seed of everything random.")
        dtype: Literal["float32", "bfloat16"] = flag("float32", "Dtype of the network.")

    arguments = FlagParser(Arguments).parse(["--seed", "1"])
"""

import argparse
import copy
import dataclasses
import difflib
from typing import Any, Literal, TypeVar, get_args, get_origin

from transformers.hf_argparser import HfArgumentParser

from .errors import UserError, unknown


T = TypeVar("T")


def flag(default: Any, help: str, *aliases: str, changes_run: bool = True, decides: tuple[str, ...] = ()) -> Any:
    """
    Declares a dataclass field as a flag.

    Args:
        default (`Any`): The value when the flag is not given. A list is copied for each instance.
        help (`str`): One line for `--help`.
        aliases (`str`): Further spellings, such as `"--num_train_epochs"`.
        changes_run (`bool`): False if a resumed run may have another value and still be the same run.
        decides (`tuple[str, ...]`):
            Names of flags that this one makes void in a recipe or an earlier run's settings when it is given on the
            command line: `--num_epochs` decides the number of steps, for example.
    """
    metadata = {"help": help, "aliases": list(aliases), "changes_run": changes_run, "decides": decides}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def default_of(field: dataclasses.Field) -> Any:
    """Returns the default of a flag's field."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class FlagParser(HfArgumentParser):
    """
    Parser of the flags that one or more dataclasses declare with [`flag`]; fields without it are no flags.

    `Literal` types give the choices. A flag of type `list[str]` takes its values separated by spaces or commas.

    Raises:
        UserError: In one line, for every mistake on the command line.
    """

    def __init__(self, *dataclass_types: type, **kwargs):
        self.choices: dict[str, tuple] = {}  # of flags that take lists, whose values are checked once split
        super().__init__(dataclass_types, allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)

    def _parse_dataclass_field(self, parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
        if "help" not in field.metadata:
            return
        field = copy.copy(field)
        field.metadata = {name: field.metadata[name] for name in ("help", "aliases")}
        list_type = next((t for t in (field.type, *get_args(field.type)) if get_origin(t) is list), None)
        if list_type is not None and get_origin(get_args(list_type)[0]) is Literal:
            self.choices[field.name] = get_args(get_args(list_type)[0])
            field.type = list[str]
        super()._parse_dataclass_field(parser, field)

    def given(self, argv: list[str]) -> dict[str, Any]:
        """Parses a command line into the values that were given, without defaults."""
        unset = object()
        names = {action.dest for action in self._actions if action.dest != "help"}
        namespace, rest = self.parse_known_args(argv, argparse.Namespace(**dict.fromkeys(names, unset)))
        if rest:
            raise self._unknown_argument(rest[0])
        values = {name: value for name, value in vars(namespace).items() if value is not unset}
        for name, value in values.items():
            if isinstance(value, list) and value and isinstance(value[0], str):
                values[name] = [part.strip() for word in value for part in word.split(",")]
                for part in values[name] if name in self.choices else ():
                    if part not in self.choices[name]:
                        raise unknown(f"--{name}", part, self.choices[name])
        return values

    def error(self, message: str):
        raise UserError(f"{message}. --help lists the flags.")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise unknown(action.option_strings[0] if action.option_strings else action.dest, value, action.choices)

    def _unknown_argument(self, word: str) -> UserError:
        if word.startswith("-"):
            near = difflib.get_close_matches(word.partition("=")[0], self._option_string_actions, n=3)
            hint = f" Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
            return UserError(f"Unknown argument '{word}'.{hint} --help lists the flags.")
        return UserError(f"'{word}' stands alone on the command line: every argument is a --flag and its value.")
