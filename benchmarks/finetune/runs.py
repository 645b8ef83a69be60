"""Fine-tuning runs on real pairs, kept in a file as they finish and never run twice.

A run is told by pair, method with its options, learning rate and seed. Runs share nothing, so
several go side by side, one thread each.
"""

from __future__ import annotations

import ast
import json
import multiprocessing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fast
from benchmarks.common import commit, machine
from benchmarks.real_pairs import PAIRS, Folder
from fast.adapt.methods import DEFAULT_LR, REHEARSING_LR

# FAST runs at its default; every baseline at the better of two.
BASELINE_RATES = (3e-4, 1e-3)
FIGURES = (
    "step", "loss", "target_accuracy", "target_loss", "source_accuracy", "source_loss",
    "forecast", "drift", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One run.

    Attributes:
        spec: `method` or `method:option=value:option=value`, options of `fast.finetune`.
        protected: hand the source inputs of the pair to every method.
        evaluations: during the run (default: the pair's).
        labelled: with their labels, where the pair has them.
    """

    pair: str
    spec: str
    lr: float
    seed: int
    data: Path
    protected: bool = False
    evaluations: int | None = None
    labelled: bool = False

    @property
    def key(self) -> tuple[str, str, float, int]:
        return self.pair, self.spec, self.lr, self.seed


def parse(spec: str) -> tuple[str, dict[str, Any]]:
    """Method and options of `method:option=value:option=value`."""
    method, *settings = spec.split(":")
    pairs = (setting.split("=", 1) for setting in settings)
    return method, {name: ast.literal_eval(value) for name, value in pairs}


def learning_rates(spec: str, protected: bool = False) -> tuple[float, ...]:
    """Those to try: the default for `fast`, unless its spec names another; two for baselines."""
    method, options = parse(spec)
    if "lr" in options:
        return (options["lr"],)
    if method != "fast":
        return BASELINE_RATES
    return (REHEARSING_LR if protected and options.get("rehearse") != 0 else DEFAULT_LR,)


def run(task: Task) -> dict[str, Any]:
    """One run; returns its record."""
    method, options = parse(task.spec)
    torch.set_num_threads(1)
    torch.manual_seed(task.seed)
    pair = PAIRS[task.pair]
    job = pair.make(Folder(task.data))
    every = pair.steps // task.evaluations if task.evaluations else pair.eval_every
    options = {"lr": task.lr} | options
    if task.protected:
        labels = job.source_labels if task.labelled else None
        inputs = job.source_inputs
        options["source_inputs"] = inputs if labels is None else (inputs, labels)
    result = fast.finetune(
        job.model,
        job.train,
        job.val,
        job.source,
        method=method,
        steps=pair.steps,
        seed=task.seed,
        eval_every=every,
        progress=False,
        **options,
    )
    history = [
        {k: round(r[k], 5) if r[k] is not None else None for k in FIGURES} for r in result.history
    ]
    return {
        "pair": task.pair,
        "method": task.spec,
        "lr": task.lr,
        "seed": task.seed,
        "source_before": result.source_accuracy_before,
        "history": history,
        "commit": commit(),
        "machine": machine(result.model),
    }


def load(store: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in store.read_text().splitlines()] if store.exists() else []


def complete(tasks: Iterable[Task], store: Path, workers: int) -> list[dict[str, Any]]:
    """Run what `store` does not have yet; returns all its records."""
    store.parent.mkdir(exist_ok=True)
    records = load(store)
    done = {(r["pair"], r["method"], r["lr"], r["seed"]) for r in records}
    missing = [task for task in tasks if task.key not in done]
    if not missing:
        return records
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for record in pool.imap_unordered(run, missing):
            records.append(record)
            with store.open("a") as f:
                f.write(json.dumps(record) + "\n")
            last = record["history"][-1]
            print(record["pair"], record["method"], record["lr"], record["seed"], last, flush=True)
    return records
