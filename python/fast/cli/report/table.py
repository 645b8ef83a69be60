"""Small tables: as text for a terminal, as HTML for the report."""

from __future__ import annotations

import html
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence

# What every terminal shows in a line.
WIDTH = 80
# Between the columns of a table; and of what is broken into lines, at least.
GAP, LEAST_WIDTH = 2, 20


def percent(value: float | None) -> str:
    """0.9171 -> `91.7`; nothing for what was not measured."""
    return "" if value is None else f"{100 * value:.1f}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """The first `left` columns to the left, the others to the right, two spaces between.

    A table that is wider than `WIDTH` gets headings of several lines, and a last column of several
    lines where that is to the left.
    """
    count = len(header)
    cells = [max((len(row[i]) for row in rows), default=0) for i in range(count)]
    widths = [max(*pair) for pair in zip(cells, map(len, header), strict=True)]
    if _total(widths) > WIDTH:
        words = [max(map(len, heading.split()), default=0) for heading in header]
        widths = [max(*pair) for pair in zip(cells, words, strict=True)]
    if _total(widths) > WIDTH and left == count:
        widths[-1] = max(LEAST_WIDTH, WIDTH - _total(widths[:-1]) - GAP)
    head = [textwrap.wrap(text, max(1, width)) for text, width in zip(header, widths, strict=True)]
    lines = [*_spread(head, at_end=True), ["-" * width for width in widths]]
    for row in rows:
        last = textwrap.wrap(row[-1], max(1, widths[-1])) if left == count else [row[-1]]
        lines += _spread([*([cell] for cell in row[:-1]), last])
    return "\n".join(_line(line, widths, left) for line in lines)


def paragraph(text: str) -> str:
    """A text without breaks, broken between words where a terminal would break it inside them."""
    return textwrap.fill(text, terminal_width()) if sys.stdout.isatty() else text


def terminal_width() -> int:
    """Columns of the terminal; `WIDTH` where it does not say."""
    return shutil.get_terminal_size((WIDTH, 24)).columns


def shortened(text: str, most: int) -> str:
    """At most so many characters: the middle goes, because names of files differ at their ends."""
    if len(text) <= most:
        return text
    end = max(1, 2 * (most - 1) // 3)
    return f"{text[: max(0, most - 1 - end)]}…{text[-end:]}"


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n"
        for row in rows
    )
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + GAP * (len(widths) - 1)


def _spread(cells: Sequence[Sequence[str]], at_end: bool = False) -> Iterator[list[str]]:
    """Cells of several lines each, line by line."""
    height = max(1, *map(len, cells))
    for i in range(height):
        shift = [height - len(cell) if at_end else 0 for cell in cells]
        yield [
            cell[i - skip] if 0 <= i - skip < len(cell) else ""
            for cell, skip in zip(cells, shift, strict=True)
        ]


def _line(cells: Sequence[str], widths: Sequence[int], left: int) -> str:
    return (
        (" " * GAP)
        .join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        .rstrip()
    )
