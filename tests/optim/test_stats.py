"""The figures of a step, `optimizer.stats()`."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fast
from fast.optim import AdamW
from optim.small_networks import network, parameter, train


def test_figures_are_those_of_the_last_step():
    a, b = parameter(1.0), nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = fast.SGD([a, b], lr=0.1)
    a.grad, b.grad = torch.full((1,), 3.0), torch.full((1,), 4.0, dtype=torch.float64)
    optimizer.step()
    assert optimizer.stats()["grad_norm"] == pytest.approx(5)
    a.grad = None
    optimizer.step()
    assert optimizer.stats()["grad_norm"] == pytest.approx(4)


def test_stalled_parameters_do_not_count_in_the_norms():
    p, head = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))
    optimizer = AdamW([{"params": [p], "stall": 1}, {"params": [head]}], lr=0.1)
    p.grad, head.grad = torch.ones(3), torch.ones(4)
    optimizer.step()
    assert optimizer.stats()["grad_norm"].item() == pytest.approx(2.0)
    optimizer.step()
    assert optimizer.stats()["grad_norm"].item() == pytest.approx(math.sqrt(7))


def test_stats_without_an_anchor_or_a_step_are_nan():
    model = network()
    optimizer = AdamW(model.parameters())
    assert all(v.isnan() for v in optimizer.stats().values())
    train(optimizer, model, 1)
    stats = optimizer.stats()
    assert list(stats) == ["grad_norm", "drift", "update_norm", "forgetting"]
    assert stats["drift"].isnan()
    assert stats["forgetting"].isnan()
    norm = torch.cat([p.grad.reshape(-1) for p in model.parameters()]).double().norm()
    torch.testing.assert_close(stats["grad_norm"], norm, rtol=1e-5, atol=0)
