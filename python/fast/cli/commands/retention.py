"""`fast retention`."""

from __future__ import annotations

import csv
import dataclasses
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fast.adapt.config import Budget
from fast.adapt.plan import Plan
from fast.analysis import plots
from fast.cli.report.results import note_replaced, write_results
from fast.cli.report.summary import Run, intervals, spread
from fast.cli.report.table import text_table
from fast.cli.runs import Runner, opened, runnable
from fast.cli.spec import RetentionSpec
from fast.cli.spec.methods import STRENGTHS
from fast.cli.task.load import LoadedTask
from fast.figures import save
from fast.files import atomic_file

# The settings that a strength multiplies.
HOLDS = ("anchor_decay", "distill", "rehearse")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One point of a curve: its label, what its runs are called, and options of `fast.finetune`."""

    label: str = ""
    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)


def run(spec: RetentionSpec) -> int:
    with opened(spec, "retention") as (task, folder):
        points = {
            method: settings(
                task.plan(dataclasses.replace(spec.training, method=method)),
                spec.strengths,
                spec.budgets,
            )
            for method in runnable(spec.methods, task)
        }
        note_replaced(folder / "retention.json", spec)
        runner = Runner(spec, task, folder)
        curves = [
            (setting, runner.all_seeds(method, setting.name, **setting.options))
            for method, curve in points.items()
            for setting in curve
        ]
    _write(spec, task, folder, curves)
    return 0


def settings(
    plan: Plan,
    strengths: tuple[float, ...] | None = None,
    budgets: tuple[str, ...] | None = None,
) -> list[Setting]:
    """The points of one method's curve, the weakest first.

    Args:
        plan: what the method does without a sweep.
    """
    held = {name: value for name in HOLDS if (value := getattr(plan, name))}
    if not held:
        return [Setting()]
    if budgets:
        ordered = sorted(budgets, key=lambda b: -Budget.parse(b).amount)
        return [Setting(label=b, name=f"budget {b}", options={"forget_budget": b}) for b in ordered]
    points = []
    for strength in sorted(set(strengths or STRENGTHS)):
        options: dict[str, Any] = {name: strength * value for name, value in held.items()}
        if plan.rehearsed and not strength:
            # Without rehearsal, rate, ramp and batch norm would be others: they are kept.
            options |= {"lr": plan.lr, "ramp": plan.ramp, "batch_norm": plan.batch_norm}
        label = f"{strength:g}"
        points.append(Setting(label=label, name=f"strength {label}", options=options))
    return points


def _write(
    spec: RetentionSpec, task: LoadedTask, folder: Path, curves: list[tuple[Setting, list[Run]]]
) -> None:
    before = curves[0][1][0].source_accuracy_before or 0.0
    points = [_point(setting, seeds) for setting, seeds in curves]
    header = ["method", "budget" if spec.budgets else "strength", "target", "source", "lost"]
    rows = [_row(setting, seeds, before) for setting, seeds in curves]
    figure = plots.retention(points, title=task.name, source_before=before)
    save(figure, folder / "retention.png")
    with atomic_file(folder / "retention.csv") as temporary:
        temporary.write_text(_csv(points))
    write_results(
        folder / "retention.json",
        spec,
        samples=task.sizes,
        source_accuracy_before=before,
        points=points,
    )
    print("\n" + text_table(header, rows, left=2))
    print(
        f"\nAccuracies in %, mean over seeds ± half of the 95 % interval; source before: "
        f"{100 * before:.1f}\n{folder}: retention.png, retention.csv, retention.json"
    )


def _point(setting: Setting, seeds: list[Run]) -> dict[str, Any]:
    """The runs of a setting as a point of the figure and the files."""
    (row,) = intervals(seeds)
    return {**row, "label": setting.label, **setting.options, "lr": seeds[0].lr}


def _row(setting: Setting, seeds: list[Run], before: float) -> list[str]:
    """The runs of a setting as a row of the table.

    Args:
        before: the source accuracy before any run.
    """
    after = [r.source_accuracy for r in seeds if r.source_accuracy is not None]
    target = spread([r.target_accuracy for r in seeds])
    return [
        seeds[0].method, setting.label, target, spread(after), spread([before - a for a in after]),
    ]  # fmt: skip


def _csv(points: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(k for p in points for k in p)))
    writer.writeheader()
    writer.writerows(points)
    return text.getvalue()
