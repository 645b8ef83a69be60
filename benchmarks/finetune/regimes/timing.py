"""The time of a whole call of FAST against LP-FT with the same norms, one beside the other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import fast
from benchmarks.common import Record, machine
from benchmarks.finetune.regimes.methods import METHODS, OURS, regimes_of
from benchmarks.finetune.regimes.samples import Task

PAIRS = "resnet20 -> sign_digits,mobilenet 0.25 -> flowers,minilm -> trec6"
REPEATS = 3


def settings(pairs: Sequence[str]) -> list[Record]:
    return [
        {"pair": pair, "method": name, "regime": regime, "source_inputs": inputs, "repeat": repeat}
        for repeat, pair, name in product(range(REPEATS), pairs, OURS)
        if METHODS[name].available
        for regime in regimes_of(name, pair)
        for inputs in METHODS[name].source_inputs
    ]


def run(
    *, pair: str, method: str, regime: str, source_inputs: bool, repeat: int, data: Path
) -> Record:
    """CPU seconds of two whole calls of the pair's usual length, from the pretrained network to the
    adapted one, nothing measured; every other repeat LP-FT goes first."""

    def seconds(name: str) -> float:
        task = Task(pair, data, seed=repeat)
        options: dict[str, Any] = dict(METHODS[name].options)
        if source_inputs and name == method:
            options["source_inputs"] = task.real.source_inputs
        start = time.process_time()
        fast.finetune(
            task.model,
            task.train,
            steps=task.real.steps,
            eval_every=task.real.steps,
            **METHODS[name].norms(regime),
            progress=False,
            **task.options,
            **options,
        )
        return round(time.process_time() - start, 2)

    names = (method, "lp-ft") if repeat % 2 == 0 else ("lp-ft", method)
    times = {name: seconds(name) for name in names}
    return {"ours": times[method], "lp-ft": times["lp-ft"], "machine": machine()}


def ratio(records: Sequence[Record], method: str, regime: str, source_inputs: bool) -> list[float]:
    """FAST's time divided by LP-FT's, of each pair: the median of its repeats."""
    key = (method, regime, source_inputs)
    runs = [r for r in records if (r["method"], r["regime"], r["source_inputs"]) == key]
    pairs = dict.fromkeys(r["pair"] for r in runs)
    return [median(r["ours"] / r["lp-ft"] for r in runs if r["pair"] == pair) for pair in pairs]
