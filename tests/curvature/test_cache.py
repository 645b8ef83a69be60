"""What is kept of a single batch is let go when anything that it was made of changes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature.cases import build
from curvature.truth import Net, batch, linear, parameter, relative
from fast.curvature import GGN, Hessian
from fast.curvature.network.snapshot import checksum


def _permute(model: nn.Module) -> None:
    weight = model[0].weight.data
    weight.copy_(weight.flip(0))


def _negate(model: nn.Module) -> None:
    model[0].weight.data.neg_()


def _statistics(model: nn.Module) -> None:
    model[1].running_var.numpy()[:] *= 3


def _probability(model: nn.Module) -> None:
    model[2].p = 0.9


def _slope(model: nn.Module) -> None:
    model[3] = nn.Sigmoid()


def _hook(model: nn.Module) -> None:
    model[0].register_forward_hook(lambda m, args, out: 3 * out)


def _forward(model: nn.Module) -> None:
    model[3].forward = torch.sin


CHANGES = (_permute, _negate, _statistics, _probability, _slope, _hook, _forward)


@pytest.mark.parametrize("kind", [Hessian, GGN])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_the_model(change: Callable[[nn.Module], None], kind) -> None:
    torch.manual_seed(0)
    x, y = batch()
    norm = nn.BatchNorm1d(5, dtype=torch.float64).eval()
    model = nn.Sequential(linear(6, 5), norm, nn.Dropout(0.5), nn.Tanh(), linear(5, 4))
    operator = kind(model, F.cross_entropy, (x, y))
    before = operator.dense()
    kept = operator._cache
    torch.testing.assert_close(operator.dense(), before)
    assert operator._cache is kept
    change(model)
    truth = kind(model, F.cross_entropy, (x, y), cache=False).dense()
    assert relative(before, truth) > 1e-3
    torch.testing.assert_close(operator.dense(), truth)


def test_changes_of_data_and_loss() -> None:
    model, x, y = build("mlp-tanh")
    loss_fn = nn.CrossEntropyLoss(weight=torch.ones(4, dtype=torch.float64))
    data = [(x, y)]
    operator = Hessian(model, loss_fn, data)

    def follows() -> None:
        fresh = Hessian(model, loss_fn, data, cache=False).dense()
        torch.testing.assert_close(operator.dense(), fresh)

    follows()
    x.data.numpy()[:] = x.numpy()[::-1].copy()
    follows()
    y.data[0] = (y[0] + 1) % 4
    follows()
    loss_fn.weight.data[1] = 7.0
    follows()
    loss_fn.weight = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    follows()
    data.append((x + 1, y))
    follows()


@pytest.mark.parametrize("method", ["auto", "loop"])
@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_a_used_operator_can_be_copied_and_pickled(kind, method: str) -> None:
    model, x, y = build("mlp-tanh")
    operator = kind(model, F.cross_entropy, (x, y), method=method)
    truth = operator.dense()
    for other in (copy.deepcopy(operator), pickle.loads(pickle.dumps(operator))):
        torch.testing.assert_close(other.dense(), truth)
    changed = copy.deepcopy(operator)
    _negate(changed.network.model)
    assert relative(changed.dense(), truth) > 1e-3
    torch.testing.assert_close(operator.dense(), truth)


def test_refresh_after_what_cannot_be_seen() -> None:
    x, y = batch()
    options = {"scale": 1.0}
    model = Net(lambda net, x: net.first(x).mul(options["scale"]).sin(), first=linear(6, 4))
    operator = Hessian(model, F.cross_entropy, (x, y))
    before = operator.dense()
    options["scale"] = 2.0
    torch.testing.assert_close(operator.dense(), before)
    operator.refresh()
    fresh = Hessian(model, F.cross_entropy, (x, y)).dense()
    torch.testing.assert_close(operator.dense(), fresh)
    assert relative(before, fresh) > 0.1


def test_a_model_that_counts_its_calls_is_kept() -> None:
    x, y = batch()

    def forward(net: Net, x: Tensor) -> Tensor:
        net.calls = getattr(net, "calls", 0) + 1
        return net.first(x).sin()

    model = Net(forward, first=linear(6, 4))
    operator = Hessian(model, F.cross_entropy, (x, y))
    operator.dense()
    calls = model.calls
    operator.dense()
    assert model.calls == calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_checksums_know_places_and_signs(dtype: torch.dtype) -> None:
    values = (torch.arange(3000) % 7 - 3).to(dtype)
    tensors = [values, values.flip(0), values.roll(1024), values.roll(1)]
    if dtype != torch.bool:
        tensors.append(-values)
    sums = [checksum(t) for t in tensors]
    for i, a in enumerate(sums):
        assert torch.equal(a, checksum(tensors[i].clone()))
        assert not any(torch.equal(a, b) for b in sums[i + 1 :])


def _past_its_module(frozen: bool, listed: bool) -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        return (net.first(x) * net.kept[0]).sin()

    w = parameter(4).requires_grad_(not frozen)
    model = Net(forward, first=linear(6, 4), **({"w": w} if listed else {}))
    model.kept = [w]
    return model


@pytest.mark.parametrize("method", ["auto", "loop"])
@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_a_parameter_used_past_its_module_is_named(kind, method: str) -> None:
    x, y = batch()
    options = {"method": method}
    operator = kind(_past_its_module(False, True), F.cross_entropy, (x, y), **options)
    with pytest.raises(ValueError, match="parameter 'w' is also used past its module"):
        operator.dense()
    with pytest.raises(ValueError, match="parameter 'w' is also used"):
        operator.gradient()
    # As a constant it is meant, or harmless.
    kind(_past_its_module(False, True), F.cross_entropy, (x, y), r"first\..*", **options).dense()
    unlisted = _past_its_module(False, False)
    with pytest.raises(ValueError, match=r"\[4\] that model\.parameters\(\) does not list"):
        kind(unlisted, F.cross_entropy, (x, y), **options).dense()
    kind(_past_its_module(True, False), F.cross_entropy, (x, y), **options).dense()


def test_a_frozen_parameter_used_past_its_module_is_named() -> None:
    x, y = batch()
    with pytest.raises(ValueError, match="parameter 'w' is also used past its module"):
        Hessian(_past_its_module(True, True), F.cross_entropy, (x, y)).dense()
