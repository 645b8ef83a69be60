"""Adapters on real pairs: which rate and rank, what they reach against LP-FT, and what they cost.

    python -m benchmarks.finetune.adapters --data FOLDER [--no-cost]

LP-FT has batch norms per task, so both keep what the other keeps. A cost is a ratio of median
process times: a step of either method and a step of plain torch training take turns in one process.
Finished runs are kept in `benchmarks/results/adapters.jsonl` and not run again.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial
from pathlib import Path
from statistics import median

import torch

import fast
from benchmarks.common import Record, arguments, commits, complete, machine, save, table
from benchmarks.finetune.runs import baseline_rate, parse, run
from benchmarks.finetune.step_time import fast_steps, plain_steps, timed
from benchmarks.real_pairs import real_pair
from fast.data.trees import pick

PAIRS = "resnet20 -> sign_digits,resnet20 -> omniglot,minilm -> trec6,mobilenet 0.25 -> flowers"
RATES = (1e-2, 3e-3, 3e-2)
LPFT = "lp-ft:batch_norm='per_task'"
ADAPTER, WIDE = "adapter", "adapter:adapter_rank=16"
BATCH, WARM_UP, STEPS = 32, 3, 15


def settings(pairs: list[str], seeds: list[int]) -> list[Record]:
    """The runs, those of the default rate first."""
    tried = [(ADAPTER, rate) for rate in RATES] + [(LPFT, 0.0), (WIDE, RATES[0])]
    return [
        {"pair": p, "method": m, "lr": rate or baseline_rate(p), "seed": seed}
        for seed in seeds
        for m, rate in tried
        for p in pairs
    ]


def cost(*, pair: str, method: str, data: Path) -> Record:
    """Ratio of a step to plain training, and the trained parameters as a share of all."""
    name, options = parse(method)
    real = real_pair(pair, data)
    total = sum(p.numel() for p in real.model.parameters())
    plain = plain_steps(real, BATCH)
    ours = fast_steps(real, BATCH, STEPS + WARM_UP, name, options)
    next(ours)
    times = [(timed(partial(next, plain)), timed(partial(next, ours))) for _ in range(STEPS)]
    theirs, own = (median(column) for column in zip(*times[WARM_UP:], strict=True))
    added = 0
    if name == ADAPTER:
        model = copy.deepcopy(real.model)
        few = pick(real.train[0], slice(64)), real.train[1][:64]
        fast.Adaptation(
            model,
            few,
            num_classes=real.num_classes,
            method=name,
            steps=2,
            batch_size=BATCH,
            **options,
        )
        added = sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)
    return {"ratio": own / theirs, "added": added / total, "machine": machine()}


def rows(records: list[Record]) -> list[Record]:
    """One for each pair: target / source accuracy of each method and rate, in percent."""
    cells: dict[str, Record] = {}
    for r in records:
        last = r["history"][-1]
        scores = f"{100 * last['target_accuracy']:.1f} / {100 * last['source_accuracy']:.1f}"
        label = f"{r['method']}, {r['lr']:g}" if r["method"] != LPFT else "lp-ft, norms per task"
        row = cells.setdefault(
            f"{r['pair']}, seed {r['seed']}", {"before": f"{100 * r['source_before']:.1f}"}
        )
        row[label] = scores
    names = list(dict.fromkeys(name for row in cells.values() for name in row))
    return [
        {"pair": pair} | {name: row.get(name, "") for name in names} for pair, row in cells.items()
    ]


def main() -> None:
    parser = arguments(__doc__, PAIRS)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--cost", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pairs, data = args.pairs.split(","), args.data.resolve()
    costs: list[Record] = []
    if args.cost:
        timings = [{"pair": p, "method": m} for p in pairs for m in (ADAPTER, LPFT)]
        costs = complete("adapters_cost", cost, timings, data=data)
    once = {ADAPTER: 1, "lp-ft": 1}
    seeds = [int(seed) for seed in args.seeds.split(",")]
    records = complete("adapters", run, settings(pairs, seeds), data=data, evaluations=once)
    lines = [*table(rows(records)), ""]
    lines += table(
        {
            "pair": r["pair"],
            "method": r["method"],
            "step / plain step": f"{r['ratio']:.2f}",
            "parameters added": f"{100 * r['added']:.1f} %",
        }
        for r in costs
    )
    note = f"Target / source accuracy, %. {machine()}. Commits {commits([*records, *costs])}."
    save("adapters", [*lines, "", note])


if __name__ == "__main__":
    main()
