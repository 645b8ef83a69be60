"""Options as records: argparse is generated from the fields of a dataclass, and read back into it.

The namespace of argparse holds only the options that were typed; any other has the default of its
field.
"""

from __future__ import annotations

import argparse
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import Field, field, fields
from typing import TYPE_CHECKING, Any, NoReturn, TypedDict, TypeVar, Unpack

from fast.adapt.config import field_types
from fast.cli.values import at_least_one, class_weights, folder_name, names, share, whole_numbers
from fast.errors import did_you_mean

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record = TypeVar("Record", bound="DataclassInstance")
# Fields of `TrainConfig` whose text is not read by their type alone.
READERS = {
    "class_weights": class_weights,
    "output": folder_name,
    "resume": folder_name,
}
# Second flags, in all commands.
SHORT = {"output": "-o"}
METAVARS: dict[Any, str] = {
    int: "N",
    float: "X",
    str: "NAME",
    at_least_one: "N",
    folder_name: "FOLDER",
    names: "NAME,NAME",
    share: "X",
    whole_numbers: "N,N",
}


def flag(name: str) -> str:
    """`source_inputs` -> `--source-inputs`."""
    return "--" + name.replace("_", "-")


class How(TypedDict, total=False):
    """How an option is typed.

    Attributes:
        read: reads the typed text (default: the type of the field).
        metavar: stands for the value in the help.
        choices: the values that are allowed.
        group: the title of its group in the help.
        words: how many words without a flag it takes: `nargs` of argparse, of which None is one.
    """

    read: Callable[[str], Any]
    metavar: str
    choices: tuple[str, ...]
    group: str
    words: str | None


def option(help: str, default: Any = None, **how: Unpack[How]) -> Any:
    """A field that is an option of its name."""
    return field(default=default, metadata={"help": help, **how})


def part(group: str, without: Iterable[str] = ()) -> dict[str, Any]:
    """Metadata of a field that is itself a record of options.

    Args:
        group: the title of these options in the help.
        without: the names of options that are left out.
    """
    return {"group": group, "without": frozenset(without)}


def is_part(item: Field[Any]) -> bool:
    """Whether a field is itself a record of options."""
    return "without" in item.metadata


def is_words(item: Field[Any]) -> bool:
    """Whether a field is typed without a flag."""
    return "words" in item.metadata


def usage(name: str, words: str | None) -> str:
    """How words without a flag are written: `PATH [PATH ...]`."""
    return {"+": f"{name} [{name} ...]", "?": f"[{name}]"}.get(words or "", name)


def flags_of(record: Any) -> Iterator[str]:
    """The options of a record and of its parts, as they are typed."""
    for f in fields(record):
        if is_part(f):
            yield from flags_of(f.default_factory)
        elif not is_words(f):
            yield flag(f.name)


class Help(argparse.HelpFormatter):
    """Fills paragraphs, and leaves indented ones as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = text.split("\n\n")
        return "\n\n".join(
            part if part.startswith(" ") else textwrap.fill(part, width, initial_indent=indent)
            for part in parts
        )


class Parser(argparse.ArgumentParser):
    """Raises ValueError for what it cannot read; argparse itself prints its whole usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} ({self.prog} --help lists the options)")

    def read(self, argv: Iterable[str]) -> dict[str, Any]:
        """The options that are given in `argv`.

        Raises:
            ValueError: an option is unknown, or its value is empty or cannot be read.
        """
        args, unknown = self.parse_known_args(list(argv))
        if unknown:
            name = next((text for text in unknown if text.startswith("-")), "").partition("=")[0]
            words = [flag(action.dest) for action in self._get_positional_actions()]
            hint = "" if name in words else did_you_mean(name, self._option_string_actions)
            hint += f"; type {self.usage}" if words else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        for action in self._actions:
            value = getattr(args, action.dest, None)
            if value == "" or (isinstance(value, list) and "" in value):
                shown = "/".join(action.option_strings) or action.metavar
                self.error(f"argument {shown}: is empty; is a variable of the shell not set?")
        return vars(args)

    @property
    def flags(self) -> frozenset[str]:
        """The options, as they are typed."""
        return frozenset(self._option_string_actions)

    def _print_message(self, message: str, file: Any = None) -> None:
        # Without this a help that cannot be printed, as on a full disk, would not be told.
        print(message or "", end="", file=file)


def parser_of(record: type[DataclassInstance], prog: str = "fast") -> Parser:
    """The parser of a record's options; the docstring of the record is its description."""
    parser = Parser(
        prog=prog,
        description=inspect.getdoc(record),
        formatter_class=Help,
        argument_default=argparse.SUPPRESS,
    )
    groups: dict[str, Any] = {"": parser}
    options = list(_options(record))
    words = [usage(f.metadata["metavar"], f.metadata["words"]) for *_, f in options if is_words(f)]
    parser.usage = " ".join([prog, *words, "[options]"])
    for title, kind, item in options:
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add(groups[title], item, kind)
    return parser


def _options(
    record: type[DataclassInstance], title: str = "", without: Iterable[str] = ()
) -> Iterator[tuple[str, Any, Field[Any]]]:
    """Group, type and field of each option; the record's own options come before those of its
    parts."""
    types = {name: kinds[0] for name, kinds in field_types(record).items()}
    named = [f for f in fields(record) if f.name not in without]
    for f in named:
        if not is_part(f):
            yield f.metadata.get("group", title), types[f.name], f
    for f in named:
        if is_part(f):
            yield from _options(types[f.name], f.metadata["group"], f.metadata["without"])


def _add(group: Any, item: Field[Any], kind: Any) -> None:
    how, name = item.metadata, flag(item.name)
    text = how["help"].replace("%", "%%")
    if item.default not in (None, "") and not isinstance(item.default, bool):
        shown = item.default if isinstance(item.default, tuple) else (item.default,)
        text += f" (default: {','.join(map(str, shown))})"
    if is_words(item):
        read = how.get("read", kind)
        group.add_argument(
            item.name, type=read, metavar=how["metavar"], nargs=how["words"], help=how["help"]
        )
        return
    flags = (name, *filter(None, [SHORT.get(item.name)]))
    if kind is bool:
        on_only = item.default is False  # any other option can also be switched off
        action: Any = "store_true" if on_only else argparse.BooleanOptionalAction
        group.add_argument(name, action=action, help=text)
    elif how.get("choices"):
        group.add_argument(name, choices=how["choices"], help=text)
    else:
        read = how.get("read") or READERS.get(item.name, kind)
        metavar = how.get("metavar") or METAVARS.get(read, "X,X")
        group.add_argument(*flags, type=read, metavar=metavar, help=text)


def build(record: type[Record], options: dict[str, Any]) -> Record:
    """The record that has these options."""
    arguments: dict[str, Any] = {}
    for f in fields(record):
        if is_part(f):
            inner = {k: v for k, v in options.items() if k not in f.metadata["without"]}
            arguments[f.name] = build(field_types(record)[f.name][0], inner)
        elif f.name in options:
            arguments[f.name] = options[f.name]
    return record(**arguments)
