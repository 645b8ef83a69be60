"""Adapters on real pairs: which rank and rate, from few samples and from all, and what they cost.

    python -m benchmarks.finetune.adapters --data FOLDER [--no-cost]

The task is switched, so that nothing of the source is lost at any of them. A cost is a ratio of
median process times: a step of a method and a step of plain torch training take turns in one
process; LP-FT has batch norms per task, so both keep what the other keeps. Finished runs are kept
in `benchmarks/results/adapters.jsonl` and `adapters_cost.jsonl`, and not run again.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

import fast
from benchmarks.common import Record, arguments, commits, complete, machine, save, table
from benchmarks.finetune.regimes.baselines import finetune
from benchmarks.finetune.regimes.samples import Task
from benchmarks.finetune.runs import parse
from benchmarks.finetune.step_time import fast_steps, plain_steps, timed
from benchmarks.real_pairs import real_pair
from fast.data.trees import pick

PAIRS = "resnet20 -> gtsrb,resnet20 -> sign_digits,mobilenet 0.25 -> flowers"
COSTS = ("resnet20 -> sign_digits", "mobilenet 0.25 -> flowers", "minilm -> trec6")
SETTINGS = (
    "adapter",
    "adapter:adapter_rank=8",
    "adapter:adapter_rank=16",
    "adapter:adapter_rank=8:lr=3e-2",
)
LPFT = "lp-ft:batch_norm='per_task'"
BATCH, WARM_UP, STEPS = 32, 3, 15


def run(*, pair: str, method: str, samples: int | None, seed: int, data: Path) -> Record:
    """The target's accuracy after a run of the pair's usual length.

    Args:
        samples: of each class, or None for all.
    """
    task = Task(pair, data, samples=samples, seed=seed)
    name, options = parse(method)
    record = finetune(task, steps=task.real.steps, method=name, **options)
    return {"target": record["target"], "machine": machine()}


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
    if name == "adapter":
        model = copy.deepcopy(real.model)
        few = pick(real.train[0], slice(64)), real.train[1][:64]
        length: dict[str, Any] = {"steps": 2, "batch_size": BATCH}
        fast.Adaptation(model, few, num_classes=real.num_classes, method=name, **length, **options)
        added = sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)
    return {"ratio": own / theirs, "added": added / total, "machine": machine()}


def rows(records: list[Record]) -> list[Record]:
    """One for each pair and number of samples: target accuracies in percent, means over seeds."""
    cells: dict[str, dict[str, list[float]]] = {}
    for r in records:
        count = "all" if r["samples"] is None else f"{r['samples']} of each class"
        row = cells.setdefault(f"{r['pair']}, {count}", {})
        row.setdefault(r["method"], []).append(100 * r["target"])
    return [
        {"pair, samples": name, "seeds": max(map(len, row.values()))}
        | {method: f"{mean(values):.1f}" for method, values in row.items()}
        for name, row in cells.items()
    ]


def main() -> None:
    parser = arguments(__doc__, PAIRS)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--cost", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = args.data.resolve()
    costs: list[Record] = []
    if args.cost:
        timings = [{"pair": p, "method": m} for p, m in product(COSTS, ("adapter", LPFT))]
        costs = complete("adapters_cost", cost, timings, data=data)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    todo = [
        {"pair": p, "method": m, "samples": count, "seed": seed}
        for seed, count, p, m in product(seeds, (10, None), args.pairs.split(","), SETTINGS)
    ]
    records = complete("adapters", run, todo, data=data)
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
    note = f"Target accuracy, %. {machine()}. Commits {commits([*records, *costs])}."
    save("adapters", [*lines, "", note])


if __name__ == "__main__":
    main()
