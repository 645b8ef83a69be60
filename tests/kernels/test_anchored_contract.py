"""What the update ops promise besides the numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastkernels
from fastkernels.op import ENVIRONMENT
from kernels.cases import CHUNK, FEATURES, Feature
from kernels.update_harness import RULES, Run

pytestmark = pytest.mark.usefixtures("backend")
SIZES = (1, 0, 700, CHUNK + 1, 33_000)


def make(rule: str, feature: Feature, sizes=SIZES) -> tuple[Run, list[torch.Tensor]]:
    torch.manual_seed(3)
    return Run(rule, [torch.randn(n) for n in sizes], feature), [torch.randn(n) for n in sizes]


@pytest.mark.parametrize("rule", RULES)
def test_stats(rule):
    run, grads = make(rule, Feature(anchor_decay=0.5, curvature=True, grad_scale=8.0))
    before = [p.double() for p in run.params]
    run.step(grads)
    after = [p.double() for p in run.params]
    cat = torch.cat
    away = cat([p - w0.double() for p, w0 in zip(after, run.anchors, strict=True)])
    expected = torch.stack(
        [
            cat(grads).double().norm(),
            away.norm(),
            (cat(after) - cat(before)).norm(),
            0.5 * (cat(run.curvature).double() * away.square()).sum(),
        ]
    )
    torch.testing.assert_close(run.stats, expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_stats_do_not_change_the_step(rule):
    runs = [make(rule, FEATURES["all"])[0] for _ in range(2)]
    for run, stats in zip(runs, (torch.empty(4, dtype=torch.float64), None), strict=True):
        run.stats = stats
        run.step(make(rule, FEATURES["all"])[1])
    assert all(map(torch.equal, runs[0].params, runs[1].params))


def test_clipping_reports_the_norm_before_and_leaves_gradients_alone():
    run, grads = make("adamw", Feature(max_grad_norm=0.01))
    kept = [g.clone() for g in grads]
    run.step(grads)
    torch.testing.assert_close(run.stats[0], torch.cat(kept).double().norm(), rtol=1e-6, atol=0)
    assert all(map(torch.equal, grads, kept))


@pytest.mark.parametrize("rule", RULES)
def test_found_inf_changes_nothing(rule):
    run, grads = make(rule, Feature(anchor_decay=0.5, max_grad_norm=1.0))
    run.step(grads)
    kept = [t.clone() for t in run.outputs()]
    grads[2][5] = torch.inf
    run.step(grads, found_inf=torch.tensor(1.0), grad_scale=torch.tensor(2.0))
    assert all(map(torch.equal, run.outputs(), kept))


@pytest.mark.parametrize("rule", RULES)
def test_norm_that_is_not_finite_is_a_found_inf_when_scaled(rule):
    run, grads = make(rule, Feature(max_grad_norm=1.0))
    run.step(grads)
    kept = [t.clone() for t in run.outputs()]
    grads[2][5] = torch.nan
    run.step(grads, grad_scale=torch.tensor(2.0))
    assert all(map(torch.equal, run.outputs(), kept))
    run.step(grads)  # without a loss scale it reaches the weights, as in torch
    assert run.params[2].isnan().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rule", RULES)
def test_what_is_not_finite_propagates_as_in_torch(rule, value):
    run, grads = make(rule, FEATURES["plain"])
    grads[2][5] = value
    params = [torch.nn.Parameter(p.clone()) for p in run.params]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    run.step(grads)
    kinds = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    extra = {"sgd": {"momentum": 0.9}, "adamw": {"weight_decay": 0.0}}[rule]
    kinds[rule](params, lr=0.01, foreach=False, **extra).step()
    for ours, theirs in zip(run.params, params, strict=True):
        torch.testing.assert_close(ours.isnan(), theirs.isnan())
        torch.testing.assert_close(ours.isinf(), theirs.isinf())


@pytest.mark.parametrize("rule", RULES)
def test_fixed_point(rule):
    """At w = w0 and g = 0 nothing moves, to the bit, however strong the pull."""
    run, grads = make(rule, Feature(anchor_decay=123.4, curvature=True))
    run.anchors = [p.clone() for p in run.params]
    run.step([torch.zeros_like(g) for g in grads])
    assert all(map(torch.equal, run.params, run.anchors))
    assert run.stats.tolist() == [0, 0, 0, 0]


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 2000), min_size=1, max_size=6),
    rule=st.sampled_from(list(RULES)),
    data=st.data(),
)
def test_order_and_splitting_of_the_list_change_nothing(sizes, rule, data):
    order = data.draw(st.permutations(range(len(sizes))))
    feature = Feature(anchor_decay=0.5, curvature=True, weight_decay=0.1)
    whole, grads = make(rule, feature, sizes)
    other, _ = make(rule, feature, sizes)
    for _ in range(2):
        whole.step(grads)
    for i in order:
        part = make(rule, feature, sizes)[0]
        part.params, part.steps = [other.params[i]], [other.steps[i]]
        part.moments = [[m[i]] for m in other.moments]
        part.anchors, part.curvature = [other.anchors[i]], [other.curvature[i]]
        for _ in range(2):
            part.step([grads[i]])
    assert all(map(torch.equal, whole.params, other.params))


@pytest.mark.parametrize("rule", RULES)
def test_optional_entries(rule):
    """A tensor without an anchor, or without curvature, is updated as if the list were off."""
    run, grads = make(rule, Feature(anchor_decay=0.5, curvature=True))
    run.anchors[2] = None
    run.curvature[3] = None
    run.step(grads)
    plain, _ = make(rule, Feature())
    plain.step(grads)
    assert torch.equal(run.params[2], plain.params[2])
    anchored, _ = make(rule, Feature(anchor_decay=0.5))
    anchored.step(grads)
    assert torch.equal(run.params[3], anchored.params[3])


def test_groups_have_their_own_row():
    sizes = (700, 900)
    run, grads = make("adamw", FEATURES["plain"], sizes)
    run.hyper = run.hyper.repeat(2, 1)
    run.hyper[1, 0] *= 10
    before = [p.clone() for p in run.params]
    args = (run.params, grads, *run.moments, run.steps, run.hyper)
    fastkernels.anchored_adamw_(*args, [1, 0])
    moved = [(p - b).abs().mean() for p, b in zip(run.params, before, strict=True)]
    assert 8 < moved[0] / moved[1] < 12


@pytest.mark.parametrize("rule", RULES)
def test_autograd_notices_the_write(rule):
    run, grads = make(rule, FEATURES["plain"])
    versions = [p._version for p in run.params]
    run.step(grads)
    assert all(p._version > v for p, v in zip(run.params, versions, strict=True) if p.numel())


@pytest.mark.parametrize("rule", RULES)
def test_swapped_storage_is_noticed(rule):
    """The launch plan is kept between steps; new memory behind the same tensors must be seen."""
    run, grads = make(rule, FEATURES["anchor"])
    twin, _ = make(rule, FEATURES["anchor"])
    for _ in range(2):
        run.step(grads)
        twin.step(grads)
    for moments in run.moments:
        for m in moments:
            m.data = m.data.clone()
    grads = [g.clone() for g in grads]
    run.step(grads)
    twin.step(grads)
    assert all(map(torch.equal, run.params, twin.params))


def test_memory_that_was_given_to_another_dtype_is_noticed():
    """An allocator hands the same address to the next optimizer's state."""
    memory, start = torch.empty(1000, dtype=torch.float16), torch.randn(1000)
    param, first, second = start.clone(), torch.zeros(1000), torch.zeros(1000)
    step = torch.zeros(())
    hyper = torch.tensor([[0.1, 0.9, 0.999, 1e-8, 0.0, 5.0, 0.0]], dtype=torch.float64)
    for dtype in (torch.float16, torch.bfloat16):
        anchor = memory.view(dtype).copy_(start)
        param.copy_(start)
        fastkernels.anchored_adamw_(
            [param], [torch.zeros(1000)], [first], [second], [step], hyper, [0], anchors=[anchor]
        )
        # No gradient, and the anchor is the start but for its rounding.
        assert (param - start).abs().max() < 0.01, dtype


def test_a_smaller_moment_is_not_written_past_its_end():
    memory = torch.zeros(2000, dtype=torch.bfloat16)
    param, grad, step = torch.randn(1000), torch.ones(1000), torch.zeros(())
    hyper = torch.tensor([[0.1, 0.9, 0.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    for momentum in (memory.view(torch.float32), memory[:1000]):
        memory.zero_()
        step.zero_()
        fastkernels.anchored_sgd_([param], [grad], [momentum], [step], hyper, [0])
    assert torch.equal(memory[:1000].float(), grad)
    assert not memory[1000:].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": [torch.zeros(3)]}, r"grads\[0\] is \[3\], params\[0\] is \[4\]"),
        ({"grads": []}, "grads has 0 entries for 1 params"),
        ({"params": [torch.zeros(4, dtype=torch.complex64)]}, "must be one of"),
        ({"grads": [torch.eye(4)[0].to_sparse()]}, r"grads\[0\] is torch.sparse_coo"),
        ({"hyper": torch.zeros(1, 3)}, r"hyper must be float64 \[groups, 7\]"),
        ({"groups": [1]}, "indexes the 1 rows"),
        ({"steps": [torch.zeros((), dtype=torch.int64)]}, r"steps\[0\] must be float32"),
        ({"exp_avgs": [torch.zeros(4, dtype=torch.float16)]}, "it must be one of"),
        (
            {"exp_avgs": [torch.zeros(4, dtype=torch.uint8)]},
            r"exp_avgs\[0\] are 8-bit codes, and exp_avg_scales has no",
        ),
        ({"anchors": [torch.zeros(5)]}, r"anchors\[0\] is \[5\]"),
        ({"stats": torch.zeros(4)}, "stats must be float64"),
        ({"remainders": [torch.zeros(4, dtype=torch.int16)]}, "of a bfloat16 parameter"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {
        "params": [torch.zeros(4)],
        "grads": [torch.zeros(4)],
        "exp_avgs": [torch.zeros(4)],
        "exp_avg_sqs": [torch.zeros(4)],
        "steps": [torch.zeros(())],
        "hyper": torch.zeros(1, 7, dtype=torch.float64),
        "groups": [0],
    }
    with pytest.raises(ValueError, match=message):
        fastkernels.anchored_adamw_(**{**arguments, **change})


def test_no_tensors_is_no_work():
    fastkernels.anchored_adamw_([], [], [], [], [], torch.zeros(1, 7, dtype=torch.float64), [])


def test_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "abacus")
    run, grads = make("adamw", FEATURES["plain"])
    with pytest.raises(RuntimeError, match="FASTKERNELS_BACKEND=abacus"):
        run.step(grads)
