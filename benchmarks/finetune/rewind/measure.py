"""One checkpoint that has forgotten, rewound by `fast.rewind` and on the plain line."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fast
from benchmarks.common import Record, machine
from benchmarks.finetune.rewind.tuned import checkpoint, plain_script
from benchmarks.finetune.runs import baseline_rate
from benchmarks.real_pairs import RealPair, real_pair
from fast.adapt.config import Budget
from fast.adapt.guards.budget import AIM
from fast.adapt.guards.forgetting import hold_back
from fast.data.source_inputs import parse_source_inputs
from fast.data.trees import length, pick
from fast.heads import evaluating, find_head, forward_logits, source_task
from fast.heads.find import layer_like

BISECTIONS, TIMED_STEPS = 7, 5


def run(*, pair: str, method: str, budget: str, seed: int, data: Path, checkpoints: Path) -> Record:
    """One checkpoint rewound to one budget, by `fast.rewind` and on the plain line."""
    case = known(pair, method, seed, data, checkpoints)
    real, state = case.real, case.state
    kept = real.source_inputs
    kept = kept if real.source_labels is None else (kept, real.source_labels)
    lines = plain_line(real, state, kept, budget)
    start = time.process_time()
    result = fast.rewind(real.model, state, kept, budget, data=real.train, seed=seed)
    seconds = time.process_time() - start
    return {
        "before": case.before,
        "tuned": case.tuned,
        "line": lines,
        "rewound": measured(result.model, real, state=None) | {
            "held_back": result.lost, "stage": result.final["stage"], "place": result.final["place"]
        },
        "seconds": seconds,
        "seconds_of_run": case.seconds_of_run,
        "machine": machine(),
    }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is the same for all budgets of one checkpoint."""

    real: RealPair
    state: dict[str, Tensor]
    before: Record
    tuned: Record
    seconds_of_run: float


@lru_cache(maxsize=1)
def known(pair: str, method: str, seed: int, data: Path, checkpoints: Path) -> Case:
    real = real_pair(pair, data)
    state, _ = checkpoint(pair, method, seed, data, checkpoints)
    return Case(
        real=real,
        state=state,
        before=measured(real.model, real, state=None),
        tuned=measured(real.model, real, state),
        seconds_of_run=step_seconds(real, pair) * real.steps,
    )


def measured(model: nn.Module, real: RealPair, state: dict[str, Tensor] | None) -> Record:
    """Accuracies and source loss on test data.

    Args:
        state: of a plain network with the target's head; its source head is that of `model`. None:
            `model` answers both tasks, or only the source's.
    """
    target = model if state is None else with_state(model, real, state, target=True)
    source = model if state is None else with_state(model, real, state, target=False)
    x, y = real.val
    record = {"target": (answers(target, x).argmax(1) == y).double().mean().item()}
    with source_task(source), evaluating(source):
        if callable(real.source):
            return record | {"source": real.source(source), "source_loss": None}
        x, y = real.source
        logits = answers(source, x)
    accuracy = (logits.argmax(1) == y).double().mean().item()
    return record | {"source": accuracy, "source_loss": F.cross_entropy(logits, y).item()}


def answers(model: nn.Module, x: Any, size: int = 250) -> Tensor:
    with evaluating(model):
        parts = [pick(x, slice(i, i + size)) for i in range(0, length(x), size)]
        return torch.cat([forward_logits(model, part) for part in parts])


def with_state(
    model: nn.Module, real: RealPair, state: dict[str, Tensor], *, target: bool
) -> nn.Module:
    """A plain network with the weights of `state`, and its head or that of `model`."""
    network = copy.deepcopy(model)
    head = find_head(network, pick(real.train[0], slice(2)))
    prefix = f"{head.name}."
    if target:
        head.put(layer_like(head.module, len(state[f"{prefix}weight"]), f"{prefix}bias" in state))
        network.load_state_dict(state, strict=False)
    else:
        rest = {n: x for n, x in state.items() if not n.startswith(prefix)}
        network.load_state_dict(rest, strict=False)
    return network


def plain_line(real: RealPair, state: dict[str, Tensor], kept: Any, budget: str) -> Record:
    """WiSE-FT: the place on the line where the budget is spent, found by bisection."""
    allowed = Budget.parse(budget)
    _, meter = hold_back(real.model, parse_source_inputs(kept), budget=allowed, skill="auto")
    prefix = f"{find_head(real.model, pick(real.train[0], slice(2))).name}."
    # The heads are of two tasks: the tuned one stays what it is all the way.
    start = {n: x for n, x in real.model.state_dict().items() if not n.startswith(prefix)}

    def at(place: float) -> dict[str, Tensor]:
        return {
            n: torch.lerp(start[n], x, place) if n in start and x.is_floating_point() else x
            for n, x in state.items()
        }

    low, high = 0.0, 1.0
    if meter(with_state(real.model, real, at(1.0), target=False)) <= allowed.amount:
        low = 1.0
    for _ in range(BISECTIONS if low < 1 else 0):
        middle = (low + high) / 2
        lost = meter(with_state(real.model, real, at(middle), target=False))
        low, high = (middle, high) if lost <= AIM * allowed.amount else (low, middle)
    return {"place": low} | measured(real.model, real, at(low))


def step_seconds(real: RealPair, pair: str) -> float:
    """Processor time of a step of the plain script."""
    times = []
    for steps in (1, 1, 1 + TIMED_STEPS):  # the first reads data and imports what torch needs
        part = copy.copy(real)
        object.__setattr__(part, "model", copy.deepcopy(real.model))
        object.__setattr__(part, "steps", steps)
        start = time.process_time()
        plain_script(part, baseline_rate(pair), 0)
        times.append(time.process_time() - start)
    return (times[2] - times[1]) / TIMED_STEPS
