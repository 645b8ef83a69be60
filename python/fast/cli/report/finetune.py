"""What `fast finetune` shows: the plan before a run, and the summary after it."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import fast
from fast.adapt.config import Budget
from fast.adapt.plan import Plan
from fast.cli.report.table import few_samples, percent, text_table
from fast.cli.task.load import LoadedTask
from fast.data.sources.types import is_drawn
from fast.errors import counted, printable
from fast.heads import classes_of
from fast.heads.find import Head

# How many parts of few samples are proposed.
FOLDS = 5
# How many classes are shown, the worst first.
LISTED = 12


def plan_table(plan: Plan, head: Head) -> str:
    """Each setting of a plan in a line, and the layer that makes the logits of the source."""
    rows = [[name, _shown(value)] for name, value in dataclasses.asdict(plan).items()]
    kind = f"{type(head.module).__name__}, {counted(classes_of(head.module), 'output')}"
    rows.append(["head_layer", f"{printable(head.name)} ({kind})"])
    return text_table(["setting", "value"], rows, left=2)


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value) or "none"


def summary(task: LoadedTask, result: fast.Result, seconds: float) -> str:
    """What was learned and what was kept, as a line and a table."""
    plan, final, first = result.plan, result.final, result.history[0]
    assert plan is not None
    target = (None, first["target_accuracy"], final["target_accuracy"])
    source = (
        result.source_accuracy_before,
        first["source_accuracy"],
        final["source_accuracy"],
    )
    rows = [
        [name, *map(percent, accuracies), str(task.sizes[part])]
        for name, part, accuracies in (("target", "val", target), ("source", "source", source))
        if getattr(task, part) is not None
    ]
    start = "head start" if plan.head_steps else "step 0"
    rows.insert(0, ["accuracy, %", "before", start, "after", "samples"])
    if task.source is None:  # the target has no accuracy before the run
        rows = [[name, *rest] for name, _, *rest in rows]
    table = f"\n{text_table(rows[0], rows[1:])}\n" if rows[1:] else ""
    steps = result.history[-1]["step"]
    kept = (
        "" if final["step"] == steps else f"; the best weights, of step {final['step']}, are kept"
    )
    if not final["step"]:
        kept = "; the head start is kept, because training made the validation accuracy worse"
    size = f"{plan.target_size} + {plan.source_size}" if plan.source_size else plan.target_size
    lost = _lost_line(task, result.config.forget_budget, final["forecast"])
    return (
        f"{printable(task.name)}: {plan.method}, {steps} steps of {size}, "
        f"lr {plan.lr:g}, {seconds:.0f} s{kept}\n{table}{_few(task)}{lost}"
        f"{_class_lines(result)}"
    )


def _few(task: LoadedTask) -> str:
    """A warning if the held-out samples are few, and how to measure on more."""
    warning = few_samples(task.sizes["val"]) if "val" in task.sizes else ""
    shared = is_drawn(task.description.get("data", {}))
    enough = sum(task.sizes[part] for part in ("train", "val") if part in task.sizes) >= FOLDS
    hint = f"; --folds {FOLDS} measures on all of them" if shared and enough else ""
    return warning and f"{warning}{hint}\n"


def _class_lines(result: fast.Result) -> str:
    """The accuracy of each class, the worst first; if there are many classes, of the worst."""
    if result.by_class is None or result.classes is None:
        return ""
    rows = [
        (right / count, name, count)
        for name, right, count in zip(result.classes, *result.by_class, strict=True)
        if count
    ]
    rows.sort(key=lambda row: (row[0], row[1]))
    shown = [[printable(name), percent(share), str(n)] for share, name, n in rows[:LISTED]]
    more = f"(the worst {LISTED} of {len(rows)} classes)\n" if len(rows) > LISTED else ""
    return "\n" + text_table(["class", "right, %", "samples"], shown) + f"\n{more}"


def what_next(folder: Path) -> str:
    """What to type after a run."""
    run = shlex.quote(printable(folder))
    commands = {
        f"fast predict {run} PATH...": "classes of new inputs",
        f"fast evaluate {run}": "classes one by one, and the worst mistakes",
        f"fast export {run} --format onnx -o FOLDER": "to run it elsewhere",
    }
    width = max(map(len, commands))
    return "\n".join(["next:", *(f"  {what:{width}}  {why}" for what, why in commands.items())])


def _lost_line(task: LoadedTask, option: str | float | None, lost: float | None) -> str:
    """What the source task has lost by the run's own measure, and its budget if there is one."""
    if lost is None:
        return ""
    if option is None:
        forecast = f"the source task has lost {lost:z.2f} nats, by forecast\n"
        return forecast if task.source is None else ""
    budget = Budget.parse(option)
    shown = f"{100 * lost:.2g} %" if budget.points else f"{lost:.2g} nats"
    how = (
        "forecast by the card: there were no source inputs to check on"
        if task.source_inputs is None
        else "measured on held-back source inputs"
    )
    return f"forget budget {budget}: {shown} lost at the end, {how}\n"
