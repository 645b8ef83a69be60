"""The tables: what was wanted and what was measured, misses first; then every pair and row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from statistics import mean

from benchmarks.common import Record, commits, learned_and_lost, table
from benchmarks.finetune.regimes.figures import Comparison, at_better_rate, compare, lost
from benchmarks.finetune.regimes.methods import METHODS, OURS, REGIMES, SWITCHED
from benchmarks.finetune.regimes.runs import USUAL_STEPS
from benchmarks.finetune.regimes.timing import ratio
from benchmarks.finetune.regimes.wanted import FEW, Figure, wanted
from benchmarks.finetune.regimes.work import PARTS, ROW, SEEDS, rows

MISS, MET, MISSING = "**miss**", "met", "not run"


def judged(
    method: str, pair: str, regime: str, steps: int, samples: int | None
) -> Sequence[Record]:
    """The rows of FAST on a pair that are judged in a regime: those that switch what the regime
    does, or where there is nothing to switch, those that switch nothing."""
    if regime not in METHODS[method].regimes:
        return []
    every = list(rows([pair], [method], steps, samples))
    return [row for row in every if row["regime"] == regime] or every


def comparisons(records: Sequence[Record], pairs: Iterable[str]) -> list[Comparison]:
    """FAST's rows beside the best baseline, as far as both have been run."""
    result = []
    for method, regime, (steps, samples), pair in product(OURS, REGIMES, PARTS, pairs):
        for row in judged(method, pair, regime, steps, samples):
            if (comparison := compare(records, row, regime)) is not None:
                result.append(comparison)
    return result


def summary(
    comparisons: Sequence[Comparison], times: Sequence[Record], samples: int | None
) -> list[Record]:
    """One line for each of FAST's rows, of runs of the usual length with so many samples of each
    class: means over pairs, and the worst pair in brackets."""
    lines: dict[tuple[str, str, bool], list[Comparison]] = {}
    for c in comparisons:
        if _length(c.ours) == _part(USUAL_STEPS, samples):
            lines.setdefault((c.ours["method"], c.regime, c.ours["source_inputs"]), []).append(c)
    return [
        {
            "method": mine[0].ours["method"],
            "regime": REGIMES[mine[0].regime],
            "source inputs": _inputs(mine[0].ours),
            "pairs": len(mine),
            "target minus the best baseline's": _points((c.ahead for c in mine), min, "+"),
            "source lost": _points((c.lost for c in mine), max),
            "by that baseline": _points((c.its_lost for c in mine), max),
        }
        | ({} if samples else {"time of a call / LP-FT's": _time(ratio(times, *key))})
        for key, mine in lines.items()
    ]


def _time(ratios: Sequence[float]) -> str:
    return f"{mean(ratios):.2f}" if ratios else "-"


def _points(
    values: Iterable[float], worst: Callable[[Iterable[float]], float], sign: str = ""
) -> str:
    points = [100 * value for value in values]
    return f"{mean(points):{sign}z.1f} ({worst(points):{sign}z.1f})"


def side_by_side(
    records: Sequence[Record], comparisons: Sequence[Comparison], pairs: Iterable[str]
) -> list[Record]:
    """One line for each pair: what each of FAST's rows learns and loses, all samples, and the best
    baseline of both regimes that had no source inputs."""
    lines = []
    for pair in pairs:
        rivals = [
            c
            for c in comparisons
            if c.ours["pair"] == pair and c.regime == SWITCHED and not c.ours["source_inputs"]
            if _length(c.ours) == _part(USUAL_STEPS, None)
        ]
        if not rivals:
            continue
        best = max(rivals, key=lambda c: c.target - c.ahead)
        line = {"pair": pair}
        for name, regime, inputs in product(OURS, REGIMES, (False, True)):
            if regime in METHODS[name].regimes and inputs in METHODS[name].source_inputs:
                of = dict(zip(ROW, (pair, name, regime, inputs, USUAL_STEPS, None), strict=True))
                column = name if name == "adapter" else f"{name}, {REGIMES[regime]}"
                column += ", source inputs" if inputs else ""
                line[column] = _learned_and_lost(at_better_rate(records, of))
        goal = f"{100 * (best.target - best.ahead):.1f}, {100 * best.its_lost:z.1f}"
        lines.append(line | {"best baseline": f"{goal} ({best.baseline})"})
    return lines


def _learned_and_lost(runs: Sequence[Record]) -> str:
    keys = ("target", "source", "source_before")
    seeds = f" [{len(runs)}]"
    return learned_and_lost({k: mean(r[k] for r in runs) for k in keys}) + seeds if runs else "-"


def verdicts(
    comparisons: Sequence[Comparison], times: Sequence[Record], pairs: int
) -> list[Record]:
    """One line for each figure that is wanted: misses first, those that are not measured last."""
    lines = []
    for method, regime in product(OURS, REGIMES):
        if regime not in METHODS[method].regimes:
            continue
        for inputs in METHODS[method].source_inputs:
            mine = [
                c
                for c in comparisons
                if (c.ours["method"], c.regime, c.ours["source_inputs"]) == (method, regime, inputs)
            ]
            for figure in wanted(inputs):
                values = figure.values(mine, ratio(times, method, regime, inputs))
                lines.append(_verdict(method, regime, inputs, figure, values, pairs))
    order = (MISS, MET, MISSING)
    return sorted(lines, key=lambda line: order.index(line["verdict"]))


def _verdict(
    method: str, regime: str, inputs: bool, figure: Figure, values: Sequence[float], pairs: int
) -> Record:
    # Accuracies are ratios of whole numbers, and their differences end in rounding.
    measured = round(figure.over(values), 9) if values else math.nan
    met = measured <= figure.bound if figure.at_most else measured >= figure.bound
    return {
        "verdict": (MET if met else MISS) if values else MISSING,
        "method": method,
        "regime": REGIMES[regime],
        "source inputs": "with" if inputs else "without",
        "figure": figure.name,
        "wanted": f"{'at most' if figure.at_most else 'at least'} {figure.bound:g}",
        "measured": f"{measured:.2f}" if values else "-",
        "pairs": f"{len(values)} of {figure.pairs or pairs}",
    }


def by_pair(comparisons: Sequence[Comparison]) -> list[Record]:
    """One line for each comparison; the one that is furthest behind comes first."""
    return [
        {
            "pair": c.ours["pair"],
            "method": c.ours["method"],
            "regime": REGIMES[c.regime],
            "source inputs": _inputs(c.ours),
            "steps, samples": _length(c.ours),
            "seeds": c.seeds,
            "target": f"{100 * c.target:.1f}",
            "best baseline": c.baseline,
            "minus its": f"{100 * c.ahead:+.1f}",
            "minus WiSE-FT's": "-" if c.wise_ft is None else f"{100 * c.wise_ft:+.1f}",
            "source lost, ours / its": f"{100 * c.lost:.1f} / {100 * c.its_lost:.1f}",
            "share of steps": "not reached" if c.share is None else f"{c.share:.2f}",
        }
        for c in sorted(comparisons, key=lambda c: c.ahead)
    ]


def curves(comparisons: Sequence[Comparison]) -> list[Record]:
    """The curves of what is behind its best baseline."""
    behind = [c for c in comparisons if c.ahead < 0]
    return [
        {
            "pair": c.ours["pair"],
            "method": f"{c.ours['method']}, {REGIMES[c.regime]}",
            "source inputs": _inputs(c.ours),
            "target accuracy by step": ", ".join(f"{s}: {100 * a:.1f}" for s, a in c.curve),
            "goal": f"{100 * (c.target - c.ahead):.1f}",
        }
        for c in sorted(behind, key=lambda c: c.ahead)
    ]


def all_rows(records: Sequence[Record], pairs: Iterable[str]) -> list[Record]:
    """Every row that has been run, at its better rate, by pair and length."""
    lines = []
    for (steps, samples), pair in product(PARTS, pairs):
        for row in rows([pair], METHODS, steps, samples):
            if not (runs := at_better_rate(records, row)):
                continue
            before, after = (mean(r[key] for r in runs) for key in ("source_before", "source"))
            lines.append(
                {
                    "pair": pair,
                    "steps, samples": _length(row),
                    "method": row["method"],
                    "regime": REGIMES[row["regime"]],
                    "source inputs": _inputs(row),
                    "lr": "-" if runs[0]["lr"] is None else f"{runs[0]['lr']:g}",
                    "seeds": len(runs),
                    "target": f"{100 * mean(r['target'] for r in runs):.1f}",
                    "source": f"{100 * before:.1f} -> {100 * after:.1f}",
                    "lost": f"{100 * lost(runs):.1f}",
                    "CPU seconds": f"{mean(r['cpu_seconds'] for r in runs):.0f}",
                }
            )
    return lines


def missing(records: Sequence[Record], pairs: Sequence[str]) -> list[Record]:
    """How many runs of each method and length there are, of those that the table needs."""
    lines = []
    for (steps, samples), name in product(PARTS, METHODS):
        needed = list(rows(pairs, [name], steps, samples))
        if not needed:
            continue
        done = sum(
            any(r["seed"] == seed for r in at_better_rate(records, row))
            for row, seed in product(needed, SEEDS)
        )
        if done < len(needed) * len(SEEDS):
            lines.append(
                {
                    "steps, samples": _length(needed[0]),
                    "method": name if METHODS[name].available else f"{name} (fast lacks it)",
                    "runs": f"{done} of {len(needed) * len(SEEDS)}",
                }
            )
    return lines


def _inputs(row: Record) -> str:
    return "with" if row["source_inputs"] else "without"


def _length(row: Record) -> str:
    return _part(row["steps"], row["samples"])


def _part(steps: int, samples: int | None) -> str:
    return f"{steps}, {samples or 'all'}"


def report(records: Sequence[Record], times: Sequence[Record], pairs: Sequence[str]) -> list[str]:
    compared = comparisons(records, pairs)
    figures = verdicts(compared, times, len(pairs))
    measured = [line for line in figures if line["verdict"] != MISSING]
    usual = [c for c in compared if _length(c.ours) == _part(USUAL_STEPS, None)]
    return [
        "# Two regimes",
        "",
        "In the regime of one function nothing is switched between the tasks; in that of two, "
        "norms or adapters are, and every baseline of the first is allowed too. The best "
        "baseline is the one with the highest target accuracy, WiSE-FT at FAST's source accuracy "
        "among them. Points of accuracy, means over seeds, then over pairs; the worst pair in "
        "brackets.",
        "",
        *table(summary(compared, times, None)),
        "",
        f"From {FEW} samples of each class:",
        "",
        *table(summary(compared, times, FEW)),
        "",
        "## Wanted and measured",
        "",
        f"The share of steps is of a run of {USUAL_STEPS}; runs that are planned for half as many "
        "stand beside it.",
        "",
        *table(measured),
        "",
        f"{len(figures) - len(measured)} of {len(figures)} figures are not measured yet.",
        "",
        "## Pair by pair",
        "",
        "Target accuracy in per cent, points of source accuracy lost, and the number of seeds. A "
        "network without batch norm has nothing to switch but adapters.",
        "",
        *table(side_by_side(records, compared, pairs)),
        "",
        "## Pairs, furthest behind first",
        "",
        f"Lengths are of a pair that is usually trained for {USUAL_STEPS} steps. The share of "
        "steps ends at the first sixth of the run at which FAST has the best baseline's final "
        "accuracy.",
        "",
        *(table(by_pair(compared)) or ["None has been run."]),
        "",
        "## Curves of what is behind at the usual length",
        "",
        *(table(curves(usual)) or ["None is behind."]),
        "",
        "## All rows, at the better of two rates",
        "",
        *table(all_rows(records, pairs)),
        "",
        "## Missing",
        "",
        *table(missing(records, pairs)),
        "",
        *([f"Commit {commits(records)}; {', '.join(sorted({r['machine'] for r in records}))}."]
          if records else []),
    ]  # fmt: skip
