"""Words for messages of one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}


def distribution(module: str) -> str:
    """What `pip install` calls the distribution of `module`."""
    return _DISTRIBUTIONS.get(module, module)


def first_line(error: BaseException) -> str:
    """The first line of its message that says anything; libraries write pages."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


def printable(text: object) -> str:
    """`text` with control characters escaped: names in files of strangers may hold commands to the
    terminal, and line ends that forge a message."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text)
    )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean lr?` where a known name is close, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
