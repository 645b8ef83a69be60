"""Small tables: as text for a terminal, as HTML for the report."""

from __future__ import annotations

import html
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence

# Every terminal shows this many columns in a line.
WIDTH = 80
# Spaces between the columns of a table; least width of a column that is broken into lines.
GAP, LEAST_WIDTH = 2, 20


def percent(value: float | None) -> str:
    """0.9171 -> `91.7`; None, which was not measured, -> an empty text."""
    return "" if value is None else f"{100 * value:.1f}"


def few_samples(count: int) -> str:
    """A warning if so few samples measure an accuracy with a standard error of 5 points or more.

    The standard error is largest at an accuracy of one half, where it is 0.5 / sqrt(count).
    """
    points = 50 / max(1, count) ** 0.5
    if points < 5:
        return ""
    return f"{count} samples measure an accuracy to within {points:.0f} points (one standard error)"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table whose first `left` columns are aligned to the left, and the others to the right.

    If it is wider than `WIDTH`, its headings are broken into lines, and so is the last column if
    that is aligned to the left.
    """
    count = len(header)
    cells = [max((columns(row[i]) for row in rows), default=0) for i in range(count)]
    widths = [max(*pair) for pair in zip(cells, map(columns, header), strict=True)]
    if _total(widths) > WIDTH:
        words = [max(map(columns, heading.split()), default=0) for heading in header]
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
    """A text of one line, broken between words if it is printed on a terminal."""
    return textwrap.fill(text, terminal_width()) if sys.stdout.isatty() else text


def terminal_width() -> int:
    """The number of columns of the terminal; `WIDTH` if it does not say."""
    return shutil.get_terminal_size((WIDTH, 24)).columns


def shortened(text: str, most: int) -> str:
    """A text cut to `most` characters in its middle: names of files differ at their ends."""
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


def columns(text: str) -> int:
    """How many columns a text takes: two for each wide character, none for an accent."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(map(bool, map(unicodedata.combining, text)))


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
            cell + " " * (width - columns(cell))
            if i < left
            else " " * (width - columns(cell)) + cell
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        .rstrip()
    )
