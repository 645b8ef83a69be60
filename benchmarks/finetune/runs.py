"""One fine-tuning run on a real pair, from a line of text such as `fast:distill=0.1`."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import fast
from benchmarks.common import Record, machine
from benchmarks.real_pairs import real_pair

# These run at their default; every baseline at the better of two rates.
OURS = ("fast", "adapter")
BASELINE_RATES = (3e-4, 1e-3)
HISTORY = (
    "step", "loss", "target_accuracy", "target_loss", "source_accuracy", "source_loss",
    "forecast", "drift", "seconds",
)  # fmt: skip


def parse(spec: str) -> tuple[str, dict[str, Any]]:
    """The method and the options of `fast.finetune` in `method:option=value:option=value`."""
    method, *settings = spec.split(":")
    pairs = (setting.split("=", 1) for setting in settings)
    return method, {name: ast.literal_eval(value) for name, value in pairs}


def learning_rates(spec: str) -> tuple[float | None, ...]:
    """Those to try: the default (None) for `fast`, unless its spec names one; two for baselines."""
    method, options = parse(spec)
    if "lr" in options:
        return (options["lr"],)
    return (None,) if method in OURS else BASELINE_RATES


def baseline_rate(pair: str) -> float:
    """The better of two rates by target accuracy, in benchmarks/results/retention.md."""
    return 1e-3 if pair.startswith("resnet") else 3e-4


def rate(runs: list[Record]) -> str:
    """The learning rate of these runs, for a table."""
    return "default" if runs[0]["lr"] is None else f"{runs[0]['lr']:g}"


def run(
    *,
    pair: str,
    method: str,
    lr: float | None,
    seed: int,
    data: Path,
    evaluations: Mapping[str, int],
    with_source_inputs: bool = False,
    with_source_labels: bool = False,
) -> Record:
    """One run; returns its history and what it started from.

    Args:
        method: a spec, see `parse`.
        evaluations: their number in a run of each method; by default as often as the pair says.
        with_source_labels: also hand over the labels of the source inputs, if the pair has them.
    """
    spec = method
    method, options = parse(spec)
    torch.manual_seed(seed)
    real = real_pair(pair, data)
    count = evaluations.get(method)
    if with_source_inputs:
        labels = real.source_labels if with_source_labels else None
        inputs = real.source_inputs
        options["source_inputs"] = inputs if labels is None else (inputs, labels)
    result = fast.finetune(
        real.model,
        real.train,
        real.val,
        real.source,
        method=method,
        steps=real.steps,
        seed=seed,
        eval_every=real.steps // count if count else real.eval_every,
        progress=False,
        **({"lr": lr} | options),
    )
    history = [
        {k: round(r[k], 5) if r[k] is not None else None for k in HISTORY} for r in result.history
    ]
    return {
        "source_before": result.source_accuracy_before,
        "history": history,
        "machine": machine(result.model),
    }
