"""Progress bars: shown by default when a person is watching."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm

# The figures fit into 80 columns; a narrower window cuts off the time that remains.
BAR_FORMAT = "{desc} {percentage:3.0f}%|{bar:4}| {n_fmt}/{total_fmt}{postfix} [<{remaining}]"


def bar(
    total: int, what: str, show: bool | None, *, unit: str, start: int = 0, leave: bool = False
) -> Any:
    """A tqdm bar.

    Args:
        show: None shows it where stderr is a terminal, and in a notebook.
        start: units done before.
        leave: whether it stays when it is full.
    """
    if show is None:
        show = sys.stderr.isatty() or in_notebook()
    return tqdm(
        total=total,
        initial=start,
        desc=what,
        unit=unit,
        disable=not show,
        leave=leave,
        bar_format=BAR_FORMAT,
        dynamic_ncols=True,
    )


def write_line(text: str) -> None:
    """Write a line on stderr, above the bars that are shown."""
    tqdm.write(text, file=sys.stderr)


def in_notebook() -> bool:
    """Whether the output is a notebook's, which is no terminal, and shows bars all the same."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config
