"""`fast compare`."""

from __future__ import annotations

import shlex
import sys

from fast.cli.report.html import save_curves, write_report
from fast.cli.report.machine import describe
from fast.cli.report.results import note_replaced, write_results
from fast.cli.report.summary import intervals, settings, summarise, verdict
from fast.cli.report.table import paragraph, text_table
from fast.cli.runs import Runner, opened, runnable
from fast.cli.spec import CompareSpec
from fast.cli.spec.base import shown


def run(spec: CompareSpec) -> int:
    with opened(spec, "compare") as (task, folder):
        note_replaced(folder / "results.json", spec)
        runner = Runner(spec, task, folder)
        runs = [r for method in runnable(spec.methods, task) for r in runner.all_seeds(method)]
    header, rows = summarise(runs)
    words = verdict(runs, task.sizes["val"])
    save_curves(runs, task.name, folder / "curves.png")
    write_results(
        folder / "results.json",
        spec,
        samples=task.sizes,
        summary=[dict(zip(header, row, strict=True)) for row in rows],
        intervals=intervals(runs),
        verdict=words,
        runs=[vars(r) for r in runs],
    )
    write_report(
        folder / "report.html",
        title=f"{task.name}: {len(runs)} runs",
        verdict=words,
        table=(header, rows),
        settings=settings(runs),
        command=shlex.join(["fast", *sys.argv[1:]]),
        figure=(folder / "curves.png").read_bytes(),
        options=shown(spec),
        machine=describe(),
    )
    print("\n" + text_table(header, rows))
    print("\n" + paragraph(words))
    print(f"\n{folder}: curves.png, report.html, results.json")
    return 0
