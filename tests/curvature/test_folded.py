"""The folded method: which networks it takes, what it falls back from, chunks and the cache."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from curvature.cases import BY_LOOP, NETWORKS, build
from curvature.truth import Net, batch, linear
from fast.curvature import GGN, Hessian
from fast.curvature.products.batched import RuleError, UnsupportedOperation
from fast.curvature.products.batched.tape import Tape
from fast.curvature.products.rules import RULES


@pytest.mark.parametrize("kind", [Hessian, GGN])
@pytest.mark.parametrize("name", NETWORKS)
def test_which_networks_are_folded(name: str, kind) -> None:
    model, x, y = build(name)
    reason = kind(model, F.cross_entropy, (x, y)).explain()
    assert reason.startswith("loop: no folded rule for" if name in BY_LOOP else "folded"), reason


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_chunks_give_the_same_products(kind, chunk: int) -> None:
    model, x, y = build("encoder-layer")
    whole = kind(model, F.cross_entropy, (x, y), chunk=100)
    parts = kind(model, F.cross_entropy, (x, y), chunk=chunk)
    V = torch.randn(whole.shape[0], 7, dtype=x.dtype)
    torch.testing.assert_close(parts @ V, whole @ V, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(parts.quad(V), whole.quad(V), rtol=1e-11, atol=1e-13)
    assert parts.explain() == f"folded, {chunk} vectors a pass"


def test_a_memory_budget_bounds_the_chunk() -> None:
    model, x, y = build("mlp-tanh")
    assert (
        Hessian(model, F.cross_entropy, (x, y), memory_budget=1)
        .explain()
        .endswith("1 vectors a pass")
    )
    roomy = Hessian(model, F.cross_entropy, (x, y), memory_budget=2**20).explain()
    assert int(roomy.split()[1]) > 10


def test_the_cache_follows_parameters_modes_and_data() -> None:
    model, x, y = build("batch-norm-train")
    H = Hessian(model, F.cross_entropy, (x, y))

    def fresh() -> torch.Tensor:
        return Hessian(model, F.cross_entropy, (x, y), cache=False).dense()

    torch.testing.assert_close(H.dense(), fresh())
    with torch.no_grad():
        model[0].weight.mul_(1.1)
    torch.testing.assert_close(H.dense(), fresh())
    # A write that no version counter sees, as native kernels make it.
    model[0].weight.data.numpy()[0, 0] += 1
    torch.testing.assert_close(H.dense(), fresh())
    model.eval()
    torch.testing.assert_close(H.dense(), fresh())
    x.mul_(2)
    torch.testing.assert_close(H.dense(), fresh())


def test_a_value_that_is_overwritten_is_noticed() -> None:
    value = torch.ones(3)
    tape = Tape(versions=[(value, value._version, "aten.mul.Tensor")])
    tape.verify()
    tape.versions.append((value, value._version, "aten.mul.Tensor"))
    value.add_(1)
    with pytest.raises(UnsupportedOperation, match=r"aten\.mul\.Tensor, an input of which"):
        tape.verify()


def test_gradient_of_the_operator() -> None:
    model, x, y = build("conv")
    H = Hessian(model, F.cross_entropy, [(x[:3], y[:3]), (x[3:], y[3:])])
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    torch.testing.assert_close(H.gradient(), torch.cat([g.reshape(-1) for g in grads]))


@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_the_head_alone_starts_at_its_features(kind) -> None:
    model, x, y = build("conv")
    whole = kind(model, F.cross_entropy, (x, y))
    head = kind(model, F.cross_entropy, (x, y), params=r"out\..*")
    rows = slice(whole.space.slices()["out.weight"].start, None)
    torch.testing.assert_close(head.dense(), whole.dense()[rows, rows])


def _fails_at_once(call):
    raise KeyError("boom")


def _fails_later(call):
    def derivative(*tangents):
        raise KeyError("boom")

    return derivative


@pytest.mark.parametrize("rule", [_fails_at_once, _fails_later])
@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_a_rule_that_fails_leaves_it_to_the_loop_and_warns_once(kind, rule, monkeypatch) -> None:
    model, x, y = build("mlp-tanh")
    truth = kind(model, F.cross_entropy, (x, y)).dense()
    monkeypatch.setitem(RULES, torch.ops.aten.tanh.default, rule)
    reason = "the record failed (in the rule of aten.tanh.default, KeyError: 'boom')"
    for data in ((x, y), [(x[:2], y[:2]), (x[2:], y[2:])]):
        operator = kind(model, F.cross_entropy, data)
        with pytest.warns(RuntimeWarning, match=re.escape(reason)) as warned:
            product = operator.dense()
        assert len(warned) == 1
        assert "one vector after the other" in str(warned[0].message)
        torch.testing.assert_close(product, truth)
        torch.testing.assert_close(operator.quad(torch.eye(len(truth)).double()), truth.diag())
        assert operator.explain() == f"loop: {reason}"
    with pytest.raises(RuleError, match=r"aten\.tanh\.default, KeyError: 'boom'"):
        kind(model, F.cross_entropy, (x, y), method="folded").dense()


@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_what_torch_decomposes_for_other_shapes_alone_goes_by_the_loop(kind) -> None:
    x, y = batch()

    def forward(net: Net, x: Tensor) -> Tensor:
        return net.out(
            F.adaptive_max_pool2d(net.first(x).view(-1, 1, 5, 1).sin(), (4, 1))[:, 0, :, 0]
        )

    model = Net(forward, first=linear(6, 5), out=linear(4, 4))
    operator = kind(model, F.cross_entropy, (x, y))  # a warning would be an error
    truth = kind(model, F.cross_entropy, (x, y), method="loop").dense()
    torch.testing.assert_close(operator.dense(), truth)
    assert operator.explain() == "loop: no folded rule for aten.adaptive_max_pool2d.default"


def test_an_error_of_the_network_itself_is_blamed_on_no_rule() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        raise LookupError("no such word")

    with pytest.raises(LookupError, match="no such word"):
        Hessian(Net(forward, out=linear(6, 4)), F.cross_entropy, batch()).dense()
