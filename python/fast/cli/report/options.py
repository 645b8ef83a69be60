"""The page of all options, made of the records that the command line reads:

python -m fast.cli.report.options > docs/options.md
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator

from fast.cli.options import Parser, parser_of
from fast.cli.spec import COMMANDS

HEAD = """# Options

`python -m fast.cli.report.options > docs/options.md` makes this page of the code, and a test holds
it up to date. In Python the options of the group *training* are keyword arguments of
`fast.finetune`, with `_` for `-`.
"""
WHOLE = "finetune"


def page() -> str:
    """The page, in Markdown: options of `fast finetune`, and what other commands have besides."""
    parsers = {name: parser_of(spec, f"fast {name}") for name, spec in COMMANDS.items()}
    shared = {flags(action) for action in _actions(parsers[WHOLE])}
    parts = [HEAD]
    for name in sorted(parsers, key=lambda name: name != WHOLE):
        parser = parsers[name]
        text = (inspect.getdoc(COMMANDS[name]) or "").partition("\n\n")[0]
        parts.append(f"## fast {name}\n\n{' '.join(text.split())}\n")
        own = shared if name == WHOLE else set()
        taken = len({flags(a) for a in _actions(parser)} & shared - own)
        parts += _groups(parser, shared - own)
        if taken:
            parts.append(f"It also takes {taken} of the options of `fast {WHOLE}`.\n")
    return "\n".join(parts)


def flags(action: argparse.Action) -> str:
    """`--folds N`."""
    name = action.option_strings[0]
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
            if a.option_strings and a.dest != "help" and flags(a) not in left_out
        ]
        if rows:
            title = "" if group.title in ("options", None) else f"**{group.title}**\n\n"
            yield f"{title}| option | what it says |\n| --- | --- |\n" + "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(page(), end="")
