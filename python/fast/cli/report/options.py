"""Make the page of all options from the records that the command line reads:

python -m fast.cli.report.options > docs/options.md
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator

from fast.cli.options import Parser, parser_of, usage
from fast.cli.spec import COMMANDS

HEAD = """# Options

`python -m fast.cli.report.options > docs/options.md` makes this page from the code, and a test
keeps it up to date. In Python the options of the group *training* are keyword arguments of
`fast.finetune`, with `_` in place of `-`.
"""
WHOLE = "finetune"


def page() -> str:
    """The page in Markdown: the options of `fast finetune`, and those that other commands add."""
    parsers = {name: parser_of(spec, f"fast {name}") for name, spec in COMMANDS.items()}
    shared = {flags(action) for action in _actions(parsers[WHOLE])}
    parts = [HEAD]
    for name in sorted(parsers, key=lambda name: name != WHOLE):
        parser = parsers[name]
        text = (inspect.getdoc(COMMANDS[name]) or "").partition("\n\n")[0]
        parts.append(f"## fast {name}\n\n{' '.join(text.split())}\n")
        left_out = set() if name == WHOLE else shared
        parts += _groups(parser, left_out)
        parts += _taken([a for a in _actions(parser) if flags(a) in left_out], parsers[WHOLE])
    return "\n".join(parts)


def _taken(taken: list[argparse.Action], whole: Parser) -> Iterator[str]:
    """The options that a command shares with `fast finetune`, or those that it lacks, whichever are
    fewer."""
    names = {_name(action) for action in taken}
    lacking = [_name(action) for action in _actions(whole) if _name(action) not in names]
    if len(lacking) < len(taken):
        yield f"It also takes the options of `fast {WHOLE}`, but {_listed(lacking)}.\n"
    elif taken:
        yield f"As in `fast {WHOLE}`: {_listed([_name(action) for action in taken])}.\n"


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _name(action: argparse.Action) -> str:
    return action.option_strings[0]


def flags(action: argparse.Action) -> str:
    """How an option is written: `--folds N`, or `PATH [PATH ...]` if it has no flag."""
    if not action.option_strings:
        return usage(str(action.metavar), str(action.nargs))
    name = _name(action)
    if action.choices:
        return f"{name} {{{','.join(map(str, action.choices))}}}"
    return f"{name} {action.metavar}" if action.metavar else name


def _actions(parser: Parser) -> Iterator[argparse.Action]:
    return (a for a in parser._actions if a.option_strings and a.dest != "help")


def _groups(parser: Parser, left_out: set[str]) -> Iterator[str]:
    for group in parser._action_groups:
        rows = [
            f"| `{flags(a)}` | {(a.help or '').replace('%%', '%').replace('|', ' ')} |"
            for a in group._group_actions
            if a.dest != "help" and flags(a) not in left_out
        ]
        if rows:
            untitled = group.title in ("options", "positional arguments", None)
            title, head = "" if untitled else f"**{group.title}**\n\n", "option"
            if group.title == "positional arguments":
                head = "argument"
            yield f"{title}| {head} | what it says |\n| --- | --- |\n" + "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(page(), end="")
