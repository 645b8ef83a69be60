"""torch.compile around the step, learning rates in tensors, and steps inside the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter, EagerAndRecordGraphs

import fast
from optim.small_networks import parameter

STEPS = 12
OPTIMIZERS = {
    "adamw": lambda params, **keys: fast.AdamW(params, anchor_decay=0.5, **keys),
    "sgd": lambda params, **keys: fast.SGD(params, momentum=0.9, anchor_decay=0.5, **keys),
    "compact": lambda params, **keys: fast.AdamW(
        params, anchor_decay=0.5, state_dtype=torch.bfloat16, max_grad_norm=0.1, **keys
    ),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def train(model: nn.Module, opt: Any, step: Callable[[], Any], schedule: bool = True) -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    for i in range(STEPS):
        lr = 1e-2 / (i + 1)
        for group in opt.param_groups:
            if not schedule:
                continue
            if torch.is_tensor(group["lr"]):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        opt.zero_grad()
        model(x).square().sum().backward()
        step()


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("lr", ["float", "tensor"])
def test_step_compiles_whole(kind, lr):
    """One graph with our op in it, no break; a schedule does not recompile it again and again."""
    torch._dynamo.reset()
    make = OPTIMIZERS[kind]
    a, b = network(), network()
    # Another value than the schedule's first.
    rates = [0.5 if lr == "float" else torch.tensor(0.5) for _ in range(2)]
    opt_a, opt_b = make(a.parameters(), lr=rates[0]), make(b.parameters(), lr=rates[1])
    counter = CompileCounter()
    compiled = torch.compile(opt_b.step, backend=counter, fullgraph=True)
    train(a, opt_a, opt_a.step)
    train(b, opt_b, compiled)
    assert_same(a, b)
    for name, figure in opt_a.stats().items():
        assert figure.isfinite(), name
        torch.testing.assert_close(opt_b.stats()[name], figure)
    # The first step, steps with state, and with a learning rate that has changed.
    assert 1 <= counter.frame_count <= 3


def test_graph_has_our_op_once():
    torch._dynamo.reset()
    model, backend = network(), EagerAndRecordGraphs()
    opt = OPTIMIZERS["adamw"](model.parameters(), lr=0.1)
    train(model, opt, torch.compile(opt.step, backend=backend, fullgraph=True))
    for graph in backend.graphs:
        targets = [str(node.target) for node in graph.graph.nodes]
        assert targets.count("fastkernels.anchored_adamw_") == 1, targets


@pytest.mark.slow
def test_step_compiles_with_inductor():
    torch._dynamo.reset()
    a, b = network(), network()
    opt_a, opt_b = (OPTIMIZERS["adamw"](m.parameters(), lr=0.1) for m in (a, b))
    train(a, opt_a, opt_a.step, schedule=False)
    train(b, opt_b, torch.compile(opt_b.step, fullgraph=True), schedule=False)
    assert_same(a, b)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_lr_tensor_is_the_lr(kind):
    """As capturable asks: a learning rate that is changed in place counts from the next step."""
    a, b = network(), network()
    opt_a = OPTIMIZERS[kind](a.parameters(), lr=0.5)
    opt_b = OPTIMIZERS[kind](b.parameters(), lr=torch.tensor(0.5, dtype=torch.float64))
    train(a, opt_a, opt_a.step)
    train(b, opt_b, opt_b.step)
    assert_same(a, b)


def test_capturable_goes_to_torch_and_back():
    model, other = network(), network()
    opt = fast.AdamW(model.parameters(), lr=torch.tensor(0.1), capturable=True)
    train(model, opt, opt.step)
    theirs = torch.optim.AdamW(other.parameters(), lr=torch.tensor(0.1))
    theirs.load_state_dict(opt.state_dict())
    assert theirs.param_groups[0]["capturable"] is True
    again = fast.AdamW(network().parameters(), lr=torch.tensor(0.2), capturable=True)
    again.load_state_dict(theirs.state_dict())
    assert again.param_groups[0]["lr"] == opt.param_groups[0]["lr"]
    assert again.state_dict()["state"][0]["step"] == STEPS


def train_beside(a, opt_a, b):
    """Train `a` by its optimizer, and `b`, which steps in its backward passes, on the same data."""
    x = torch.randn(8, 4)
    for _ in range(STEPS):
        opt_a.zero_grad()
        a(x).square().sum().backward()
        opt_a.step()
        b(x).square().sum().backward()


@pytest.mark.parametrize("kind", ["adamw", "sgd"])  # a global norm is not known there
def test_step_in_the_backward_pass(kind):
    """An optimizer per parameter, stepped when its gradient is complete, which is then freed."""
    a, b = network(), network()
    opt_a = OPTIMIZERS[kind](a.parameters(), lr=0.1)
    optimizers = {p: OPTIMIZERS[kind]([p], lr=0.1) for p in b.parameters()}

    def step(p: torch.Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in b.parameters():
        p.register_post_accumulate_grad_hook(step)
    train_beside(a, opt_a, b)
    assert all(p.grad is None for p in b.parameters())
    assert_same(a, b)


def test_step_of_one_parameter_at_a_time():
    """One optimizer for all, stepped with only one gradient there."""
    a, b = network(), network()
    opt_a, opt_b = (OPTIMIZERS["adamw"](m.parameters(), lr=0.1) for m in (a, b))

    def step(p: torch.Tensor) -> None:
        opt_b.step()
        p.grad = None

    for p in b.parameters():
        p.register_post_accumulate_grad_hook(step)
    train_beside(a, opt_a, b)
    assert_same(a, b)


def test_a_rate_of_zero_after_a_tensor_rate():
    p = parameter(1.0)
    optimizer = fast.SGD([p], lr=torch.tensor(0.1))
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(2):
        p.grad = torch.ones(1)
        step()
    before = p.item()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert p.item() == before
