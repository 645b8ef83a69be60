"""What users wait for: from the call to the accuracy they came for, and where the time goes.

    python -m benchmarks.finetune.whole_run --data FOLDER
    python -m benchmarks.finetune.whole_run --data FOLDER --profile

Times are processor seconds of whole calls of `fast.finetune` on one thread, everything in them:
reading what is asked, calibration, head start, steps, guards, evaluation, checks. The goal of a
pair is the better final accuracy of LP-FT and vanilla AdamW, at the better of two rates (those of
`benchmarks/results/retention.md`), and a run has reached it at its first evaluation, ten in a run,
with as much. Finished runs are kept in `benchmarks/results/whole_run.jsonl` and not run again.

With `--profile` every function of a run is timed, and each function of FAST is charged with what it
and the libraries below it took, but for the network's own passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import mean

from benchmarks.common import Record, arguments, commits, complete, save, table
from benchmarks.finetune.whole_run.runs import BASELINES, LARGEST, OURS, profile, run

NAME, PROFILES = "whole_run", "whole_run_profile"
PAIRS = "resnet20 -> sign_digits,mobilenet 0.25 -> flowers,minilm -> trec6"
PROFILED = "mobilenet 0.25 -> flowers,minilm -> trec6"
WANTED_SHARE, WANTED_START = 0.4, 0.03


def reached(record: Record, goal: float) -> float | None:
    """Seconds to the first evaluation with that accuracy."""
    return next((seconds for _, seconds, accuracy in record["curve"] if accuracy >= goal), None)


def best_baseline(here: Sequence[Record]) -> tuple[str, float, float] | None:
    """The baseline of a pair that ends with the best accuracy, that accuracy, and its seconds."""
    ends = {
        method: mean(r["curve"][-1][2] for r in here if r["method"] == method)
        for method in BASELINES
        if any(r["method"] == method for r in here)
    }
    if not ends:
        return None
    best = max(ends, key=lambda method: ends[method])
    return best, ends[best], mean(r["seconds"] for r in here if r["method"] == best)


def compared(runs: Sequence[Record], best: str, goal: float, theirs: float) -> tuple[Record, str]:
    """A row of the table, and which of its figures miss what was wanted.

    Args:
        runs: of one of our methods on a pair.
        best, goal, theirs: see `best_baseline`.
    """
    times = [reached(r, goal) for r in runs]
    in_time = [t for t in times if t is not None]
    share = mean(in_time) / theirs if len(in_time) == len(times) else None
    start = mean(r["curve"][0][1] / r["seconds"] for r in runs)
    missed = {
        "goal": share is None or share > WANTED_SHARE,
        "start": start > WANTED_START,
    }
    row = {
        "pair": runs[0]["pair"],
        "method": runs[0]["method"],
        "seeds": len(runs),
        "goal": f"{100 * goal:.1f} % ({best}, {theirs:.0f} s)",
        "ends at": f"{100 * mean(r['curve'][-1][2] for r in runs):.1f} %",
        "time to it / baseline's call": "not reached" if share is None else f"{share:.2f}",
        "whole call / baseline's": f"{mean(r['seconds'] for r in runs) / theirs:.2f}",
        "before the first step": f"{100 * start:.1f} %",
    }
    return row, ", ".join(name for name, is_missed in missed.items() if is_missed)


def report(records: Sequence[Record], profiles: Sequence[Record]) -> Iterator[str]:
    """What was wanted and missed, then the rows."""
    rows, misses = [], []
    for pair in dict.fromkeys(r["pair"] for r in records):
        here = [r for r in records if r["pair"] == pair]
        baseline = best_baseline(here)
        for method in OURS if baseline else ():
            runs = [r for r in here if r["method"] == method]
            if runs and baseline:
                row, missed = compared(runs, *baseline)
                rows.append(row)
                misses += [f"{pair}, {method}: {missed}"] if missed else []
    yield (
        f"Wanted: the goal in at most {WANTED_SHARE} of the best baseline's call, and at most "
        f"{100 * WANTED_START:.0f} % of the call before the first step, the first evaluation "
        "included. Missed:"
    )
    yield from ["", *(f"* {miss}" for miss in misses or ["nothing"]), "", *table(rows), ""]
    yield from where_time_goes(profiles)
    yield f"Processor seconds; commit {commits([*records, *profiles])}."
    yield from dict.fromkeys(f"\n{r['machine']}" for r in records)


def where_time_goes(profiles: Sequence[Record]) -> Iterator[str]:
    """The largest functions of each profile that are not the network's."""
    if profiles:
        yield "## Where the time goes that is not the network's"
        yield ""
    for r in profiles:
        whole = r["network"] + r["other"]
        yield (
            f"{r['pair']}, {r['method']}: the network's own passes took "
            f"{100 * r['network'] / whole:.1f} % of {whole:.0f} s. The {LARGEST} largest others:"
        )
        yield ""
        yield from table(
            {"function": f"`{name}`", "share of the call": f"{100 * seconds / whole:.2f} %"}
            for name, seconds in r["largest"]
        )
        yield ""


def main() -> None:
    parser = arguments(__doc__, PAIRS)
    parser.add_argument("--methods", default=",".join((*OURS, *BASELINES)))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--profile", action="store_true", help="instead of the times")
    args = parser.parse_args()
    settings = [
        {"pair": pair, "method": method, "seed": int(seed)}
        for seed in args.seeds.split(",")
        for pair in args.pairs.split(",")
        for method in args.methods.split(",")
    ]
    profiled = [s for s in settings if s["method"] == "fast" and s["pair"] in PROFILED.split(",")]
    data = args.data.resolve()
    records = complete(NAME, run, [] if args.profile else settings, data=data)
    profiles = complete(PROFILES, profile, profiled if args.profile else [], data=data)
    save(NAME, report(records, profiles))


if __name__ == "__main__":
    main()
