"""The Hessian of cross-entropy in its logits: every backend against float64, and bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastkernels import cross_entropy_hvp_, cross_entropy_quad

# (K, N, C): odd sizes, one of everything, nothing, a width that sweeps twice in Triton; and on both
# sides of a block of 16 rows and of the 15 classes that C++ sums beside each other.
SHAPES = [
    (3, 5, 7),
    (1, 1, 1),
    (2, 33, 10),
    (4, 2, 1000),
    (0, 3, 4),
    (2, 0, 4),
    (2, 2, 16500),
    (2, 1, 33000),
    *((2, 37, classes) for classes in (2, 3, 5, 8, 15, 16, 17, 31, 133)),
]


def _inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    _, rows, classes = shape
    u = torch.randn(shape, dtype=torch.float64, generator=generator)
    logits = 3 * torch.randn(rows, classes, dtype=torch.float64, generator=generator)
    scale = torch.rand(rows, dtype=torch.float64, generator=generator)
    scale[: rows // 3] = 0
    return u.to(dtype), torch.softmax(logits, -1).to(dtype), scale.to(dtype)


def _truth(u: Tensor, p: Tensor, scale: Tensor) -> Tensor:
    """Row by row with the explicit matrix; needs no formula of ours."""
    out = torch.zeros(u.shape, dtype=torch.float64)
    for n, (row, a) in enumerate(zip(p.double(), scale.double(), strict=True)):
        out[:, n] = a * (row * u[:, n].double() - row * (u[:, n].double() @ row)[:, None])
    return out


def _plain(u: Tensor, p: Tensor, scale: Tensor) -> Tensor:
    """What plain torch computes at the dtype under test, in float32 at least."""
    v, w, a = (t.float() if t.dtype == torch.bfloat16 else t for t in (u, p, scale))
    deviation = v - (v * w).sum(-1, keepdim=True)
    return (a[:, None] * w * deviation).to(u.dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_and_form(backend: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    u, p, scale = _inputs(shape, dtype)
    truth = _truth(u, p, scale)
    expected = _plain(u, p, scale)
    quad = cross_entropy_quad(u, p, scale)
    product = u.clone()
    cross_entropy_hvp_(product, p, scale)
    limit = 2 * (expected.double() - truth).abs().max() if truth.numel() else 0
    floor = 1e-15 if dtype == torch.float64 else 1e-7 if dtype == torch.float32 else 4e-3
    size = truth.abs().max() if truth.numel() else torch.zeros(())
    error = (product.double() - truth).abs().max() if truth.numel() else 0
    assert error <= limit + floor * size
    assert quad.dtype == torch.float64
    forms = (truth * u.double()).sum((1, 2))
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(quad, forms, rtol=bound, atol=bound * 1e-2)


def test_it_is_the_hessian_of_torchs_cross_entropy(backend: str) -> None:
    logits = torch.randn(6, 5, dtype=torch.float64)
    y = torch.randint(0, 5, (6,))
    hessian = torch.autograd.functional.hessian(lambda z: F.cross_entropy(z, y), logits)
    u = torch.randn(3, 6, 5, dtype=torch.float64)
    truth = torch.einsum("ncmd,kmd->knc", hessian, u)
    cross_entropy_hvp_(u, torch.softmax(logits, -1), torch.full((6,), 1 / 6).double())
    torch.testing.assert_close(u, truth, rtol=1e-6, atol=1e-9)


def test_threads_do_not_change_a_bit() -> None:
    u, p, scale = _inputs((4, 70, 300), torch.float32)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        product = u.clone()
        cross_entropy_hvp_(product, p, scale)
        results.append((product, cross_entropy_quad(u, p, scale)))
    torch.set_num_threads(1)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_opcheck(backend: str) -> None:
    arguments = _inputs((2, 3, 4), torch.float32)
    torch.library.opcheck(torch.ops.fastkernels.cross_entropy_hvp_, arguments)
    torch.library.opcheck(torch.ops.fastkernels.cross_entropy_quad, arguments)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda u, p, s: (u[0], p, s), r"u must be \[K, N, C\]"),
        (lambda u, p, s: (u, p[:1], s), r"p \[N, C\]"),
        (lambda u, p, s: (u, p.double(), s), "p is torch.float64"),
        (lambda u, p, s: (u, p, s.long()), "scale is torch.int64"),
        (lambda u, p, s: (u.long(), p.long(), s.long()), "u is torch.int64"),
        (lambda u, p, s: (u.transpose(0, 1).contiguous().transpose(0, 1), p, s), "u must be cont"),
    ],
)
def test_bad_input_is_named(change, match: str) -> None:
    arguments = change(*_inputs((2, 3, 4), torch.float32))
    for op in (cross_entropy_hvp_, cross_entropy_quad):
        with pytest.raises(ValueError, match=match):
            op(*arguments)


def test_a_gradient_is_refused_by_name(backend: str) -> None:
    """autograd would take the product for the identity."""
    for i, name in enumerate(("u", "p", "scale")):
        arguments = list(_inputs((2, 3, 4), torch.float32))
        arguments[i] = arguments[i].requires_grad_() * 1
        for op in (cross_entropy_hvp_, cross_entropy_quad):
            with pytest.raises(ValueError, match=f"{name} requires a gradient"):
                op(*arguments)
            with torch.no_grad():
                op(*arguments)


def test_autograd_notices_the_write(backend: str) -> None:
    u, p, scale = _inputs((2, 3, 4), torch.float32)
    w = torch.ones(u.shape, requires_grad=True)
    loss = (w * u).sum()  # saves u
    cross_entropy_hvp_(u, p, scale)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
