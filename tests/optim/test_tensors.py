"""Kinds of tensors that a step takes, and sets of gradients that change."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

import fast
from fastkernels.backends import native
from fastkernels.ops.update.native import PLANS
from optim.small_networks import parameter


def test_a_gradient_that_is_still_being_reduced():
    """A wrapper has no memory of its own; a raw pointer to it crashed."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    p = parameter(1.0, 2.0)
    p.grad = AsyncCollectiveTensor(torch.ones(2))
    fast.SGD([p], lr=0.1).step()
    torch.testing.assert_close(p.detach(), torch.tensor([0.9, 1.9]))


def test_negative_views_are_read_as_what_they_are():
    re, im = parameter(1.0), parameter(2.0)
    (torch.complex(re, im).conj() ** 2).real.sum().backward()
    expected = im.item() - 0.1 * im.grad.item()
    fast.SGD([im], lr=0.1).step()
    assert im.item() == pytest.approx(expected)
    p = nn.Parameter(torch.zeros(5000))
    p.grad = torch._neg_view(torch.ones(5000))
    fast.SGD([p], lr=0.1).step()
    torch.testing.assert_close(p.detach(), torch.full((5000,), 0.1))


def test_plans_of_changing_sets_of_gradients_are_kept():
    """Alternating heads of one size evicted each other's plan at every step."""
    if not native.available()[0] or os.environ.get("FASTKERNELS_BACKEND", "native") != "native":
        pytest.skip("the native kernels are not built, or not asked for")
    body = [nn.Parameter(torch.randn(3)) for _ in range(4)]
    heads = [[nn.Parameter(torch.randn(3))] for _ in range(2)]
    optimizer = fast.AdamW([*body, *heads[0], *heads[1]])
    built, build = [], PLANS._build
    PLANS._build = lambda batch, *what: built.append(1) or build(batch, *what)
    try:
        for step in range(8):
            for p in (*body, *heads[0], *heads[1]):
                p.grad = None
            for p in (*body, *heads[step % 2]):
                p.grad = torch.randn(3)
            optimizer.step()
    finally:
        PLANS._build = build
    assert len(built) == 2


def test_a_default_device_is_none_of_our_business():
    p = parameter(1.0)
    p.grad = torch.ones(1)
    optimizer = fast.SGD([p], lr=0.1)
    with torch.device("meta"):
        optimizer.step()
    assert p.item() == pytest.approx(0.9)
