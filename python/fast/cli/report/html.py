"""`report.html`: table, curves, options and versions in one file that fetches nothing."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fast.analysis import plots
from fast.cli.report.summary import NOTES, Run, by_method
from fast.cli.report.table import html_table
from fast.figures import save
from fast.files import atomic_file

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
.plain td { text-align: left; font-family: ui-monospace, monospace; font-size: 13px; }
.scroll { overflow-x: auto; }
img { max-width: 100%; height: auto; background: white; border-radius: 4px; }
.sheet { display: flex; flex-wrap: wrap; gap: 1rem; }
.sheet figure { margin: 0; width: 10rem; } .sheet img { width: 10rem; }
figcaption { font-size: 13px; overflow-wrap: anywhere; }
p.note { opacity: .75; font-size: 13px; max-width: 50rem; }
"""


def save_curves(runs: Sequence[Run], title: str, path: Path) -> None:
    """Target and source accuracy of each method over the steps, as a PNG."""
    histories = {method: [r.history for r in seeds] for method, seeds in by_method(runs).items()}
    figure = plots.comparison(histories, title=title, source_before=runs[0].source_accuracy_before)
    save(figure, path)


def write_report(
    path: Path,
    *,
    title: str,
    verdict: str,
    table: Table,
    figure: bytes,
    settings: Table,
    options: Mapping[str, Any],
    command: str,
    machine: Mapping[str, str],
) -> None:
    """Write the report, whole or not at all.

    Args:
        verdict: the outcome in words.
        figure: a PNG, which becomes part of the file.
        settings: the values that each method ran with.
        options: the options that were given.
        command: the command line.
    """
    body = f"""<p>{html.escape(verdict)}</p>
<div class="scroll">{html_table(*table)}</div>
<p class="note">{html.escape(NOTES)} The seconds include them.</p>
<h2>Curves</h2>
{picture(figure, "Target and source accuracy of each method")}
<h2>Values used</h2>
<div class="plain scroll">{html_table(*settings)}</div>
<h2>Options given</h2>
<pre class="scroll">{html.escape(command)}</pre>
{pairs(options)}
<h2>Machine</h2>
{pairs(machine)}
"""
    write_page(path, title, body)


def write_page(path: Path, title: str, body: str) -> None:
    """Write a page that fetches nothing, whole or not at all."""
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
{body}</body>
</html>
"""
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")


def picture(data: bytes, words: str, kind: str = "png") -> str:
    """A picture inside the page, with a description in words."""
    encoded = base64.b64encode(data).decode("ascii")
    return f'<img alt="{html.escape(words)}" src="data:image/{kind};base64,{encoded}">'


def pairs(values: Mapping[str, Any]) -> str:
    """A table of names and values."""
    rows = [[name, _plain(value)] for name, value in values.items()]
    return f'<div class="plain scroll">{html_table(["", ""], rows)}</div>'


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
