"""v^T H v without the product: equal to that of the explicit Hessian, whatever parameters do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature.cases import BY_LOOP, NETWORKS, build
from curvature.truth import Net, batch, linear, parameter, truths
from fast.curvature import Hessian
from fast.curvature.products.batched import forms
from fast.curvature.products.programs.program import ProgramPasses


def _forms_agree(model: nn.Module, x: Tensor, y: Tensor, hessian: Tensor) -> None:
    V = torch.randn(len(hessian), 3).double()
    truth = (V * (hessian @ V)).sum(0)
    limit = 1e-12 * float(V.norm() * (hessian @ V).norm())
    operator = Hessian(model, F.cross_entropy, [(x, y)], method="folded", cache=False)
    for _ in range(3):  # recorded, traced, run
        torch.testing.assert_close(operator.quad(V), truth, rtol=0, atol=limit)
    kept = Hessian(model, F.cross_entropy, (x, y), method="folded")
    torch.testing.assert_close(kept.quad(V), truth, rtol=0, atol=limit)


@pytest.mark.parametrize("name", [n for n in NETWORKS if n not in BY_LOOP])
def test_forms_of_networks(name: str) -> None:
    model, x, y = build(name)
    products = Hessian(model, F.cross_entropy, (x, y), method="loop").dense()
    _forms_agree(model, x, y, products)


def deep() -> nn.Sequential:
    return nn.Sequential(linear(6, 4), nn.Tanh(), linear(4, 4))


# Whether terms of parameters count twice, for all other operations are linear in them.
LAYERS: dict[str, tuple[bool, Callable[[], Net]]] = {
    "layers": (
        True,
        lambda: Net(lambda n, x: n.b(n.a(x).tanh()), a=deep(), b=linear(4, 4)),
    ),
    "residual": (
        True,
        lambda: Net(lambda n, x: _residual(n.a(x), n.b), a=deep(), b=linear(4, 4)),
    ),
    "scaled twice": (
        True,
        lambda: Net(lambda n, x: (n.a(x) * n.w).tanh() * n.w, a=deep(), w=parameter(4)),
    ),
    "bias of a square": (
        False,  # the square's backward pass computes a value of its own
        lambda: Net(lambda n, x: (n.a(x) + n.w) ** 2, a=deep(), w=parameter(4)),
    ),
    "its square": (
        True,  # those of `a`
        lambda: Net(lambda n, x: n.a(x).tanh() * (n.w * n.w), a=deep(), w=parameter(4)),
    ),
    "divided": (
        False,
        lambda: Net(lambda n, x: n.a(x).tanh() / n.w, a=deep(), w=parameter(4)),
    ),
    "low rank": (
        True,
        lambda: Net(
            lambda n, x: n.out((x @ (n.w + n.a @ n.b)).tanh()),
            w=parameter(6, 5),
            a=parameter(6, 2),
            b=parameter(2, 5),
            out=linear(5, 4),
        ),
    ),
    "added to a product of parameters": (
        True,
        lambda: Net(
            lambda n, x: torch.addmm(n.a(x).tanh(), n.v, n.w),
            a=deep(),
            v=parameter(5, 3),
            w=parameter(3, 4),
        ),
    ),
    "joined": (
        True,
        lambda: Net(
            lambda n, x: n.a(x).tanh() @ torch.cat([n.v, n.w]),
            a=deep(),
            v=parameter(1, 4),
            w=parameter(3, 4),
        ),
    ),
    "its transpose": (
        True,
        lambda: Net(lambda n, x: n.a(x).tanh() @ (n.w @ n.w.T), a=deep(), w=parameter(4, 3)),
    ),
}


def _residual(h: Tensor, layer: nn.Module) -> Tensor:
    h = h + layer(h.tanh())
    h = h + layer(h.relu())
    return h + h.softmax(-1)


@pytest.mark.parametrize("name", LAYERS)
def test_forms_where_parameters_are_not_only_weights_of_layers(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    factors = []
    term = forms._term
    monkeypatch.setattr(forms, "_term", lambda f, *rest: factors.append(f) or term(f, *rest))
    torch.manual_seed(1)
    twice, make = LAYERS[name]
    model, (x, y) = make(), batch()
    _forms_agree(model, x, y, truths(model, x, y)[0])
    assert (2 in factors) == twice


def test_forms_of_some_parameters() -> None:
    torch.manual_seed(1)
    model, (x, y) = LAYERS["layers"][1](), batch()
    H = Hessian(model, F.cross_entropy, [(x, y)], cache=False)
    block = H.block(["a.2.weight", "b.bias"])
    V = torch.randn(block.shape[0], 3).double()
    truth = (V * (block @ V)).sum(0)
    for _ in range(3):
        torch.testing.assert_close(block.quad(V), truth)
    (part,) = (part for *_, part in block.linearizations(3, block.loss))
    assert isinstance(part, ProgramPasses)
