"""What a step of FAST costs against a step of plain torch training of the same network.

    python benchmarks/step_time.py --data FOLDER

Plain: a new linear head, `torch.optim.AdamW`, nothing else. Both take the same batches, one step in
turn, in one process on one thread; printed is the ratio of median process times, so that what else
the machine does cancels. Also: what FAST does before its first step, as a share of the whole run
(the forward passes that calibrate the head, the source card).
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fast.adapt.config import TrainConfig
from fast.data.trees import pick
from fast.heads import find_head, forward_logits
from fast.train.trainer import Trainer
from pairs import PAIRS, Folder, Job
from retention import ISSUE_PAIRS
from runs import RESULTS, commit, machine, parse

WARM_UP = 10


def plain_steps(job: Job, batch_size: int) -> Iterator[None]:
    """Endless training as a user would write it; one step per `next`."""
    model = copy.deepcopy(job.model)
    (x, y), generator = job.train, torch.Generator().manual_seed(0)
    found = find_head(model, pick(x, slice(2)))
    found.put(nn.Linear(found.module.weight.shape[1], int(y.max()) + 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    model.train()
    while True:
        for index in torch.randperm(len(y), generator=generator).split(batch_size)[:-1]:
            optimizer.zero_grad()
            F.cross_entropy(forward_logits(model, pick(x, index)), y[index]).backward()
            optimizer.step()
            yield


def fast_steps(
    job: Job, batch_size: int, steps: int, method: str, options: dict[str, Any]
) -> Iterator[None]:
    """A run of `fast.finetune` without its evaluations, set up before the first `next` returns."""
    inputs = job.source_inputs
    config = TrainConfig(method=method, steps=steps, batch_size=batch_size, **options)
    trainer = Trainer(config, copy.deepcopy(job.model), job.train, None, None, None, None, None,
                      inputs)  # fmt: skip
    stream = trainer.stream(0)
    trainer.model.train()
    yield
    for step in range(steps):
        trainer.advance(step, next(stream))
        yield


def timed(step: Callable[[], None]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def measure(pair: str, spec: str, folder: Folder, steps: int, batch_size: int) -> str:
    method, options = parse(spec)
    job = PAIRS[pair].make(folder)
    plain = plain_steps(job, batch_size)
    fast = fast_steps(job, batch_size, steps + WARM_UP, method, options)
    setup = timed(lambda: next(fast))
    times = [
        (timed(lambda: next(plain)), timed(lambda: next(fast))) for _ in range(steps + WARM_UP)
    ]
    ours, theirs = (median(column) for column in ((t[i] for t in times[WARM_UP:]) for i in (1, 0)))
    share = setup / (setup + PAIRS[pair].steps * ours)
    return (
        f"| {pair} | {spec} | {1e3 * theirs:.0f} | {1e3 * ours:.0f} | {ours / theirs:.3f} "
        f"| {share:.3f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the data folder")
    parser.add_argument("--pairs", default=ISSUE_PAIRS, help="names, separated by commas")
    parser.add_argument("--methods", default="fast", help="e.g. fast,ewc,replay")
    parser.add_argument("--steps", type=int, default=40, help="of each, after 10 to warm up")
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = Folder(args.data.resolve())
    lines = [
        "| pair | method | plain torch, ms per step | ours, ms per step | ratio "
        "| before the first step, share of the run |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    print("\n".join(lines))
    for pair in args.pairs.split(","):
        for spec in args.methods.split(","):
            lines.append(measure(pair, spec, folder, args.steps, args.batch_size))
            print(lines[-1], flush=True)
    lines += ["", f"Medians of {args.steps} steps in turn. {machine()}. Commit {commit()}."]
    (RESULTS / "step_time.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
