"""What torch.profiler shows of a step, and that nothing is recorded when nobody looks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fast
from fast.profiling import named_range

OPTIMIZERS = {
    "fastkernels::anchored_adamw_": lambda params: fast.AdamW(params, anchor_decay=0.5),
    "fastkernels::anchored_sgd_": lambda params: fast.SGD(params, momentum=0.9),
}


@pytest.mark.parametrize("op", OPTIMIZERS)
def test_ranges_and_op_are_named(op):
    model = nn.Linear(3, 2)
    opt = OPTIMIZERS[op](model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(2):
            opt.step()
    rows = {row.key: row for row in found.key_averages()}
    ranges = ("fast::step", "fast::collect", f"Optimizer.step#{type(opt).__name__}.step", op)
    for name in ranges:
        assert rows[name].count == 2, name
    # Nested, so that the step's time is not counted beside its parts.
    (step, *_) = [e for e in found.events() if e.name == "fast::step"]
    assert {"fast::collect", op} <= {child.name for child in step.cpu_children}


def test_one_op_for_all_groups():
    """All groups of a device are one call."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    opt = fast.AdamW(
        [
            {"params": part.parameters(), "lr": lr}
            for part, lr in zip(model, (1.0, 2.0), strict=True)
        ]
    )
    model(torch.randn(4, 3)).sum().backward()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        opt.step()
    rows = {row.key: row for row in found.key_averages()}
    assert rows["fastkernels::anchored_adamw_"].count == 1


def test_without_a_profiler_nothing_is_made(monkeypatch):
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} was recorded")

    monkeypatch.setattr(torch.profiler, "record_function", refuse)
    with named_range("fast::step"):
        pass
