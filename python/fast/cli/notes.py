"""Notes: what a user should know and is no error, one line each on stderr."""

from __future__ import annotations

import logging
import re
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from fast.cli.options import flag, flags_of
from fast.cli.spec import COMMANDS
from fast.errors import printable

# A call in Python, or an option with its value, which stay as they are; or a name, perhaps with its
# value.
_NAMES = re.compile(
    r"[\w.]+\([^()]*\)"
    r"|--[a-z-]+ \S+"
    r"|(?<![\w.\-/'\"=])(?P<name>[a-z][a-z_]*)"
    r"(?P<given>=(?P<value>'[^']*'|[^\s'\",:;()/=]*[\w%])?)?(?![\w/=\-]|\.\w)"
)
# What functions call `data`.
_PARTS = {"train": "data", "val": "data"}


def print_notes(*messages: object) -> None:
    if logging.getLogger("fast").disabled:  # the first process prints for all: `Ranks.quiet`
        return
    for message in messages:
        print(f"fast: note: {one_line(message)}", file=sys.stderr)


def one_line(message: object) -> str:
    """A message as the command line prints it, with options as they are typed."""
    return printable(as_typed(" ".join(str(message).split())))


def as_typed(message: str) -> str:
    """The message with options as they are typed: `--source-inputs` for `source_inputs=`, and
    `--method adapter` for `method='adapter'`.

    The library's messages have the names of Python's arguments. A word such as `method` is one only
    with a value, or where the message begins with it and a colon.
    """

    def typed(match: re.Match[str]) -> str:
        text, name, value = match[0], match["name"], match["value"] or ""
        begins = match.start() == 0 and message.startswith(": ", match.end())
        is_file = begins and value and "'" not in value
        if name is None or is_file or not (match["given"] or "_" in name or begins):
            return text
        option = flag(_PARTS.get(name, name))
        if option not in _flags():
            return text
        if value in ("True", "False"):
            return option if value == "True" else f"--no-{option[2:]}"
        return f"{option} {shlex.quote(value.strip(chr(39)))}" if value else option

    return _NAMES.sub(typed, message)


@cache
def _flags() -> frozenset[str]:
    """The options of all commands."""
    return frozenset(name for spec in COMMANDS.values() for name in flags_of(spec))


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Print warnings without the line of source that they come from."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print_notes(message)
        yield
