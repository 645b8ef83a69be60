"""The `fast` command. Commands import torch when they run, so that `fast --help` is immediate."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from fast import __version__
from fast.cli.parser import Parser
from fast.errors import did_you_mean, printable

COMMANDS = {
    "finetune": "adapt a pretrained classifier to new data",
    "compare": "run several methods on the same job: table, curves, report",
    "retention": "the trade-off curve of a method: target against source",
    "curvature": "eigenvalues, trace and density of source and target loss",
    "landscape": "both losses over the plane of an adaptation, its path and its stiff steps",
    "env": "versions, hardware, and which kernels run here",
    "demo": "the effect in a minute: offline, on scikit-learn's digits",
}
TRACEBACK = "FAST_TRACEBACK"
FAILED, USER_ERROR, INTERRUPTED, TERMINATED = 1, 2, 130, 143
# Their messages were written to be read; others say what went wrong in the code that raised them.
EXPLAINED = (ValueError, TypeError, OSError, ImportError, ArithmeticError)


class Terminated(KeyboardInterrupt):
    """SIGTERM: the same as Ctrl-C, with an exit code of its own."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        the exit code: 0; 2 for input that cannot be used, and a run that diverged; 1 where the code
        of a network, or ours, raised what no message was written for. Each is said in one line on
        stderr (environment variable FAST_TRACEBACK=1 shows where). 130 when interrupted, 143 when
        terminated.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    model = None
    try:
        with _one_line_warnings(), _plans_once(), _terminable():
            args = _parsed(argv)
            model = getattr(args, "model", None)
            return args.run(args)
    except SystemExit as stop:  # argparse has printed help, or the version
        return stop.code if isinstance(stop.code, int) else FAILED
    except Terminated:
        print("fast: terminated", file=sys.stderr)
        return TERMINATED
    except KeyboardInterrupt:
        print("fast: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        code, message = _told(error, model if isinstance(model, str) else None)
        print(f"fast: error: {printable(' '.join(message.split()))}", file=sys.stderr)
        return code


def _told(error: Exception, model: str | None) -> tuple[int, str]:
    """Exit code and message of an error."""
    kind = type(error).__name__  # torch's and fastkernels' own are not imported here
    if kind == "OutOfMemoryError" or isinstance(error, MemoryError):
        return USER_ERROR, f"out of memory: lower --batch-size ({error})"
    if isinstance(error, EXPLAINED):
        place = _in_model_file(error.__cause__ or error, model)
        return USER_ERROR, f"{error} ({place})" if place else str(error)
    if kind == "BackendError":
        return USER_ERROR, str(error)
    place = _in_model_file(error, model)
    code = FAILED if place is None else USER_ERROR
    place = place or _outside_torch(error)
    return code, f"{place} raised {kind}: {error} ({TRACEBACK}=1 shows where)"


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Warnings without the line of source that made them."""

    def note(message: Warning | str, *_: Any) -> None:
        print(f"fast: note: {printable(' '.join(str(message).split()))}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = note  # type: ignore[assignment]
        yield


@contextmanager
def _plans_once() -> Iterator[None]:
    """What runs of several seeds are about to do is the same, and told once."""
    told: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in told
        told.add(message)
        return new

    log = logging.getLogger("fast")
    log.addFilter(is_new)
    try:
        yield
    finally:
        log.removeFilter(is_new)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises `Terminated`, so that what is half done is cleared up."""

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


def _outside_torch(error: BaseException) -> str:
    """`resnet.py:12`, the last line that ran outside of torch."""
    frames = list(traceback.walk_tb(error.__traceback__))
    named = [f"{Path(f.f_code.co_filename).name}:{line}" for f, line in frames if not _torch(f)]
    return named[-1] if named else type(error).__module__


def _torch(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] == "torch"


def _in_model_file(error: BaseException, model: str | None) -> str | None:
    """`file.py:12`, the last line that ran of the file that --model names, or of one beside it;
    None where the error is not theirs."""
    name, colon, _ = (model or "").partition(".py:")
    if not colon:
        return None
    folder = Path(os.path.realpath(os.path.expanduser(f"{name}.py"))).parent
    place = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = Path(frame.f_code.co_filename)
        if file.is_absolute() and Path(os.path.realpath(file)).parent == folder:
            place = f"{file.name}:{line}"
    return place


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    named = next((text for text in argv if not text.startswith("-")), None)
    if named is not None and named not in COMMANDS:
        hint = did_you_mean(named, COMMANDS) or f"; there are {', '.join(COMMANDS)}"
        raise ValueError(f"no command {named!r}{hint} (fast --help)")
    parser, commands = _parser(argv)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        # The parser of all commands has none of the options.
        chosen = [sub for sub in commands if sub.get_default("run") is args.run]
        (chosen or [parser])[0].refuse(unknown)
    return args


def _parser(argv: Sequence[str]) -> tuple[Parser, list[Parser]]:
    """The parser, and those of the commands that are named in `argv`."""
    # argparse's own list gives the longest names a line of their own.
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"    {name:{width}}  {text}" for name, text in COMMANDS.items())
    parser = Parser(
        prog="fast",
        description="Fine-tune a pretrained classifier fast, and keep what it knew.\n\n"
        f"commands:\n{commands}",
        epilog="`fast COMMAND --help` lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fast {__version__}")
    choices = parser.add_subparsers(metavar="COMMAND", required=True, help="one of these")
    named = []
    for name in COMMANDS:
        sub = choices.add_parser(name, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name in argv:  # the others need not be imported
            module = importlib.import_module(f"fast.cli.commands.{name}")
            sub.description = module.__doc__
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
            named.append(sub)
    return parser, named
