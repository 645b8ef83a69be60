"""What the tables say of the runs of one method on one pair."""

from __future__ import annotations

from collections import defaultdict
from statistics import mean

from benchmarks.common import Record

Runs = list[Record]


def curve(runs: Runs, key: str) -> list[tuple[int, float]]:
    """Mean over seeds of one figure of the history, as (step, value)."""
    points = defaultdict(list)
    for run in runs:
        for record in run["history"]:
            if record[key] is not None:
                points[record["step"]].append(record[key])
    return [(step, mean(values)) for step, values in sorted(points.items())]


def final(runs: Runs, key: str) -> float:
    """The figure at the end of the run, mean over seeds."""
    return curve(runs, key)[-1][1]


def lost(runs: Runs) -> float:
    """Source accuracy lost, mean over seeds."""
    return mean(r["source_before"] for r in runs) - final(runs, "source_accuracy")


def source_change(runs: Runs) -> str:
    """Source accuracy before and after, per cent."""
    before = mean(r["source_before"] for r in runs)
    return f"{100 * before:.1f} -> {100 * final(runs, 'source_accuracy'):.1f} %"


def steps_to(runs: Runs, accuracy: float) -> int | None:
    """First evaluated step at which the mean target accuracy is reached, or None."""
    return next((s for s, a in curve(runs, "target_accuracy") if s and a >= accuracy), None)


def best_rate(records: Runs, pair: str, method: str, first_seed_only: bool = False) -> Runs:
    """The runs of a method on a pair at its better learning rate, by final target accuracy.

    Args:
        first_seed_only: let the lowest seed choose the rate, since only that one tried them all.
    """
    runs = [r for r in records if (r["pair"], r["method"]) == (pair, method)]
    first = min(r["seed"] for r in runs)
    scores = {
        lr: final(
            [r for r in runs if r["lr"] == lr and (r["seed"] == first or not first_seed_only)],
            "target_accuracy",
        )
        for lr in dict.fromkeys(r["lr"] for r in runs if r["seed"] == first or not first_seed_only)
    }
    lr = max(scores, key=lambda rate: scores[rate])
    return [r for r in runs if r["lr"] == lr]
