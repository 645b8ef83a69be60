"""`fast predict`."""

from __future__ import annotations

import sys
from pathlib import Path

from fast.cli.report.table import text_table
from fast.cli.spec import PredictSpec
from fast.cli.task.run import open_run
from fast.deploy.predictions import Predictions
from fast.errors import printable


def run(spec: PredictSpec) -> int:
    predictor = open_run(spec)
    answers = predictor.predict(
        [Path(path) for path in spec.paths],
        task=spec.task,  # type: ignore[arg-type]
        column=spec.column,
        skip_broken=spec.skip_broken,
    )
    for name, reason in answers.unreadable.items():
        print(f"note: {printable(name)}: left out: {printable(reason)}", file=sys.stderr)
    print(_table(answers, spec.top))
    if spec.csv:
        print(f"saved in {printable(answers.write_csv(spec.csv))}")
    return 0


def _table(answers: Predictions, top: int) -> str:
    header = ["input", *(part for i in range(top) for part in (_ordinal(i), "%"))]
    rows = []
    for name, best in zip(answers.names, answers.top(top), strict=True):
        cells = [cell for label, p in best for cell in (printable(label), f"{100 * p:.1f}")]
        rows.append([printable(name), *cells, *[""] * (2 * top - len(cells))])
    return text_table(header, rows, left=2)


def _ordinal(i: int) -> str:
    return "class" if i == 0 else f"{i + 1}."
