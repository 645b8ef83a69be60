"""What a step of FAST costs against a step of plain torch training of the same network.

    python -m benchmarks.finetune.step_time --data FOLDER

The plain run has a new linear head, `torch.optim.AdamW`, and nothing else. Both take the same
batches, one step in turn, in one process on one thread; printed is the ratio of median process
times, in which other work on the machine cancels. The last column is what FAST does before its
first step, as a share of the whole run: the forward passes that calibrate the head, the source
card.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fast
from benchmarks.common import Record, arguments, commit, machine, save, shown, table
from benchmarks.finetune.runs import parse
from benchmarks.real_pairs import README_PAIRS, RealPair, real_pair
from fast.data.trees import pick
from fast.heads import find_head, forward_logits

WARM_UP = 10


def plain_steps(real: RealPair, batch_size: int) -> Iterator[None]:
    """Endless training as a user would write it; one step per `next`."""
    model = copy.deepcopy(real.model)
    (x, y), generator = real.train, torch.Generator().manual_seed(0)
    head = find_head(model, pick(x, slice(2)))
    head.put(nn.Linear(head.module.weight.shape[1], real.num_classes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    model.train()
    while True:
        for index in torch.randperm(len(y), generator=generator).split(batch_size)[:-1]:
            optimizer.zero_grad()
            F.cross_entropy(forward_logits(model, pick(x, index)), y[index]).backward()
            optimizer.step()
            yield


def fast_steps(
    real: RealPair, batch_size: int, steps: int, method: str, options: dict[str, Any]
) -> Iterator[None]:
    """The same with `fast.Adaptation`, which is set up before the first `next` returns."""
    model = copy.deepcopy(real.model)
    adaptation = fast.Adaptation(
        model,
        real.train,
        source_inputs=real.source_inputs,
        method=method,
        steps=steps,
        batch_size=batch_size,
        **options,
    )
    optimizer, scheduler = adaptation.optimizer, adaptation.scheduler()
    model.train()
    yield
    for x, y, rows in adaptation.batches():
        logits, penalty = adaptation.forward(x, rows)
        (F.cross_entropy(logits, y) + penalty).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        yield


def timed(step: Callable[[], None]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def measure(pair: str, spec: str, data: Path, steps: int, batch_size: int) -> Record:
    """A row of the table."""
    method, options = parse(spec)
    real = real_pair(pair, data)
    plain = plain_steps(real, batch_size)
    ours = fast_steps(real, batch_size, steps + WARM_UP, method, options)
    setup = timed(lambda: next(ours))
    times = [
        (timed(lambda: next(plain)), timed(lambda: next(ours))) for _ in range(steps + WARM_UP)
    ]
    their_time, our_time = (median(column) for column in zip(*times[WARM_UP:], strict=True))
    share = setup / (setup + real.steps * our_time)
    return {
        "pair": pair,
        "method": spec,
        "plain torch, ms per step": f"{1e3 * their_time:.0f}",
        "ours, ms per step": f"{1e3 * our_time:.0f}",
        "ratio": f"{our_time / their_time:.3f}",
        "before the first step, share of the run": f"{share:.3f}",
    }


def main() -> None:
    parser = arguments(__doc__, README_PAIRS)
    parser.add_argument("--methods", default="fast", help="e.g. fast,ewc,replay")
    parser.add_argument("--steps", type=int, default=40, help="of each, after 10 to warm up")
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = (
        measure(pair, spec, args.data.resolve(), args.steps, args.batch_size)
        for pair in args.pairs.split(",")
        for spec in args.methods.split(",")
    )
    note = f"Medians of {args.steps} steps in turn. {machine()}. Commit {commit()}."
    save("step_time", [*table(shown(rows)), "", note])


if __name__ == "__main__":
    main()
