"""The `fast` command. Commands import torch when they run, so that `fast --help` is immediate."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

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
        args = _parser(argv).parse_args(argv)
    except SystemExit as stop:  # argparse has printed its message
        return stop.code if isinstance(stop.code, int) else USER_ERROR
    try:
        return args.run(args)
    except (ValueError, TypeError, OSError, ImportError, ArithmeticError) as error:
        return _refuse(error, str(error))
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; not imported here for its name
            raise
        return _refuse(error, f"out of memory: lower --batch-size ({error})")
    except KeyboardInterrupt:
        print("fast: interrupted", file=sys.stderr)
        return INTERRUPTED


def _refuse(error: Exception, message: str) -> int:
    if os.environ.get(TRACEBACK):
        raise error
    print(f"fast: error: {' '.join(message.split())}", file=sys.stderr)
    return USER_ERROR


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
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
    for name in COMMANDS:
        sub = choices.add_parser(name, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name in argv:  # the others need not be imported
            module = importlib.import_module(f"fast.cli.{name}")
            sub.description = module.__doc__
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    return parser
