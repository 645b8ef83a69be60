"""Few samples and short runs, what a first try gets: every method on three real pairs, as a table.

    python benchmarks/short_runs.py --data FOLDER

20 to 1,000 target samples; 3, 10 and 100 steps (100 is also the default length for as many
samples); with and without source inputs. Finished runs are kept in
`benchmarks/results/short_runs.jsonl` and not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fast
from benchmarks.common import RESULTS, commit, machine
from benchmarks.finetune.runs import load
from benchmarks.real_pairs import PAIRS, Folder, Job

PAIR_NAMES = "resnet20 -> sign_digits,mobilenet 0.25 -> flowers,minilm -> banking77"
SIZES = (20, 100, 300, 1000)
STEPS = (3, 10, 100)
WITH_INPUTS = "fast with source inputs"
METHODS = ("fast", WITH_INPUTS, "lp-ft", "vanilla")
# Test samples of either task: measuring a run of ten steps should not take longer than the run.
MEASURED = 500
# A batch of sentences costs as much as a hundred pictures of these networks.
TEXT_BATCH, TEXT_TOKENS = 16, 24


@dataclass(frozen=True)
class Task:
    """One run."""

    pair: str
    method: str
    samples: int
    steps: int
    seed: int


def rows_of(inputs: Any, rows: Tensor | slice) -> Any:
    if isinstance(inputs, dict):
        return {k: v[rows, :TEXT_TOKENS] for k, v in inputs.items()}
    return inputs[rows]


def drawn(job: Job, samples: int, seed: int) -> tuple[Any, Tensor]:
    """Training samples, drawn by the seed."""
    x, y = job.train
    rows = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[:samples]
    return rows_of(x, rows), y[rows]


def run(task: Task, data: Path) -> dict[str, Any]:
    """One run; returns its record."""
    torch.set_num_threads(1)
    torch.manual_seed(task.seed)
    job = PAIRS[task.pair].make(Folder(data))
    few = slice(MEASURED)
    source: Any = job.source
    if callable(source):
        source.known = rows_of(source.known[0], slice(None)), source.known[1]
        source.asked = rows_of(source.asked[0], few), source.asked[1][few]
    else:
        source = source[0][few], source[1][few]
    options: dict[str, Any] = {}
    if task.method == WITH_INPUTS:
        options["source_inputs"] = rows_of(job.source_inputs, slice(None))
    result = fast.finetune(
        job.model,
        drawn(job, task.samples, task.seed),
        (rows_of(job.val[0], few), job.val[1][few]),
        source,
        num_classes=int(job.train[1].max()) + 1,
        method=task.method.split()[0],
        steps=task.steps,
        seed=task.seed,
        batch_size=TEXT_BATCH if isinstance(job.train[0], dict) else 64,
        eval_every=task.steps,
        progress=False,
        **options,
    )
    first, last = result.history[0], result.history[-1]
    assert result.source_accuracy_before is not None
    return asdict(task) | {
        "head_start": first["target_accuracy"],
        "end": last["target_accuracy"],
        "returned": result.target_accuracy,
        "source_before": result.source_accuracy_before,
        "lost_at_end": result.source_accuracy_before - last["source_accuracy"],
        "lost": result.source_accuracy_before - result.source_accuracy,
        "seconds": last["seconds"],
        "commit": commit(),
        "machine": machine(),
    }


def complete(tasks: Sequence[Task], store: Path, data: Path, workers: int) -> list[dict[str, Any]]:
    """Run what `store` does not have yet; returns all its records."""
    records = load(store)
    done = {tuple(r[name] for name in Task.__dataclass_fields__) for r in records}
    missing = [task for task in tasks if tuple(asdict(task).values()) not in done]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for record in pool.imap_unordered(partial(run, data=data), missing):
            records.append(record)
            with store.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(record, flush=True)
    return records


def percent(rows: list[dict[str, Any]], name: str) -> str:
    return f"{100 * statistics.mean(r[name] for r in rows):.1f}"


def report(records: list[dict[str, Any]]) -> str:
    """The table: a row for a pair, a number of samples and of steps."""
    head = ["pair", "samples", "steps", "seeds", "head start"]
    head += ["FAST: target (end), lost", f"FAST {WITH_INPUTS[5:]}", "LP-FT", "vanilla"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for pair, samples, steps in itertools.product(PAIR_NAMES.split(","), SIZES, STEPS):
        here = [
            r for r in records if (r["pair"], r["samples"], r["steps"]) == (pair, samples, steps)
        ]
        by_method = {m: [r for r in here if r["method"] == m] for m in METHODS}
        if not by_method["fast"]:
            continue
        cells = [pair, str(samples), str(steps), "/".join(str(len(by_method[m])) for m in METHODS)]
        cells.append(percent(by_method["fast"], "head_start"))
        for method, rows in by_method.items():
            if not rows:
                cells.append("-")
                continue
            end = f" ({percent(rows, 'end')})" if method.startswith("fast") else ""
            cells.append(f"{percent(rows, 'returned')}{end}, {percent(rows, 'lost')}")
        lines.append("| " + " | ".join(cells) + " |")
    ours = [r for r in records if r["method"].startswith("fast")]
    below = max(ours, key=lambda r: r["head_start"] - r["end"])
    notes = [
        "Target accuracy of what is returned, in per cent, and points of source accuracy lost by "
        "it; means over seeds. In brackets the end of training: where it is below the head start "
        "on the validation set, here the samples of the table itself, that is returned.",
        f"Largest fall below the head start at the end of one run: "
        f"{100 * (below['head_start'] - below['end']):.1f} points ({below['pair']}, "
        f"{below['samples']} samples, {below['steps']} steps, seed {below['seed']}).",
        f"Commit {', '.join(sorted({r['commit'] for r in records}))}; "
        f"{', '.join(sorted({r['machine'] for r in records}))}.",
    ]
    return "\n".join(lines) + "\n\n" + "\n\n".join(notes) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the data folder")
    parser.add_argument("--pairs", default=PAIR_NAMES, help="names, separated by commas")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()

    store = RESULTS / "short_runs.jsonl"
    seeds = map(int, args.seeds.split(","))
    names = args.pairs.split(","), args.methods.split(",")
    tasks = [
        Task(pair, method, samples, steps, seed)
        for seed, pair, method, samples, steps in itertools.product(seeds, *names, SIZES, STEPS)
    ]
    text = report(complete(tasks, store, args.data.resolve(), args.workers))
    (RESULTS / "short_runs.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
