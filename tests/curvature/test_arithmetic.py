"""Products by inductor's code, and with other arithmetic than that of the parameters."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvature.truth import batch, linear, relative
from fast.curvature import GGN, Hessian
from fast.curvature.products.precision import backends
from fast.curvature.products.programs.cached_record import TRACED_AT

KINDS = (Hessian, GGN)


def _convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 4)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", [True, False])
def test_bfloat16_products_are_rounded_and_the_same_by_rules_and_by_code(kind, cache) -> None:
    torch.manual_seed(0)
    model, data = _convolutional(), (torch.randn(5, 2, 6, 6), torch.randint(0, 4, (5,)))
    operator = kind(model, F.cross_entropy, data, gemm="bfloat16", cache=cache)
    V = torch.randn(operator.shape[0], 3)
    truth = kind(model, F.cross_entropy, data, method="loop") @ V
    products = [operator @ V for _ in range(TRACED_AT + 1)]
    assert 1e-4 < relative(products[0], truth) < 2e-2
    for product in products[1:]:
        torch.testing.assert_close(product, products[0])
    assert "bfloat16 products" in operator.explain()


def test_products_of_float64_are_not_rounded() -> None:
    model, (x, y) = nn.Sequential(linear(6, 5), nn.Tanh(), linear(5, 4)), batch()
    operator = GGN(model, F.cross_entropy, (x, y), gemm="bfloat16")
    V = torch.randn(operator.shape[0], 3, dtype=x.dtype)
    torch.testing.assert_close(operator @ V, GGN(model, F.cross_entropy, (x, y)) @ V)


def test_an_unknown_arithmetic_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gemm must be one of .*; got 'fp8'"):
        GGN(linear(6, 4), F.cross_entropy, batch(), gemm="fp8")


@pytest.mark.parametrize(("gemm", "inside"), [("tf32", "tf32"), ("float32", "ieee"), (None, None)])
def test_the_settings_of_a_gpu_are_put_back(gemm: str | None, inside: str | None) -> None:
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [s.fp32_precision for s in switches]
    with backends(gemm, torch.device("cuda")):
        assert [s.fp32_precision for s in switches] == ([inside] * 2 if inside else before)
    assert [s.fp32_precision for s in switches] == before
    with backends(gemm, torch.device("cpu")):
        assert [s.fp32_precision for s in switches] == before


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("kind", KINDS)
def test_products_by_the_code_of_inductor(kind, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, (x, y) = nn.Sequential(linear(6, 5), nn.Tanh(), linear(5, 4)), batch()
    V = torch.randn(sum(p.numel() for p in model.parameters()), 3, dtype=x.dtype)
    plain = kind(model, F.cross_entropy, (x, y)) @ V
    for cache in (True, False):
        operator = kind(model, F.cross_entropy, (x, y), compile=True, cache=cache)
        for _ in range(TRACED_AT + 1):
            torch.testing.assert_close(operator @ V, plain, rtol=1e-12, atol=1e-14)
        assert not operator.why_loop
        assert "by inductor's code" in operator.explain()
