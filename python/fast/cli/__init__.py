"""The `fast` command. Commands import torch when they run, so that `fast --help` is immediate."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from fast import __version__

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
USER_ERROR, INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        the exit code: 0; 2 for input that cannot be used, said in one line on stderr (environment
        variable FAST_TRACEBACK=1 shows where); 130 when interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parsed(argv)
    except SystemExit as stop:  # argparse has printed its message
        return stop.code if isinstance(stop.code, int) else USER_ERROR
    try:
        return args.run(args)
    except (ValueError, TypeError, OSError, ImportError, ArithmeticError) as error:
        place = _in_model_file(error.__cause__ or error, getattr(args, "model", None))
        return _refuse(error, f"{error} ({place})" if place else str(error))
    except (RuntimeError, LookupError, AttributeError, NameError, AssertionError) as error:
        kind = type(error).__name__  # torch's and fastkernels' own are not imported here
        if kind == "OutOfMemoryError":
            return _refuse(error, f"out of memory: lower --batch-size ({error})")
        if kind == "BackendError":
            return _refuse(error, str(error))
        place = _in_model_file(error, getattr(args, "model", None))
        if place is None:
            raise
        return _refuse(error, f"{place} raised {kind}: {error} ({TRACEBACK}=1 shows where)")
    except KeyboardInterrupt:
        print("fast: interrupted", file=sys.stderr)
        return INTERRUPTED


def _refuse(error: Exception, message: str) -> int:
    if os.environ.get(TRACEBACK):
        raise error
    print(f"fast: error: {' '.join(message.split())}", file=sys.stderr)
    return USER_ERROR


def _in_model_file(error: BaseException, model: str | None) -> str | None:
    """`file.py:12`, the last line that ran of the file that --model names, or of one beside it;
    None where the error is not theirs."""
    name, colon, _ = (model or "").partition(".py:")
    if not colon:
        return None
    folder = Path(f"{name}.py").expanduser().resolve().parent
    place = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = Path(frame.f_code.co_filename)
        if file.is_absolute() and file.resolve().parent == folder:
            place = f"{file.name}:{line}"
    return place


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser, commands = _parser(argv)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        # The parser of all commands would show its own usage, which has none of the options.
        chosen = [sub for sub in commands if sub.get_default("run") is args.run]
        (chosen or [parser])[0].error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def _parser(
    argv: Sequence[str],
) -> tuple[argparse.ArgumentParser, list[argparse.ArgumentParser]]:
    """The parser, and those of the commands that are named in `argv`."""
    # argparse's own list gives the longest names a line of their own.
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"    {name:{width}}  {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
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
            module = importlib.import_module(f"fast.cli.{name}")
            sub.description = module.__doc__
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
            named.append(sub)
    return parser, named
