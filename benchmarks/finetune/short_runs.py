"""Few samples and short runs, what a first try gets: every method on three real pairs, as a table.

    python -m benchmarks.finetune.short_runs --data FOLDER

20 to 1,000 target samples; 3, 10 and 100 steps (100 is also the default length for as many
samples); with and without source inputs. Finished runs are kept in
`benchmarks/results/short_runs.jsonl` and not run again.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

import fast
from benchmarks.common import Record, arguments, commits, complete, machine, save, table
from benchmarks.real_pairs import NearestClassMean, real_pair

PAIRS = "resnet20 -> sign_digits,mobilenet 0.25 -> flowers,minilm -> banking77"
SIZES = (20, 100, 300, 1000)
STEPS = (3, 10, 100)
WITH_INPUTS = "fast with source inputs"
METHODS = ("fast", WITH_INPUTS, "lp-ft", "vanilla")
COLUMNS = ("FAST: target (end), lost", "FAST with source inputs", "LP-FT", "vanilla")
# Test samples of either task: measuring a run of ten steps should not take longer than the run.
MEASURED = 500
# A batch of sentences costs as much as a hundred pictures of these networks.
TEXT_BATCH, TEXT_TOKENS = 16, 24


def rows_of(inputs: Any, rows: Tensor | slice) -> Any:
    if isinstance(inputs, dict):
        return {k: v[rows, :TEXT_TOKENS] for k, v in inputs.items()}
    return inputs[rows]


def run(*, pair: str, method: str, samples: int, steps: int, seed: int, data: Path) -> Record:
    """One run on `samples` training samples, drawn by the seed."""
    torch.manual_seed(seed)
    real = real_pair(pair, data)
    x, y = real.train
    drawn = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[:samples]
    few = slice(MEASURED)
    source: Any = real.source
    if isinstance(source, NearestClassMean):
        reference, test = source.reference, source.test
        source = NearestClassMean(
            (rows_of(reference[0], slice(None)), reference[1]),
            (rows_of(test[0], few), test[1][few]),
        )
    else:
        source = source[0][few], source[1][few]
    protect = {"source_inputs": rows_of(real.source_inputs, slice(None))}
    result = fast.finetune(
        real.model,
        (rows_of(x, drawn), y[drawn]),
        (rows_of(real.val[0], few), real.val[1][few]),
        source,
        num_classes=real.num_classes,
        method=method.split()[0],
        steps=steps,
        seed=seed,
        batch_size=TEXT_BATCH if isinstance(x, dict) else 64,
        eval_every=steps,
        progress=False,
        **(protect if method == WITH_INPUTS else {}),
    )
    first, last = result.history[0], result.history[-1]
    assert result.source_accuracy_before is not None
    return {
        "head_start": first["target_accuracy"],
        "end": last["target_accuracy"],
        "returned": result.target_accuracy,
        "source_before": result.source_accuracy_before,
        "lost_at_end": result.source_accuracy_before - last["source_accuracy"],
        "lost": result.source_accuracy_before - result.source_accuracy,
        "seconds": last["seconds"],
        "machine": machine(),
    }


def percent(rows: list[Record], name: str) -> str:
    return f"{100 * mean(r[name] for r in rows):.1f}" if rows else "-"


def report(records: list[Record]) -> list[str]:
    """One row for a pair, a number of samples and of steps."""
    rows = []
    for pair, samples, steps in itertools.product(PAIRS.split(","), SIZES, STEPS):
        setting = (pair, samples, steps)
        here = [r for r in records if (r["pair"], r["samples"], r["steps"]) == setting]
        by_method = {m: [r for r in here if r["method"] == m] for m in METHODS}
        if not by_method["fast"]:
            continue
        cells = dict(zip(("pair", "samples", "steps"), setting, strict=True))
        cells["seeds"] = "/".join(str(len(runs)) for runs in by_method.values())
        cells["head start"] = percent(by_method["fast"], "head_start")
        for (method, runs), column in zip(by_method.items(), COLUMNS, strict=True):
            end = f" ({percent(runs, 'end')})" if method.startswith("fast") else ""
            figures = f"{percent(runs, 'returned')}{end}, {percent(runs, 'lost')}"
            cells[column] = figures if runs else "-"
        rows.append(cells)
    ours = [r for r in records if r["method"].startswith("fast")]
    worst = max(ours, key=lambda r: r["head_start"] - r["end"])
    return [
        *table(rows),
        "",
        "Target accuracy of what is returned, in per cent, and points of source accuracy lost by "
        "it; means over seeds. In brackets the end of training: where it is below the head start "
        "on the validation set, here the samples of the table itself, that is returned.",
        "",
        f"Largest fall below the head start at the end of one run: "
        f"{100 * (worst['head_start'] - worst['end']):.1f} points ({worst['pair']}, "
        f"{worst['samples']} samples, {worst['steps']} steps, seed {worst['seed']}).",
        "",
        f"Commit {commits(records)}; {', '.join(sorted({r['machine'] for r in records}))}.",
    ]


def main() -> None:
    parser = arguments(__doc__, PAIRS)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()

    names = args.pairs.split(","), args.methods.split(",")
    settings = [
        {"pair": pair, "method": method, "samples": samples, "steps": steps, "seed": int(seed)}
        for seed, pair, method, samples, steps in itertools.product(
            args.seeds.split(","), *names, SIZES, STEPS
        )
    ]
    records = complete("short_runs", run, settings, args.workers, data=args.data.resolve())
    save("short_runs", report(records))


if __name__ == "__main__":
    main()
