"""Products by oneDNN: every layout, and whole products with all of them sent there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from curvature.cases import build
from fast.curvature import GGN, Hessian
from fast.curvature.products.rules import gemm

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


@pytest.fixture(autouse=True)
def _everything_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(gemm, "LEAST_WORK", 1)
    monkeypatch.setattr(gemm, "LEAST_SIDE", 1)


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.t().contiguous().t(),
    "gaps": lambda t: torch.stack([t, t], 1)[:, 0],
    "transposed gaps": lambda t: torch.stack([t.t(), t.t()], 1)[:, 0].t(),
    "one row": lambda t: t[:1].expand(*t.shape),
}


@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("left", LAYOUTS)
def test_every_layout(left: str, right: str) -> None:
    generator = torch.Generator().manual_seed(0)
    a = LAYOUTS[left](torch.randn(7, 33, generator=generator))
    b = LAYOUTS[right](torch.randn(33, 5, generator=generator))
    assert gemm.preferred(a, b)
    truth = a.double() @ b.double()
    for out in (None, torch.empty(7, 5), torch.empty(5, 7).t()):
        result = gemm.mm(a, b, out)
        assert out is None or result is out
        assert float((result - truth).norm() / truth.norm()) < 1e-6


def test_doubles_stay_doubles() -> None:
    a = torch.randn(4, 4, dtype=torch.float64)
    assert not gemm.preferred(a, a)
    torch.testing.assert_close(gemm.mm(a, a), a @ a, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [Hessian, GGN])
@pytest.mark.parametrize("name", ["mlp-tanh", "attention", "encoder-layer", "tied"])
def test_products_in_float32(name: str, kind) -> None:
    model, x, y = build(name)
    truth = kind(model, F.cross_entropy, (x, y)).dense()
    model, x, y = build(name, torch.float32)
    operator = kind(model, F.cross_entropy, (x, y))
    assert operator.explain().startswith("folded")
    assert float((operator.dense() - truth).norm() / truth.norm()) < 1e-5
