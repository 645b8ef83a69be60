"""One call of `fast.finetune`, by the clock or by function."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

import fast
from benchmarks.common import Record, machine
from benchmarks.finetune.regimes.samples import some
from benchmarks.finetune.runs import baseline_rate
from benchmarks.finetune.whole_run.charges import NETWORK, charges
from benchmarks.real_pairs import RealPair, real_pair

# Not `fast.finetune`, which is loaded on first use: loading is not timed.
from fast.train.finetune import finetune

WITH_INPUTS = "fast with source inputs"
OURS, BASELINES = ("fast", WITH_INPUTS), ("lp-ft", "vanilla")
EVALUATIONS = 10
LARGEST = 10


def call(real: RealPair, *, pair: str, method: str, seed: int, **options: Any) -> fast.Result:
    """The call that is timed, with the pair's usual length."""
    if method == WITH_INPUTS:
        options["source_inputs"] = real.source_inputs
    if method in BASELINES:
        options["lr"] = baseline_rate(pair)
    return finetune(
        real.model,
        real.train,
        some(real.val),
        num_classes=real.num_classes,
        method=method.split()[0],
        steps=real.steps,
        batch_size=real.batch_size,
        eval_every=real.steps // EVALUATIONS,
        seed=seed,
        progress=False,
        **options,
    )


def run(*, pair: str, method: str, seed: int, data: Path) -> Record:
    """Accuracy by processor seconds since the call."""
    torch.manual_seed(seed)
    real = real_pair(pair, data)
    times: list[float] = []
    start = time.process_time()
    result = call(
        real,
        pair=pair,
        method=method,
        seed=seed,
        callbacks=[lambda _: times.append(time.process_time())],
    )
    end = time.process_time()
    curve = [
        [record["step"], round(then - start, 2), record["target_accuracy"]]
        for record, then in zip(result.history, times, strict=True)
    ]
    return {"curve": curve, "seconds": round(end - start, 2), "machine": machine()}


def profile(*, pair: str, method: str, seed: int, data: Path) -> Record:
    """The functions that a run is charged with, largest first, and all of its time."""
    torch.manual_seed(seed)
    real = real_pair(pair, data)
    charged = charges(lambda: call(real, pair=pair, method=method, seed=seed))
    network = charged.pop(NETWORK)
    largest = sorted(charged.items(), key=lambda item: -item[1])[:LARGEST]
    return {
        "network": round(network, 3),
        "other": round(sum(charged.values()), 3),
        "largest": [[name, round(seconds, 3)] for name, seconds in largest],
        "machine": machine(),
    }
