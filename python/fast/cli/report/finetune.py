"""What `fast finetune` shows: the plan before a run, and the summary after it."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import fast
from fast.adapt.config import Budget
from fast.adapt.plan import Plan
from fast.cli.report.table import percent, text_table
from fast.cli.task.load import LoadedTask
from fast.errors import printable


def plan_table(plan: Plan) -> str:
    """Each setting of a plan in a line."""
    rows = [[name, _shown(value)] for name, value in dataclasses.asdict(plan).items()]
    return text_table(["setting", "value"], rows, left=2)


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value) or "none"


def summary(task: LoadedTask, result: fast.Result, seconds: float) -> str:
    """What was learned and what was kept, as a line and a table."""
    plan, final = result.plan, result.final
    assert plan is not None
    rows = []
    if task.val is not None:
        rows.append(["target", "", percent(result.target_accuracy), str(task.sizes["val"])])
    if task.source is not None:
        before, after = result.source_accuracy_before, result.source_accuracy
        rows.append(["source", percent(before), percent(after), str(task.sizes["source"])])
    table = text_table(["accuracy, %", "before", "after", "samples"], rows) if rows else ""
    steps = result.history[-1]["step"]
    kept = "" if final["step"] == steps else f", kept the best, of step {final['step']}"
    if not final["step"]:
        kept = ", kept the head start: training made the validation accuracy worse"
    size = f"{plan.target_size} + {plan.source_size}" if plan.source_size else plan.target_size
    budget = _budget_line(task, result.config.forget_budget, final["forecast"])
    return (
        f"{printable(task.name)}: {plan.method}, {steps} steps of {size}, "
        f"lr {plan.lr:g}, {seconds:.0f} s{kept}\n\n{table}\n{budget}"
    )


def what_next(folder: Path) -> str:
    """What to type after a run."""
    run = shlex.quote(printable(folder))
    return (
        f"next:\n  fast predict {run} PATH...       classes of new inputs\n"
        f"  fast evaluate {run}             classes one by one, and the worst mistakes\n"
        f"  fast export {run} --format onnx -o FOLDER"
    )


def _budget_line(task: LoadedTask, option: str | float | None, lost: float | None) -> str:
    """What was allowed to be forgotten, and what was measured, or forecast, at the end."""
    if option is None or lost is None:
        return ""
    budget = Budget.parse(option)
    shown = f"{100 * lost:.2g} %" if budget.points else f"{lost:.2g} nats"
    how = (
        "forecast by the card: there were no source inputs to check on"
        if task.source_inputs is None
        else "measured on held-back source inputs"
    )
    return f"forget budget {budget}: {shown} lost at the end, {how}\n"
