"""Data as they come: few, unbalanced, wrongly labelled, in small and in large batches.

    python -m benchmarks.experiments.conditions --data FOLDER [--conditions NAMES]

One function answers both tasks, but for adapters, which are switched. Every method sees as many
samples: batches of 16 take four times as many steps as those of 64. LP-FT runs at two learning
rates, the better of which counts. Finished runs are kept in `benchmarks/results/conditions.jsonl`
and not run again.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from benchmarks.common import (
    Record,
    arguments,
    commits,
    complete,
    learned_and_lost,
    machine,
    save,
    table,
)
from benchmarks.finetune.regimes.baselines import RUNNERS
from benchmarks.finetune.regimes.samples import Task, few
from fast.data.trees import pick

PAIRS = "resnet20 -> sign_digits,mobilenet 0.25 -> flowers"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "fast": ("finetune", {"method": "fast"}),
    "fast, source inputs": ("finetune", {"method": "fast"}),
    "adapter": ("finetune", {"method": "adapter", "batch_norm": None}),
    "lp-ft 1e-3": ("lp_ft", {"method": "lp-ft", "lr": 1e-3}),
    "lp-ft 3e-4": ("lp_ft", {"method": "lp-ft", "lr": 3e-4}),
    "linear probe": ("linear_probe", {}),
}
OURS = ("fast", "fast, source inputs", "adapter")
RAREST, WRONG, BATCH = 1 / 20, 0.2, 64


def unbalanced(labels: Tensor, generator: Generator) -> Tensor:
    """Rows of which the first class has most and the last a twentieth, in a geometric series."""
    shuffled = torch.randperm(len(labels), generator=generator)
    most, classes = int(labels.bincount().min()), int(labels.max()) + 1
    counts = (most * RAREST ** torch.linspace(0, 1, classes)).round().int().tolist()
    of_class = [shuffled[labels[shuffled] == c] for c in range(classes)]
    return torch.cat([rows[:count] for rows, count in zip(of_class, counts, strict=True)])


def wrong(labels: Tensor, generator: Generator) -> Tensor:
    """The labels, a fifth of which are those of another class."""
    classes = int(labels.max()) + 1
    others = (labels + torch.randint(1, classes, labels.shape, generator=generator)) % classes
    return torch.where(torch.rand(len(labels), generator=generator) < WRONG, others, labels)


Samples = tuple[Any, Tensor]
Change = Callable[[Samples, Generator], Samples]


def only(choose: Callable[[Tensor, Generator], Tensor]) -> Change:
    """Keep the rows that are chosen by their labels."""

    def change(data: Samples, generator: Generator) -> Samples:
        rows = choose(data[1], generator)
        return pick(data[0], rows), data[1][rows]

    return change


# What happens to the training data, and the samples of a batch.
CONDITIONS: dict[str, tuple[Change, int]] = {
    "5 of each class": (only(lambda labels, _: few(labels, 5, 0)), BATCH),
    "20 of each class": (only(lambda labels, _: few(labels, 20, 0)), BATCH),
    "unbalanced 20 : 1": (only(unbalanced), BATCH),
    "20 % wrong labels": (lambda data, g: (data[0], wrong(data[1], g)), BATCH),
    "batches of 16": (lambda data, _: data, 16),
    "batches of 256": (lambda data, _: data, 256),
}


def run(*, pair: str, condition: str, method: str, data: Path) -> Record:
    torch.manual_seed(0)
    task = Task(pair, data, seed=0)
    change, batch_size = CONDITIONS[condition]
    task.train = change(task.train, Generator().manual_seed(0))
    task.options["batch_size"] = min(batch_size, len(task.train[1]))
    runner, options = METHODS[method]
    if method == "fast, source inputs":
        options = options | {"source_inputs": task.real.source_inputs}
    steps = round(task.real.steps * BATCH / batch_size)
    record = RUNNERS[runner](task, steps=steps, **({"batch_norm": "frozen"} | options))
    kept = ("target", "source", "source_before")
    return {key: record[key] for key in kept} | {"machine": machine()}


def rows(records: list[Record]) -> list[Record]:
    """A line for each condition and pair; the best baseline is the one that learned most."""
    lines = []
    for condition, pair in product(CONDITIONS, PAIRS.split(",")):
        here = [r for r in records if (r["condition"], r["pair"]) == (condition, pair)]
        if len(here) < len(METHODS):
            continue
        best = max((r for r in here if r["method"] not in OURS), key=lambda r: r["target"])
        line = {"condition": condition, "pair": pair}
        for r in sorted((r for r in here if r["method"] in OURS), key=lambda r: r["method"]):
            ahead = 100 * (r["target"] - best["target"])
            line[r["method"]] = f"{learned_and_lost(r)} ({ahead:+.1f})"
        lines.append(line | {"best baseline": f"{learned_and_lost(best)} ({best['method']})"})
    return lines


def main() -> None:
    parser = arguments(__doc__, PAIRS)
    parser.add_argument("--conditions", help="names, separated by commas (default: all)")
    args = parser.parse_args()
    names = args.conditions.split(",") if args.conditions else CONDITIONS
    settings = [
        {"pair": pair, "condition": condition, "method": method}
        for condition, pair, method in product(names, args.pairs.split(","), METHODS)
    ]
    records = complete("conditions", run, settings, data=args.data.resolve())
    note = "Target accuracy in per cent, points of source accuracy lost, and in brackets target "
    note += "accuracy minus that of the better of LP-FT and a linear probe; one seed. "
    end = f"{note}Commit {commits(records)}; {machine()}."
    save("conditions", [__doc__ or "", *table(rows(records)), "", end])


if __name__ == "__main__":
    main()
