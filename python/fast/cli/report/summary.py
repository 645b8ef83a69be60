"""Condense several runs of several methods to one row for each method."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fast.adapt.result import Record, Result
from fast.analysis.intervals import half_interval
from fast.cli.report.table import few_samples

BASELINE = "vanilla"
NOTES = (
    "Mean over seeds ± half of its 95 % confidence interval (Student's t). Accuracies in %, source "
    "lost in points. Steps: the first evaluation at or above the baseline's final target accuracy, "
    "and its share of that run; a seed that never gets there counts as its whole run. Steps of the "
    "head alone, before the first (head_steps, of fast), are not counted."
)


@dataclass(kw_only=True)
class Run:
    """The result of one method with one seed.

    Attributes:
        target_accuracy, source_accuracy, source_accuracy_before: in 0..1.
        seconds: wall clock, with evaluations.
        setting: how it differs from other runs of its method, such as `"strength 0.1"`.
        plan: the settings that its options came to; None for a run that an older version kept.
    """

    method: str
    seed: int
    lr: float
    history: list[Record]
    target_accuracy: float
    source_accuracy: float | None
    source_accuracy_before: float | None
    seconds: float
    setting: str = ""
    plan: dict[str, Any] | None = None

    @classmethod
    def of(cls, result: Result, seconds: float, setting: str = "") -> Run:
        """The run that gave `result`.

        Raises:
            ValueError: it did not measure the target.
        """
        if result.target_accuracy is None:
            raise ValueError("a comparison needs validation data of the target task")
        return cls(
            method=result.config.method,
            seed=result.config.seed,
            lr=result.lr,
            history=result.history,
            target_accuracy=result.target_accuracy,
            source_accuracy=result.source_accuracy,
            source_accuracy_before=result.source_accuracy_before,
            seconds=round(seconds, 2),
            setting=setting,
            plan=dataclasses.asdict(result.plan) if result.plan else None,
        )

    def __str__(self) -> str:
        kept = "" if self.source_accuracy is None else f", source {self.source_accuracy:.1%}"
        setting = f" {self.setting}" if self.setting else ""
        head = f"{self.method:8}{setting} seed {self.seed} lr {self.lr:g}"
        return f"{head}: target {self.target_accuracy:.1%}{kept}"

    @property
    def steps(self) -> int:
        return self.history[-1]["step"]


def by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each method, in their order."""
    groups: dict[str, list[Run]] = {}
    for r in runs:
        groups.setdefault(r.method, []).append(r)
    return groups


def summarise(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """`(header, rows)` of the comparison; the baseline is vanilla, or else the first method."""
    methods = by_method(runs)
    baseline = BASELINE if BASELINE in methods else next(iter(methods))
    goal = statistics.mean(r.target_accuracy for r in methods[baseline])
    full = statistics.mean(r.steps for r in methods[baseline])
    # Every run starts with the same network and the same data.
    before = runs[0].source_accuracy_before or 0.0
    with_source = runs[0].source_accuracy is not None
    header = ["method", "lr", "target"]
    header += ["source before", "source after", "source lost"] if with_source else []
    header += [f"steps to {baseline}'s {100 * goal:.1f}", "seconds"]
    rows = []
    for method, seeds in methods.items():
        row = [method, f"{seeds[0].lr:g}", spread([r.target_accuracy for r in seeds])]
        if with_source:
            after = [r.source_accuracy for r in seeds if r.source_accuracy is not None]
            row += [spread([before]), spread(after), spread([before - a for a in after])]
        row += [_steps(seeds, goal, full), f"{statistics.mean(r.seconds for r in seeds):.0f}"]
        rows.append(row)
    return header, rows


def verdict(runs: Sequence[Run], samples: int) -> str:
    """The outcome of the comparison in words: the first method against each of the others.

    Args:
        samples: on how many samples the target's accuracy is measured.
    """
    methods = by_method(runs)
    first, *others = methods
    sentences = []
    for other in others:
        amount, than, remark = _in_words(
            *_difference(methods[first], methods[other], "target_accuracy")
        )
        sentence = f"{first} learns {amount} {than} {other}{remark}"
        if runs[0].source_accuracy is not None:
            amount, _, remark = _in_words(
                *_difference(methods[first], methods[other], "source_accuracy")
            )
            sentence += f", and keeps {amount} of the source task{remark}"
        sentences.append(sentence + ".")
    if others and min(map(len, methods.values())) < 2:
        sentences.append("There is one seed of each: another may come out differently.")
    if others and (few := few_samples(samples)):
        sentences.append(f"{few}.")
    return " ".join(sentences)


def _difference(a: Sequence[Run], b: Sequence[Run], name: str) -> tuple[float, float | None]:
    """Mean difference of two methods in points, and half of its 95 % interval over the seeds that
    both have (None for a single one)."""
    others = {run.seed: getattr(run, name) for run in b}
    differences = [100 * (getattr(r, name) - others[r.seed]) for r in a if r.seed in others]
    half = half_interval(differences) if len(differences) > 1 else None
    return statistics.mean(differences), half


def _in_words(mean: float, half: float | None) -> tuple[str, str, str]:
    """A difference, the word before what it is compared with, and a remark:
    `("2.1 points more", "than", "")`."""
    if round(abs(mean), 1) == 0:
        return "as much", "as", ""
    if half is not None and abs(mean) <= half:
        return "about as much", "as", f" ({mean:+.1f} ± {half:.1f} points, which is undecided)"
    return f"{abs(mean):.1f} points {'more' if mean > 0 else 'less'}", "than", ""


def settings(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """`(header, rows)` of the values that the first run of each method had."""
    plans = {name: seeds[0].plan for name, seeds in by_method(runs).items() if seeds[0].plan}
    names = list(dict.fromkeys(key for plan in plans.values() if plan for key in plan))
    rows = [
        [name, *(_shown((plan or {}).get(name)) for plan in plans.values())]
        for name in names
        if name != "method"
    ]
    return ["setting", *plans], rows


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "" if value is None else str(value)


def intervals(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """For each method and setting: mean and half interval of target and source, in 0..1.

    A half interval is None if there is one seed, a figure of the source if none was measured.
    """
    rows = []
    for method, setting in dict.fromkeys((r.method, r.setting) for r in runs):
        seeds = [r for r in runs if (r.method, r.setting) == (method, setting)]
        row: dict[str, Any] = {"method": method, "setting": setting, "seeds": len(seeds)}
        source = [r.source_accuracy for r in seeds if r.source_accuracy is not None]
        for name, values in (("target", [r.target_accuracy for r in seeds]), ("source", source)):
            row[name] = statistics.mean(values) if values else None
            row[f"{name}_half"] = half_interval(values) if len(values) > 1 else None
        rows.append(row)
    return rows


def steps_to(history: Sequence[Record], accuracy: float) -> int | None:
    """The first evaluated step with at least this target accuracy; None if there is none."""
    for row in history:
        reached = row.get("target_accuracy")
        if reached is not None and reached >= accuracy - 1e-9:
            return row["step"]
    return None


def spread(values: Sequence[float]) -> str:
    """Mean of accuracies in 0..1 and half of its confidence interval, in %: `90.1 ± 0.4`."""
    mean = f"{100 * statistics.mean(values):z.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * half_interval(values):.1f}"


def _steps(runs: Sequence[Run], goal: float, full: float) -> str:
    """Mean steps to the accuracy `goal`, and their share of the baseline's `full` run."""
    firsts = [steps_to(r.history, goal) for r in runs]
    reached = sum(step is not None for step in firsts)
    if not reached:
        return "not reached"
    # Without the seeds that missed it a method would look the faster the more of them it has.
    steps = [r.steps if first is None else first for r, first in zip(runs, firsts, strict=True)]
    text = f"{statistics.mean(steps):.0f} ({statistics.mean(steps) / full:.2f})"
    return text if reached == len(runs) else f"{text}, {reached} of {len(runs)}"
