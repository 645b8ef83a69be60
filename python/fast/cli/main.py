"""The `fast` command: find the command that is named, read its options, run it.

Options are read without torch, so that `--help` is immediate; `fast.cli.commands` imports it.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fast import __version__
from fast.cli.failures import (
    FAILED,
    INTERRUPTED,
    PIPE_CLOSED,
    TERMINATED,
    TRACEBACK,
    explain,
)
from fast.cli.notes import as_typed, one_line, warnings_as_notes
from fast.cli.options import Parser, parser_of
from fast.cli.spec import COMMANDS
from fast.errors import did_you_mean


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived. It is handled like Ctrl-C, but has an exit code of its own."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        the exit code: 0; 2 for input that cannot be used, and for a run that diverged; 1 for an
        error in the code of a network, or in ours, that no message was written for; 130 when
        interrupted, 143 when terminated. An error is one line on stderr; with the environment
        variable FAST_TRACEBACK=1 it is a traceback. 141, without a line, when the reader of what is
        printed has gone (`| head`).
    """
    options: dict[str, Any] = {}
    try:
        with warnings_as_notes(), _typed_once(), _terminable():
            try:
                name, options = _parsed(list(sys.argv[1:] if argv is None else argv))
                spec = COMMANDS[name].parse(options)
                code = importlib.import_module(f"{spec.package}.{name}").run(spec)
            except SystemExit as stop:  # argparse has printed help, or the version
                code = stop.code if isinstance(stop.code, int) else FAILED
            _flush()
            return code
    except Terminated:
        print("fast: terminated", file=sys.stderr)
        return TERMINATED
    except KeyboardInterrupt:
        print("fast: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `fast predict ... | head` has read enough
        _discard()
        return PIPE_CLOSED
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        code, message = explain(error, options.get("model"))
        print(f"fast: error: {one_line(message)}", file=sys.stderr)
        try:
            _flush()
        except OSError:  # the disk behind it is full, as the message says, or nobody reads on
            _discard()
        return code


def _flush() -> None:
    if sys.stdout is not None:  # it may have been closed by the caller
        sys.stdout.flush()


def _discard() -> None:
    """Throw away what could not be printed, or Python would try again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parsed(argv: list[str]) -> tuple[str, dict[str, Any]]:
    """The name of the command, and the options that were typed for it."""
    place = next((i for i, text in enumerate(argv) if not text.startswith("-")), len(argv))
    for name in argv[place : place + 1]:
        if name not in COMMANDS:
            hint = did_you_mean(name, COMMANDS) or f"; there are {', '.join(COMMANDS)}"
            raise ValueError(f"no command {name!r}{hint} (fast --help)")
    name = _parser().read(argv[: place + 1])["command"]
    return name, parser_of(COMMANDS[name], f"fast {name}").read(argv[place + 1 :])


def _parser() -> Parser:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"    {name:{width}}  {spec.about}" for name, spec in COMMANDS.items())
    parser = Parser(
        prog="fast",
        usage="fast [-h] [--version] COMMAND ...",
        description="Fine-tune a pretrained classifier fast, and keep what it knew.\n\n"
        f"commands:\n{commands}",
        epilog="`fast COMMAND --help` lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fast {__version__}")
    parser.add_argument("command", metavar="COMMAND", help="one of these")
    return parser


@contextmanager
def _typed_once() -> Iterator[None]:
    """Log each message once, as runs of several seeds have the same plan, and with options as they
    are typed."""
    messages: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = as_typed(record.getMessage())
        record.msg, record.args = message, ()
        new = message not in messages
        messages.add(message)
        return new

    log = logging.getLogger("fast")
    log.addFilter(is_new)
    try:
        yield
    finally:
        log.removeFilter(is_new)


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM raise `Terminated`, so that whatever is half done is cleared up."""

    def stop(*_: Any) -> None:
        raise Terminated

    free = threading.current_thread() is threading.main_thread()
    if not free or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
