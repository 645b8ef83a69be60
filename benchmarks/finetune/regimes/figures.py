"""What the table says of one row of FAST: how it stands to the best baseline of its regime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from benchmarks.common import Record
from benchmarks.finetune.regimes.methods import METHODS, OURS, REGIMES, allowed
from benchmarks.finetune.regimes.runs import HALF_STEPS, USUAL_STEPS
from benchmarks.finetune.regimes.wise_ft import best_target
from benchmarks.finetune.regimes.work import WITHOUT_STEPS, better_rate, rows, runs_of

WISE_FT = "wise-ft"
Runs = list[Record]
Curve = list[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A row of FAST beside the baseline with the highest target accuracy in its regime.

    Accuracies are in 0..1, means over the seeds that both have; `share` is of the run.

    Attributes:
        ours: the row, as in `work.rows`.
        regime: the one that it is judged in; a row that switches nothing is in both.
        seeds: how many.
        target, lost: FAST's target accuracy, and the source accuracy that it has lost.
        baseline: the name of the best one, with what it switches.
        ahead: FAST's target accuracy minus its.
        its_lost: the source accuracy that it has lost.
        wise_ft: FAST's target accuracy minus WiSE-FT's where that has FAST's source accuracy.
        share: FAST's steps to its final target accuracy, as a share of its steps, as far as that
            was measured; None where it is not reached.
        curve: FAST's target accuracy by step.
    """

    ours: Record
    regime: str
    seeds: int
    target: float
    lost: float
    baseline: str
    ahead: float
    its_lost: float
    wise_ft: float | None
    share: float | None
    curve: Curve


def at_better_rate(records: Sequence[Record], row: Record) -> Runs:
    """The runs of a row at its better rate; where not all rates have been run, at the better of
    those that have."""
    runs = runs_of(records, row)
    if not runs:
        return []
    try:
        rate = better_rate(records, row)
    except LookupError:
        first = min(r["seed"] for r in runs)
        rate = max((r for r in runs if r["seed"] == first), key=lambda r: r["target"])["lr"]
    return [r for r in runs if r["lr"] == rate]


def by_seed(records: Sequence[Record], row: Record) -> dict[int, Record]:
    return {r["seed"]: r for r in at_better_rate(records, row)}


def lost(runs: Sequence[Record]) -> float:
    return mean(r["source_before"] - r["source"] for r in runs)


def curve(runs: Sequence[Record]) -> Curve:
    """Mean target accuracy over seeds, by step."""
    steps = [point["step"] for point in runs[0]["history"]]
    return [(s, mean(r["history"][i]["target"] for r in runs)) for i, s in enumerate(steps)]


def baselines(records: Sequence[Record], ours: Record, regime: str) -> dict[str, dict[int, Record]]:
    """The baselines that a row of FAST is compared with in a regime, by name, as runs by seed;
    among them WiSE-FT at the source accuracy of FAST's run of that seed."""
    names = [name for name in METHODS if name not in OURS]
    rivals = list(rows([ours["pair"]], names, _their_steps(ours), ours["samples"]))
    if _their_steps(ours) != USUAL_STEPS:
        rivals += rows([ours["pair"]], WITHOUT_STEPS, USUAL_STEPS, ours["samples"])
    runs = by_seed(records, ours)
    result: dict[str, dict[int, Record]] = {}
    for row in rivals:
        if not allowed(regime, row, ours["source_inputs"]):
            continue
        its = by_seed(records, row)
        shared = {seed: run for seed, run in its.items() if seed in runs}
        lines = {s: on_line(run, runs[s]["source"]) for s, run in shared.items() if "line" in run}
        switch = REGIMES[row["regime"]]
        entries = {f"{row['method']}, {switch}": shared, f"{WISE_FT}, {switch}": lines}
        result |= {name: its for name, its in entries.items() if its}
    return result


def _their_steps(ours: Record) -> int:
    """The steps of the baselines that a row of FAST is compared with."""
    return USUAL_STEPS if ours["steps"] == HALF_STEPS else int(ours["steps"])


def on_line(run: Record, source: float) -> Record:
    """A run of LP-FT as WiSE-FT ends it: on its line, where the source accuracy is as given."""
    target = best_target(run["line"], source)
    if target is None:  # nowhere on the line is the source known as well
        _, target, source = max(run["line"], key=lambda point: point[2])
    return {"target": target, "source": source, "source_before": run["source_before"]}


def compare(records: Sequence[Record], ours: Record, regime: str) -> Comparison | None:
    """None where FAST's row or every baseline is missing."""
    runs, rivals = by_seed(records, ours), baselines(records, ours, regime)
    if not rivals:
        return None
    ahead = {
        name: mean(runs[seed]["target"] - run["target"] for seed, run in its.items())
        for name, its in rivals.items()
    }
    best = min(ahead, key=lambda name: ahead[name])
    mine, its = [runs[seed] for seed in rivals[best]], list(rivals[best].values())
    goal, points = mean(r["target"] for r in its), curve(mine)
    reached = next((step for step, target in points if step and target >= goal), None)
    shorter = ours["steps"] / _their_steps(ours)
    return Comparison(
        ours=ours,
        regime=regime,
        seeds=len(mine),
        target=mean(r["target"] for r in mine),
        lost=lost(mine),
        baseline=best,
        ahead=ahead[best],
        its_lost=lost(its),
        wise_ft=min((a for n, a in ahead.items() if n.startswith(WISE_FT)), default=None),
        share=None if reached is None else reached / points[-1][0] * shorter,
        curve=points,
    )
