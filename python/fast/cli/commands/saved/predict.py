"""`fast predict`."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from fast.cli.report.table import shortened, terminal_width, text_table
from fast.cli.spec import PredictSpec
from fast.cli.task.run import job_of, open_run, own_columns, print_left_out
from fast.deploy.predictions import Predictions
from fast.errors import printable
from fast.files import check_writable_file

# Up to this many answers are read one by one; of more, a summary follows.
FEW = 40
# A terminal shows no more answers than this; a file, or another program, gets all.
SHOWN = 200
MOST_CLASSES = 12
# Characters of a file's name, at least.
LEAST_NAME = 20


def run(spec: PredictSpec) -> int:
    if spec.csv:
        check_writable_file(Path(spec.csv), "--csv")
    predictor = open_run(spec)
    own = own_columns(job_of(Path(spec.run)), spec.paths)
    answers = predictor.predict(
        [Path(path) for path in spec.paths],
        task=spec.task,
        column=spec.column or own.get("input_column"),
        skip_broken=spec.skip_broken,
    )
    print_left_out(answers.unreadable)
    print(_table(answers, spec.top))
    if len(answers) > FEW:
        print(f"\n{_counts(answers)}")
    if spec.csv:
        print(f"saved in {printable(answers.write_csv(spec.csv))}")
    return 0


def _table(answers: Predictions, top: int) -> str:
    best_of_each = answers.top(top)
    top = len(best_of_each[0])  # there may be fewer classes
    header = ["input", *(part for i in range(top) for part in (_ordinal(i), "%"))]
    rows = []
    on_screen = sys.stdout.isatty()
    shown = SHOWN if on_screen else len(answers)
    for name, best in zip(answers.names[:shown], best_of_each, strict=False):
        cells = [cell for label, p in best for cell in (printable(label), f"{100 * p:.1f}")]
        rows.append([printable(name), *cells])
    if on_screen:
        rows = _fitted(header, rows)
    rest = len(answers) - shown
    more = f"\n... and {rest} more: --csv FILE writes all" if rest > 0 else ""
    return text_table(header, rows, left=2) + more


def _fitted(header: list[str], rows: list[list[str]]) -> list[list[str]]:
    """The rows with names short enough for the terminal."""
    lines = text_table(header, [["", *row[1:]] for row in rows]).splitlines()
    width = max(map(len, lines))
    most = max(LEAST_NAME, terminal_width() - width + len(header[0]))
    return [[shortened(row[0], most), *row[1:]] for row in rows]


def _counts(answers: Predictions) -> str:
    """How often each class is the answer, the most frequent first."""
    counts = Counter(answers.labels).most_common(MOST_CLASSES)
    left_out = len(set(answers.labels)) - len(counts)
    more = f", and {left_out} other classes" if left_out else ""
    shown = ", ".join(f"{printable(label)} {count}" for label, count in counts)
    return f"{len(answers)} inputs: {shown}{more}"


def _ordinal(i: int) -> str:
    return "class" if i == 0 else f"{i + 1}."
