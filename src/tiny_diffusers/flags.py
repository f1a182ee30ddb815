"""
Command-line flags from dataclasses: a field is a flag, its type gives the allowed values, its metadata the rest.

    @dataclass(frozen=True)
    class Arguments(Flags):
        seed: int = flag(0, "Seed of all random numbers.", within="[0, inf)")
        dtype: Literal["float32", "bfloat16"] = flag("float32", "Dtype of the network.")

    arguments = FlagParser(Arguments).parse(["--seed", "1"])
"""

import argparse
import copy
import dataclasses
import difflib
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin

from transformers.hf_argparser import HfArgumentParser

from .errors import UserError, unknown
from .resolution import Resolution, parse_resolution, to_size


T = TypeVar("T")

_MAX_INT = 2**63 - 1  # that a tensor holds
_NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)  # argparse's own has no exponents


def flag(
    default: Any,
    help: str,
    *aliases: str,
    within: str | None = None,
    changes_run: bool = True,
    replaces: tuple[str, ...] = (),
    decides: tuple[str, ...] = (),
    meant: Mapping[str, str] | None = None,
) -> Any:
    """
    Declares a dataclass field as a flag.

    Args:
        default (`Any`): The value when the flag is not given. A list is copied for each instance.
        help (`str`): One line for `--help`.
        aliases (`str`): Further spellings, such as `"--num_train_epochs"`.
        within (`str`, *optional*): The interval of its numbers, such as `"[0, 1)"` or `"(0, inf)"`.
        changes_run (`bool`): False if a resumed run may have another value and still be the same run.
        replaces (`tuple[str, ...]`): Flags whose values in a recipe are dropped when this one is given on the command
            line: `--num_epochs` replaces a recipe's `max_train_steps`.
        decides (`tuple[str, ...]`): The same for values that nobody asked for, as an earlier run resolved them:
            `--resolution` decides the network's options.
        meant (`dict[str, str]`, *optional*): What to suggest for values that other programs know by another name.
    """
    metadata = {
        "help": help,
        "aliases": list(aliases),
        "within": within,
        "changes_run": changes_run,
        "replaces": replaces,
        "decides": decides,
        "meant": meant,
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Flags:
    """Base of the dataclasses whose fields are flags: constructing one checks the ranges of its numbers."""

    TITLE: ClassVar[str | None] = None  # of the flags that a class declares, in --help
    DASHES: ClassVar[str] = "--"  # before a name in errors; none for a class that is used from Python as well

    def __post_init__(self):
        for field in dataclasses.fields(self):
            within, given = field.metadata.get("within"), getattr(self, field.name)
            if within is None:
                continue
            if isinstance(given, str):  # of a resolution, the height and the width
                if not all(_contains(within, side) for side in to_size(given)):
                    raise UserError(f"{self.DASHES}{field.name} {given}: both sides must be in {within}.")
                continue
            for value in given if isinstance(given, (list, tuple)) else [given]:
                if value is not None and not _contains(within, value):
                    raise UserError(f"{self.DASHES}{field.name} {value}: it must be {_describe(within, value)}.")


def _bounds(within: str) -> tuple[float, float]:
    low, high = (float(bound) for bound in within[1:-1].split(","))
    return low, high


def _contains(within: str, value: float) -> bool:
    low, high = _bounds(within)
    if isinstance(value, int) and abs(value) > _MAX_INT:
        return False
    above = value >= low if within[0] == "[" else value > low
    return above and (value <= high if within[-1] == "]" else value < high)


def _describe(within: str, value: float) -> str:
    """Describes an interval in words: `"(0, inf)"` is "a finite number above 0"."""
    low, high = _bounds(within)
    if isinstance(value, int) and abs(value) > _MAX_INT:
        return f"at most {_MAX_INT}"
    if math.isfinite(high):
        return f"in {within}"
    number = "a whole number" if isinstance(value, int) else "a number" if within[-1] == "]" else "a finite number"
    if not math.isfinite(low):
        return number
    return f"{number} {'of at least' if within[0] == '[' else 'above'} {low:g}"


def default_of(field: dataclasses.Field) -> Any:
    """Returns the default of a flag's field."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def expand_user(namespace: argparse.Namespace) -> argparse.Namespace:
    """Replaces a `~` at the start of a value by the home folder, which no shell does in `--flag=~/folder`."""
    for name, value in vars(namespace).items():
        if isinstance(value, (str, Path)):
            setattr(namespace, name, type(value)(os.path.expanduser(value)))
    return namespace


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """Spells values as they would be typed on the command line; those that are None are left out."""
    flags = []
    for name, value in values.items():
        if value is not None:
            flags += [f"--{name}", *(str(v) for v in (value if isinstance(value, list) else [value]))]
    return flags


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Lists each flag in one spelling, and its default where there is one to know."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        shown.option_strings = [o for o in action.option_strings if o == _underscored(o) or len(o) == 2]
        return super()._format_action_invocation(shown)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.nargs == 0 else super()._get_help_string(action)


def _underscored(option: str) -> str:
    """Returns the spelling of a flag that has one with hyphens as well."""
    return "--" + option[2:].replace("-", "_")


class OneLineParser(argparse.ArgumentParser):
    """
    Parser whose errors are one line.

    Raises:
        UserError: For every mistake on the command line.
    """

    example = ""  # the command line that --help ends with, or several lines

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = _NEGATIVE_NUMBER

    def parse_args(self, args: list[str] | None = None, namespace: argparse.Namespace | None = None):
        """Parses a command line; suggests the nearest flags for an unknown one."""
        namespace, rest = self.parse_known_args(args, namespace)
        if rest and rest[0].startswith("-"):
            near = difflib.get_close_matches(rest[0].partition("=")[0], self._option_string_actions, n=3)
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise UserError(f"Unknown argument '{rest[0]}'.{hint} --help lists the flags.")
        if rest:
            raise UserError(f"'{rest[0]}' is an argument too many: it follows no --flag. --help lists the arguments.")
        return namespace

    def format_help(self) -> str:
        """Formats the help, with the examples on lines of their own, which may be copied."""
        lines = self.example.splitlines()
        title = "examples:" if len(lines) > 1 else "example:"
        return super().format_help() + ("\n  ".join([f"\n{title}", *lines]) + "\n" if lines else "")

    def error(self, message: str):
        raise UserError(f"{message}. --help lists the flags.")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise unknown(action.option_strings[0] if action.option_strings else action.dest, value, action.choices)


class KindParser(OneLineParser):
    """
    Parser of a command with several kinds: it hands the command line on to the parser of the kind that is asked for.

    Args:
        parsers (`dict[str, Callable]`): kind -> builds its parser.
        kind_of (`Callable`): Splits a command line into the kind and the words that its parser takes.
    """

    def __init__(
        self,
        parsers: Mapping[str, Callable[[], argparse.ArgumentParser]],
        kind_of: Callable[[list[str]], tuple[str, list[str]]],
        **kwargs,
    ):
        super().__init__(allow_abbrev=False, **kwargs)
        self.parsers, self.kind_of = parsers, kind_of

    def parse_args(self, args: list[str] | None = None, namespace: argparse.Namespace | None = None):
        """Parses a command line by the parser of its kind, which is `kind` in the result."""
        words = sys.argv[1:] if args is None else args
        if words in (["-h"], ["--help"]):
            return super().parse_args(words, namespace)
        kind, rest = self.kind_of(words)
        namespace = self.parsers[kind]().parse_args(rest, namespace)
        namespace.kind = kind
        return namespace


class FlagParser(OneLineParser, HfArgumentParser):
    """
    Parser of the flags that dataclasses declare with [`flag`]; a field that is declared otherwise is no flag.

    `Literal` types give the choices. The values of a list are separated by spaces or commas. A [`Resolution`] is a side or
    height x width.
    """

    def __init__(self, *dataclass_types: type, **kwargs):
        self.choices: dict[str, tuple] = {}  # of the flags that take a list of strings; empty if any will do
        self.meant: dict[str, Mapping[str, str] | None] = {}  # what to suggest for other values of these
        self._titles: dict[str, str] = {}  # of the flags, in --help
        super().__init__(dataclass_types, allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)

    def _add_dataclass_arguments(self, dtype: type) -> None:
        for (
            base
        ) in dtype.__mro__:  # from the derived class to its bases: the base that declares a flag names its title
            names = vars(base).get("__annotations__", {})
            self._titles |= dict.fromkeys(names, getattr(base, "TITLE", None))
        super()._add_dataclass_arguments(dtype)

    def _parse_dataclass_field(self, parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
        if "help" not in field.metadata:
            return
        title = self._titles[field.name]
        if title is not None:
            groups = [group for group in self._action_groups if group.title == title]
            parser = groups[0] if groups else self.add_argument_group(title)
        self.meant[field.name] = field.metadata["meant"]
        field = copy.copy(field)
        field.metadata = {name: field.metadata[name] for name in ("help", "aliases")}
        list_type = next((t for t in (field.type, *get_args(field.type)) if get_origin(t) is list), None)
        item_type = get_args(list_type)[0] if list_type is not None else None
        if item_type is str or get_origin(item_type) is Literal:
            self.choices[field.name] = get_args(item_type)
            field.type = list[str]
        elif field.type in (Resolution, Resolution | None):
            field.type = parse_resolution
        super()._parse_dataclass_field(parser, field)
        if f"--no_{field.name}" in self._option_string_actions:
            self._option_string_actions[f"--no_{field.name}"].help = f"Turn --{field.name} off."

    def parse_known_args(
        self, args: list[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parses as argparse does, expands `~`, and checks the choices of lists of strings."""
        namespace, rest = super().parse_known_args(args, namespace)
        expand_user(namespace)
        for name, choices in self.choices.items():
            words = getattr(namespace, name)
            if isinstance(words, list):
                for word in words:
                    if choices and word not in choices:
                        raise unknown(f"--{name}", word, choices, self.meant[name])
        return namespace, rest

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """Splits the values of a field that is a list at commas, before they are converted."""
        if action.nargs == "+" and action.dest in self.meant:
            arg_strings = [part.strip() for word in arg_strings for part in word.split(",")]
        return super()._get_values(action, arg_strings)

    def given(self, args: list[str]) -> dict[str, Any]:
        """Parses a command line into the values that were given, without defaults."""
        unset = object()
        actions = [action for action in self._actions if action.dest != "help"]
        namespace = self.parse_args(args, argparse.Namespace(**{action.dest: unset for action in actions}))
        # argparse sets an optional positional to its default even if it is absent
        absent = [a.dest for a in actions if not a.option_strings and getattr(namespace, a.dest) is a.default]
        return {name: value for name, value in vars(namespace).items() if value is not unset and name not in absent}
