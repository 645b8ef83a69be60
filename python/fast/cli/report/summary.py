"""Several runs of several methods, condensed to one row for each method."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fast.analysis.intervals import half_interval

if TYPE_CHECKING:
    from fast.train.result import Result

BASELINE = "vanilla"
NOTES = (
    "Mean over seeds ± half of its 95 % confidence interval (Student's t). Accuracies in %, source "
    "lost in points. Steps: the first evaluation at or above the baseline's final target accuracy, "
    "and its share of that run; a seed that never gets there counts as its whole run. Steps of the "
    "head alone, before the first (head_steps, of fast), are not counted; the seconds include them."
)


@dataclass
class Run:
    """One method, one seed. Accuracies in 0..1, seconds of wall clock with evaluations.

    `setting` is what it differs in from other runs of its method: a strength, a budget.
    """

    method: str
    seed: int
    lr: float
    history: list[dict[str, Any]]
    target_accuracy: float
    source_accuracy: float | None
    source_accuracy_before: float | None
    seconds: float
    setting: str = ""

    @classmethod
    def of(cls, result: Result, seconds: float, setting: str = "") -> Run:
        """From what `fast.finetune` gave back; it must have measured the target."""
        config = result.config
        if result.target_accuracy is None:
            raise ValueError("a comparison needs validation data of the target task")
        return cls(
            config.method,
            config.seed,
            result.lr,
            result.history,
            result.target_accuracy,
            result.source_accuracy,
            result.source_accuracy_before,
            round(seconds, 2),
            setting,
        )

    def __str__(self) -> str:
        kept = "" if self.source_accuracy is None else f", source {self.source_accuracy:.1%}"
        setting = f" {self.setting}" if self.setting else ""
        head = f"{self.method:8}{setting} seed {self.seed} lr {self.lr:g}"
        return f"{head}: target {self.target_accuracy:.1%}{kept}"

    @property
    def steps(self) -> int:
        return self.history[-1]["step"]


def summarise(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """`(header, rows)` of the comparison; the baseline is vanilla, or else the first method."""
    methods = list(dict.fromkeys(r.method for r in runs))
    baseline = BASELINE if BASELINE in methods else methods[0]
    of_baseline = [r for r in runs if r.method == baseline]
    goal = statistics.mean(r.target_accuracy for r in of_baseline)
    full = statistics.mean(r.steps for r in of_baseline)
    # Of the same network on the same data, hence the same in every run.
    before = runs[0].source_accuracy_before or 0.0
    with_source = runs[0].source_accuracy is not None
    header = ["method", "lr", "target"]
    header += ["source before", "source after", "source lost"] if with_source else []
    header += [f"steps to {baseline}'s {100 * goal:.1f}", "seconds"]
    rows = []
    for method in methods:
        mine = [r for r in runs if r.method == method]
        row = [method, f"{mine[0].lr:g}", spread([r.target_accuracy for r in mine])]
        if with_source:
            after = [r.source_accuracy for r in mine if r.source_accuracy is not None]
            row += [
                spread([before]),
                spread(after),
                spread([before - accuracy for accuracy in after]),
            ]
        row += [_steps(mine, goal, full), f"{statistics.mean(r.seconds for r in mine):.0f}"]
        rows.append(row)
    return header, rows


def intervals(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """For each method and setting: mean and half interval of target and source, in 0..1.

    A half interval is None where there is one seed, a source figure where none was measured.
    """
    found = []
    for method, setting in dict.fromkeys((r.method, r.setting) for r in runs):
        mine = [r for r in runs if (r.method, r.setting) == (method, setting)]
        row: dict[str, Any] = {"method": method, "setting": setting, "seeds": len(mine)}
        source = [r.source_accuracy for r in mine if r.source_accuracy is not None]
        for name, values in (("target", [r.target_accuracy for r in mine]), ("source", source)):
            row[name] = statistics.mean(values) if values else None
            row[f"{name}_half"] = half_interval(values) if len(values) > 1 else None
        found.append(row)
    return found


def steps_to(history: Sequence[dict[str, Any]], accuracy: float) -> int | None:
    """The first evaluated step with at least this target accuracy; None if there is none."""
    for row in history:
        reached = row.get("target_accuracy")
        if reached is not None and reached >= accuracy - 1e-9:
            return row["step"]
    return None


def spread(values: Sequence[float]) -> str:
    """Mean of accuracies in 0..1 and half of its confidence interval, in %: `90.1 ± 0.4`."""
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * half_interval(values):.1f}"


def _steps(runs: Sequence[Run], goal: float, full: float) -> str:
    found = [steps_to(r.history, goal) for r in runs]
    reached = sum(step is not None for step in found)
    if not reached:
        return "not reached"
    # Without the seeds that missed it a method would look the faster the more of them it has.
    taken = [r.steps if step is None else step for r, step in zip(runs, found, strict=True)]
    text = f"{statistics.mean(taken):.0f} ({statistics.mean(taken) / full:.2f})"
    return text if reached == len(runs) else f"{text}, {reached} of {len(runs)} seeds"
