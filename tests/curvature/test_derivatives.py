"""Networks that have one derivative only, and second derivatives that torch does not have right."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature.cases import difference, explicit_jacobian, loss_at
from curvature.truth import Net, batch, explicit_ggn, linear, parameter, relative
from fast.curvature import GGN, Fisher, Hessian, SecondDerivativeError, fisher_diagonal


class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos()


def once() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    x, _ = batch()
    ids = torch.randint(0, 7, (5, 3))
    bag = nn.EmbeddingBag(7, 5, mode="max", dtype=torch.float64)
    inplace = nn.Sequential(linear(6, 5), nn.ReLU(inplace=True), nn.Hardsigmoid(), linear(5, 4))
    return {
        "hardsigmoid": (inplace, x),
        "embedding bag": (nn.Sequential(bag, linear(5, 4)), ids),
        "distances": (
            Net(lambda n, x: -torch.cdist(n.first(x), n.c), first=linear(6, 3), c=parameter(4, 3)),
            x,
        ),
        "once": (
            Net(lambda n, x: n.out(Sine.apply(n.first(x))), first=linear(6, 5), out=linear(5, 4)),
            x,
        ),
    }


ONCE = once()
CULPRITS = {"hardsigmoid": "'2'", "embedding bag": "'0'", "distances": "''", "once": "''"}


@pytest.mark.parametrize("name", ONCE)
@pytest.mark.parametrize("method", ["auto", "loop"])
def test_products_that_need_one_derivative(name: str, method: str) -> None:
    model, x = ONCE[name]
    y = batch()[1]
    outputs, params = loss_at(model, x, lambda z: z), dict(model.named_parameters())
    jacobian = explicit_jacobian(outputs, params)
    p = outputs(params).detach().softmax(-1)
    rows = (F.one_hot(y, 4) - p)[:, None] @ jacobian.view(5, 4, -1)
    empirical = rows[:, 0].T @ rows[:, 0] / 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ggn = GGN(model, F.cross_entropy, (x, y), method=method)
        truth = explicit_ggn(outputs, params)
        # torch rounds the slope of a hard sigmoid, 1/6, to float32; its decomposition does not.
        limit = 1e-8 if (name, method) == ("hardsigmoid", "auto") else 1e-10
        assert relative(ggn.dense(), truth) < limit
        assert float(ggn.quad(torch.ones_like(truth[0]))) == pytest.approx(float(truth.sum()))
        fisher = Fisher(model, F.cross_entropy, (x, y), method=method, kind="empirical")
        assert relative(fisher.dense(), empirical) < limit


@pytest.mark.parametrize("name", ONCE)
def test_their_hessian_is_refused_by_name(name: str) -> None:
    model, x = ONCE[name]
    # A record of a hard sigmoid has its decomposition, which can be differentiated twice.
    method = "loop" if name == "hardsigmoid" else "auto"
    if name == "distances" and torch.__version__ >= "2.14":  # which differentiates them twice
        hessian = Hessian(model, F.cross_entropy, (x, batch()[1])).dense()
        assert relative(hessian, hessian_by_differences(model, x, batch()[1])) < 1e-6
        return
    with pytest.raises(SecondDerivativeError, match=rf"module {CULPRITS[name]} .*twice.*fast.GGN"):
        Hessian(model, F.cross_entropy, (x, batch()[1]), method=method).dense()


def hessian_by_differences(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    params = dict(model.named_parameters())
    size = sum(p.numel() for p in params.values())
    loss = loss_at(model, x, lambda z: F.cross_entropy(z, y))
    return torch.stack([difference(loss, params, v) for v in torch.eye(size).double()])


@pytest.mark.parametrize(
    "function",
    [
        lambda h: F.relu((40 * h).logcumsumexp(1) - 0.5),
        lambda h: torch.logcumsumexp(h, dim=0),
        lambda h: torch.logaddexp(900 * h, h.flip(1)),
    ],
    ids=["logcumsumexp", "down", "logaddexp"],
)
def test_second_derivatives_that_are_nan_in_torch(function) -> None:
    torch.manual_seed(0)
    x, y = batch()
    model = Net(
        lambda net, x: net.out(function(net.first(x))), first=linear(6, 5), out=linear(5, 4)
    )
    result = Hessian(model, F.cross_entropy, (x, y)).dense()
    assert relative(result, hessian_by_differences(model, x, y)) < 1e-6


@pytest.mark.parametrize(
    ("operation", "function"),
    [
        ("sqrt", torch.sqrt),
        ("sinc", torch.sinc),
        ("normalize", lambda h: F.normalize(h * (h > 9))),
    ],
)
def test_a_derivative_that_is_not_finite_is_named(operation: str, function) -> None:
    torch.manual_seed(0)
    x, y = batch()
    middle = Net(lambda net, h: function(h))
    model = nn.Sequential(linear(6, 5), nn.ReLU(inplace=True), middle, linear(5, 4))
    match = rf"module '2' \(Net\) has a derivative that is not finite: {operation} gives NaN"
    with pytest.raises(SecondDerivativeError, match=match):
        Hessian(model, F.cross_entropy, (x, y)).dense()
    outputs = loss_at(model, x, lambda z: z)
    truth = explicit_ggn(outputs, dict(model.named_parameters()))
    assert relative(GGN(model, F.cross_entropy, (x, y)).dense(), truth) < 1e-10


def test_other_products_that_are_not_finite() -> None:
    x, y = batch()
    model = linear(6, 4)
    H = Hessian(model, F.cross_entropy, (x, y))
    with pytest.raises(ValueError, match="V holds NaN or infinity"):
        H @ torch.full((28,), torch.nan, dtype=torch.float64)
    with pytest.raises(ValueError, match="output for batch 1 holds NaN"):
        Hessian(model, F.cross_entropy, [(x, y), (x / 0, y)]).dense()
    with torch.no_grad():
        model.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="the parameters hold NaN or infinity"):
        H.dense()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(layout: torch.layout) -> None:
    torch.manual_seed(0)
    parts = [torch.randn(n, 6, dtype=torch.float64) for n in (3, 5)]
    model = Net(lambda net, x: net.out(torch.stack([t.mean(0) for t in x.unbind()])).tanh(),
                out=linear(6, 4))  # fmt: skip
    plain = Net(lambda net, x: net.out(x).tanh(), out=model.out)
    y = torch.tensor([0, 2])
    nested = torch.nested.nested_tensor(parts, layout=layout)
    x = torch.stack([p.mean(0) for p in parts])
    for kind in (Hessian, GGN):
        operator = kind(model, F.cross_entropy, (nested, y))
        truth = kind(plain, F.cross_entropy, (x, y)).dense()
        assert relative(operator.dense(), truth) < 1e-10
        assert operator.check().ok
    with pytest.raises(ValueError, match="use method='signs'"):
        fisher_diagonal(model, F.cross_entropy, (nested, y))
