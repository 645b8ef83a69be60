"""The Hessian of cross-entropy in its logits on a CUDA device, against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from fastkernels import cross_entropy_hvp_, cross_entropy_quad
from fastkernels.op import ENVIRONMENT
from fastkernels.ops.cross_entropy_hvp import reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]
# (K, N, C): odd sizes, one, nothing, the widest rows on chip, and rows that are swept twice.
SHAPES = [(3, 5, 7), (1, 1, 1), (0, 3, 4), (2, 0, 4), (2, 33, 1000), (2, 3, 16384), (2, 3, 32000),
          (2, 3, 32769)]  # fmt: skip
RELATIVE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_and_form(monkeypatch, shape, dtype) -> None:
    monkeypatch.setenv(ENVIRONMENT, "triton")
    u = torch.randn(shape, device="cuda").to(dtype)
    p = torch.softmax(3 * torch.randn(shape[1:], device="cuda"), -1).to(dtype)
    scale = torch.rand(shape[1], device="cuda").to(dtype)
    truth = u.double().clone()
    reference.cross_entropy_hvp_(truth, p.double(), scale.double())
    forms = reference.cross_entropy_quad(u.double(), p.double(), scale.double())
    product = u.clone()
    cross_entropy_hvp_(product, p, scale)
    # A sum of C numbers that nearly cancel: judged by the largest of the row's result.
    size = float(truth.abs().max()) if truth.numel() else 0.0
    torch.testing.assert_close(product.double(), truth, rtol=0, atol=RELATIVE[dtype] * size)
    torch.testing.assert_close(cross_entropy_quad(u, p, scale), forms, rtol=1e-5, atol=1e-6)


def test_offsets_beyond_31_bits(monkeypatch) -> None:
    """The last vector of 2.2e9 numbers in bfloat16 (4.3 GiB)."""
    monkeypatch.setenv(ENVIRONMENT, "triton")
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of device memory")
    u = torch.zeros(2200, 1000, 1000, device="cuda", dtype=torch.bfloat16)
    u[-1].normal_()
    p = torch.softmax(torch.randn(1000, 1000, device="cuda"), -1).bfloat16()
    scale = torch.ones(1000, device="cuda", dtype=torch.bfloat16)
    alone = u[-1:].clone()
    cross_entropy_hvp_(u, p, scale)
    cross_entropy_hvp_(alone, p, scale)
    assert torch.equal(u[-1:], alone)
    assert float(alone.abs().max()) > 0
