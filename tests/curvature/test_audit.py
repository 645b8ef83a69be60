"""The audit of second derivatives, and the operations where torch's own are wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvature.errors import OPEN, row
from curvature.truth import Net, batch, linear
from fast.curvature import audit
from fast.curvature.audit import WAYS

# Where the derivative of torch's first derivative is NaN, an error says so.
REFUSED = {"RBF kernel at distance 0"}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", OPEN)
def test_open_errors_of_torch_are_exact_here_or_refused_by_name(name: str) -> None:
    audited = row(name)
    if name in REFUSED:
        assert audited.ours.startswith("refused: module 'module' (Point) has a derivative that is")
    else:
        assert audited.ours == "exact"


class Squared(torch.autograd.Function):
    """x^2 with the derivative of its derivative wrong by a factor."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (2.5 * x - 0.5 * x.detach())


def test_a_wrong_derivative_is_found_and_its_module_named() -> None:
    class Wrong(nn.Module):
        def forward(self, x):
            return Squared.apply(x)

    x, _ = batch()
    report = audit(nn.Sequential(linear(6, 4), nn.Tanh(), Wrong(), linear(4, 2)), x)
    assert [r.name for r in report.rows] == ["0", "1", "2", "3"]
    assert report.wrong == ["2"]
    assert not report.ok  # the module's own backward is what every way goes by
    assert "| 2 (Wrong) | wrong by" in str(report)
    good = [r for r in report.rows if r.name != "2"]
    assert all(r.double_backward == r.ours == "exact" for r in good)


def test_a_model_is_audited_in_its_own_modes_and_left_alone() -> None:
    x, _ = batch()
    model = nn.Sequential(linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), linear(4, 2))
    model[1].double()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    report = audit(model, x)
    assert report.ok
    assert all(r.ours == "exact" for r in report.rows)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_a_network_that_fails_in_float64_is_told_so() -> None:
    model = Net(lambda net, x: net.first(x.float()), first=nn.Linear(6, 4))
    with pytest.raises(ValueError, match=r"fails at these inputs in float64 \(mat1 and mat2"):
        audit(model, torch.randn(5, 6))


def test_a_kink_has_no_derivative() -> None:
    x = torch.zeros(2, 3, dtype=torch.float64)
    (only,) = audit(nn.Sequential(nn.PReLU(dtype=torch.float64), nn.Identity()), x).rows[:1]
    assert only.ours == only.double_backward == "kink"


@pytest.mark.parametrize(
    "module", [nn.ReLU(), nn.LeakyReLU(), nn.Hardswish(), nn.MaxPool2d(2), nn.PReLU()]
)
def test_inputs_near_a_kink_are_no_error(module: nn.Module) -> None:
    """Some of so many inputs lie within the step of the differences from it."""
    torch.manual_seed(0)
    _, only = audit(nn.Sequential(nn.BatchNorm2d(4), module), torch.randn(8, 4, 32, 32)).rows
    assert {getattr(only, way) for way in WAYS} == {"exact"}


def test_modules_without_real_inputs_have_nothing_to_derive_by() -> None:
    class Count(nn.Module):
        def forward(self, ids):
            return (ids > 1).long()

    model = Net(
        lambda net, ids: net.embed(net.count(ids)).sum(1), count=Count(), embed=nn.Embedding(2, 3)
    )
    report = audit(model, torch.tensor([[0, 2], [1, 3]]))
    assert report.rows[0].ours == "exact: nothing to derive by"
    assert report.ok
