"""Every op: registered, with a reference, and accepted by torch's own checks of a custom op."""

from __future__ import annotations

import pytest
import torch

import fastkernels
from fastkernels.op import OPS, candidates
from kernels.cases import FEATURES
from kernels.update_harness import RULES, Run


@pytest.mark.parametrize("name", OPS)
def test_op_is_complete(name):
    assert hasattr(torch.ops.fastkernels, name)
    names = {b.name for b in candidates(name, "cpu")}
    assert "reference" in names
    assert name in fastkernels.__all__
    doc = getattr(fastkernels, name).__doc__
    assert "Args:" in doc
    assert "Raises:" in doc


def arguments(rule: str, feature: str, requires_grad: bool, strided: bool):
    params = [torch.randn(5, 3), torch.randn(0), torch.randn(())]
    run = Run(rule, params, FEATURES[feature])
    grads = [torch.randn_like(p) for p in params]
    if strided:
        grads[0] = torch.randn(3, 5).t()
    if requires_grad:
        run.params[0].requires_grad_()
    anchored = run.feature.anchor_decay > 0
    keywords = {
        "anchors": [run.anchors[0], None, run.anchors[2]] if anchored else [],
        "curvature": run.curvature if run.feature.curvature else [],
        "curvature_scales": [],
        "remainders": [],
        **{key: [] for key in RULES[rule].scales},
        "stats": run.stats,
        "max_grad_norm": run.feature.max_grad_norm,
        "found_inf": torch.zeros(()),
    }
    return (params, grads, *run.moments, run.steps, run.hyper, [0, 0, 0]), keywords


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("feature", ["plain", "all"])
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_opcheck(backend, rule, feature, requires_grad):
    op = getattr(torch.ops.fastkernels, f"anchored_{rule}_")
    args, keywords = arguments(rule, feature, requires_grad, strided=feature == "all")
    with torch.no_grad():
        torch.library.opcheck(op, args, keywords)


def test_compile_leaves_no_graph_break(backend):
    run = Run("adamw", [torch.randn(5), torch.randn(3)], FEATURES["anchor"])
    twin = Run("adamw", [p.clone() for p in run.params], FEATURES["anchor"])
    twin.anchors = run.anchors
    grads = [torch.randn(5), torch.randn(3)]
    with torch.no_grad():
        torch.compile(run.step, backend="aot_eager", fullgraph=True)(grads)
        twin.step(grads)
    assert all(map(torch.equal, run.params, twin.params))


def test_profiler_shows_the_op(backend):
    run = Run("sgd", [torch.randn(5)], FEATURES["plain"])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run.step([torch.randn(5)])
    assert "fastkernels::anchored_sgd_" in {event.key for event in profile.key_averages()}


def test_explain_covers_every_op():
    rows = fastkernels.explain()
    assert {row.op for row in rows} == set(OPS)
    assert all(row.reason for row in rows)
