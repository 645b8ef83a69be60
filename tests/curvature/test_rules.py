"""Rules of the record where shapes, options and values are not the usual ones."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature.truth import Net, batch, linear, parameter, relative, truths
from fast.curvature import GGN, Hessian

MASK = torch.tensor([[True, False, True], [True, True, False], [False, False, True]])


def _tokens(x: Tensor) -> Tensor:
    return torch.stack([x, x.flip(1), x * x], 1)[:, None]


def _shared_attention(net: Net, x: Tensor) -> Tensor:
    """Three attentions of the same queries and keys, that differ in their options."""
    q, k, v = (_tokens(x) * w for w in net.w)
    attend = F.scaled_dot_product_attention
    a = attend(q, k, v, is_causal=True) + attend(q, k, v, scale=0.1)
    a = a + attend(q, k, v, attn_mask=MASK)
    return net.out(a.flatten(2).mean(1)[:, :6])


def _masked_attention(mask: Tensor):
    def forward(net: Net, x: Tensor) -> Tensor:
        q, k, v = (_tokens(x) * w for w in net.w)
        return net.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[:, 0].mean(1))

    return forward


def _two_layer_norms(net: Net, x: Tensor) -> Tensor:
    h = net.first(x)
    halves = F.layer_norm(h.view(5, 2, 2), (2,)).view(5, 4)
    return F.layer_norm(h, (4,)) + F.layer_norm(h, (4,), eps=1.0) + halves


def _two_batch_norms(net: Net, x: Tensor) -> Tensor:
    h = net.first(x)
    return F.batch_norm(h, None, None, training=True) + F.batch_norm(
        h, None, None, training=True, eps=1.0
    )


def _convolutions(*layers: nn.Module, channels: int, spatial: int = 2) -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        h = x.view(-1, 1, *([2, 3] if spatial == 2 else [6, 1, 1][:spatial]))
        return net.out(net.layers(h).flatten(2).mean(2).tanh())

    return Net(forward, layers=nn.Sequential(*layers).double(), out=linear(channels, 4))


def _between(function: Callable[[Tensor], Tensor], width: int = 6) -> Callable[[], Net]:
    """Makes a network with a function of [5, 6] between two layers."""
    return lambda: Net(
        lambda n, x: n.out(function(2 * n.first(x))), first=linear(6, 6), out=linear(width, 4)
    )


def _attention_with_dropout(net: Net, x: Tensor) -> Tensor:
    q, k, v = (_tokens(x) * w for w in net.w)
    return net.out(F.scaled_dot_product_attention(q, k, v, dropout_p=0.3).flatten(2).mean(1))


def _indices(x: Tensor) -> Tensor:
    return (x.abs() * 10).long() % 5


@torch.jit.script
def _scripted(h: Tensor) -> Tensor:
    return h * h.detach().exp()


NOTHING = MASK.clone()
NOTHING[1] = False
COLUMNS = torch.tensor([True, False, True, True])
ADDITIVE = torch.zeros(3, 3, dtype=torch.float64).masked_fill(~MASK, -1.5)
NETS = {
    "attention shared": lambda: Net(_shared_attention, w=parameter(3, 6), out=linear(6, 4)),
    "attention mask": lambda: Net(_masked_attention(MASK), w=parameter(3, 6), out=linear(6, 4)),
    "attention to nothing": lambda: Net(
        _masked_attention(NOTHING), w=parameter(3, 6), out=linear(6, 4)
    ),
    "attention bias": lambda: Net(_masked_attention(ADDITIVE), w=parameter(3, 6), out=linear(6, 4)),
    "layer norms": lambda: Net(_two_layer_norms, first=linear(6, 4)),
    "batch norms": lambda: Net(_two_batch_norms, first=linear(6, 4)),
    "pad": lambda: Net(
        lambda n, x: n.out(F.pad(n.first(x).tanh(), (1, 2), value=1.5)),
        first=linear(6, 4),
        out=linear(7, 4),
    ),
    "padding index": lambda: Net(
        lambda n, x: n.out(n.embed(_indices(x)).mean(1).tanh()),
        embed=nn.Embedding(5, 6, padding_idx=2, dtype=torch.float64),
        out=linear(6, 4),
    ),
    "convolutions with gaps": lambda: _convolutions(
        nn.Conv2d(1, 3, 2, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 2, (1, 2), padding=(0, 2), dilation=(1, 2)),
        channels=2,
    ),
    "convolutions in a wide margin": lambda: _convolutions(
        nn.Conv2d(1, 2, 1, padding=1), nn.Tanh(), nn.Conv2d(2, 3, 1, padding=2), channels=3
    ),
    "convolutions of many channels": lambda: _convolutions(
        nn.Conv2d(1, 10, 2, padding=1), nn.Tanh(), nn.Conv2d(10, 12, 2), channels=12
    ),
    "transposed convolutions": lambda: _convolutions(
        nn.Conv2d(1, 4, 1),
        nn.Tanh(),
        nn.ConvTranspose2d(4, 3, 2),
        nn.Tanh(),
        nn.ConvTranspose2d(3, 6, 2, groups=3, stride=2),
        channels=6,
    ),
    "convolutions of groups": lambda: _convolutions(
        nn.Conv2d(1, 4, 1), nn.Tanh(), nn.Conv2d(4, 6, 2, groups=2), channels=6
    ),
    "convolutions of lines": lambda: _convolutions(
        nn.Conv1d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv1d(3, 2, 2), channels=2, spatial=1
    ),
    "convolutions of volumes": lambda: _convolutions(
        nn.Conv3d(1, 2, (2, 1, 1)), nn.Tanh(), nn.Conv3d(2, 2, 1), channels=2, spatial=3
    ),
    "detach in a script": lambda: Net(lambda n, x: _scripted(n.first(x)), first=linear(6, 4)),
    "detach under vmap": lambda: Net(
        lambda n, x: torch.vmap(lambda h: h * h.detach().exp())(n.first(x)), first=linear(6, 4)
    ),
    "new_tensor": lambda: Net(
        lambda n, x: (lambda h: h * h.new_tensor(h).exp())(n.first(x)), first=linear(6, 4)
    ),
    "1 - h": lambda: Net(lambda n, x: (1 - n.first(x)).sin() * 2 / n.first(x), first=linear(6, 4)),
    "powers": lambda: Net(
        lambda n, x: n.out(sum(torch.relu(n.first(x)) ** p for p in (0, 1, 2, 3))),
        first=linear(6, 4),
        out=linear(4, 4),
    ),
    "comparison": lambda: Net(
        lambda n, x: (lambda h: torch.where(h > 0, h.sin(), torch.full_like(h, 2.0)))(n.first(x)),
        first=linear(6, 4),
    ),
    "types": lambda: Net(
        lambda n, x: n.out(n.first(x).float().double().tanh() + n.w.double()),
        first=linear(6, 4),
        out=linear(4, 4),
        w=parameter(4),
    ),
    "where": lambda: Net(
        lambda n, x: torch.where(COLUMNS, n.w.sin(), x[:, :4]).sum(0) * n.first(x).exp(),
        w=parameter(4),
        first=linear(6, 4),
    ),
    "group norms": lambda: _convolutions(
        nn.Conv2d(1, 4, 1),
        nn.GroupNorm(2, 4),
        nn.Tanh(),
        nn.GroupNorm(4, 4, affine=False),
        channels=4,
    ),
    "group norm of vectors": lambda: Net(
        lambda n, x: n.out(n.norm(n.norm(x).sin())),
        norm=nn.GroupNorm(2, 6).double(),
        out=linear(6, 4),
    ),
    "softplus": _between(F.softplus),
    "mish": _between(F.mish),
    "glu": _between(F.glu, 3),
    "hardswish": _between(F.hardswish),
    "leaky relu": _between(lambda h: F.leaky_relu(h, 0.3)),
    "logsigmoid": _between(F.logsigmoid),
    "logsigmoid at zero": _between(lambda h: F.logsigmoid(h - h.detach())),
    "functions": _between(lambda h: h.expm1().atan() + h.exp2().log1p()),
    "masked_fill": lambda: Net(
        lambda n, x: n.w.sin().masked_fill(x[:, :4] > 0, 2.0) * n.first(x).exp(),
        w=parameter(4),
        first=linear(6, 4),
    ),
}


@pytest.mark.filterwarnings("ignore:To copy construct")
@pytest.mark.parametrize("name", NETS)
def test_products_equal_the_explicit_matrices(name: str) -> None:
    torch.manual_seed(1)
    model, (x, y) = NETS[name](), batch()
    for kind, truth in zip((Hessian, GGN), truths(model, x, y), strict=True):
        # torch may run a script as an autograd function of its own, which has no rule.
        for method in ("auto" if name == "detach in a script" else "folded", "loop"):
            product = kind(model, F.cross_entropy, (x, y), method=method).dense()
            limit = 1e-6 if name == "types" else 1e-10
            assert relative(product, truth) < limit, (kind.__name__, method)


@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_attention_with_dropout_has_the_mask_of_the_loop(kind) -> None:
    torch.manual_seed(0)
    model, data = Net(_attention_with_dropout, w=parameter(3, 6), out=linear(18, 4)), batch()
    first, second = (kind(model, F.cross_entropy, data, method=m) for m in ("folded", "loop"))
    assert relative(first.dense(), second.dense()) < 1e-12
    other = kind(model, F.cross_entropy, data, seed=1)
    assert relative(other.dense(), second.dense()) > 1e-3


@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_a_hard_sigmoid_has_the_derivatives_that_torch_lacks(kind) -> None:
    model = _between(F.hardsigmoid)()
    operator = kind(model, F.cross_entropy, batch(), method="folded")
    assert operator.check().ok


@pytest.mark.parametrize("activation", [nn.ELU(), nn.CELU(), nn.PReLU(), nn.LeakyReLU(), nn.ReLU()])
def test_at_a_kink_the_side_is_that_of_autograd(activation: nn.Module) -> None:
    """Values are exactly zero there, and move with the parameters."""
    torch.manual_seed(0)
    first, last = nn.Linear(6, 6, bias=False), nn.Linear(6, 4)
    with torch.no_grad():
        first.weight[:2] = 0.0
    model = nn.Sequential(first, copy.deepcopy(activation), last).double()
    for kind in (Hessian, GGN):
        loop, auto = (
            kind(model, F.cross_entropy, [batch()], method=method) for method in ("loop", "auto")
        )
        vectors = torch.randn(loop.shape[0], 4, dtype=torch.float64)
        torch.testing.assert_close(auto @ vectors, loop @ vectors, rtol=1e-10, atol=1e-12)
