"""`cross_entropy_hvp_` and `cross_entropy_quad`: the Hessian of cross-entropy in its logits, for K
vectors at once."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkernels import backends, memory
from fastkernels.op import Backend, always, choose, operator

HVP, QUAD = "cross_entropy_hvp_", "cross_entropy_quad"


def _backends(op: str) -> tuple[Backend, ...]:
    return tuple(
        Backend(
            name=name,
            device=device,
            module=f"{__name__}.{name}",
            function=op,
            available=available,
        )
        for name, device, available in (
            ("native", "cpu", backends.native.available),
            ("triton", "cuda", backends.triton.available),
            ("reference", "cpu", always),
            ("reference", "cuda", always),
            ("triton", "cpu", backends.triton.available_on_cpu),
        )
    )


def _fake_hvp(u: Tensor, p: Tensor, scale: Tensor) -> None:
    torch._check(u.shape[1:] == p.shape, lambda: "u must be [K, *p.shape]")


def _fake_quad(u: Tensor, p: Tensor, scale: Tensor) -> Tensor:
    return u.new_empty(u.shape[0], dtype=torch.float64)


@operator(fake=_fake_hvp, mutates=("u",), backends=_backends(HVP))
def cross_entropy_hvp_(u: Tensor, p: Tensor, scale: Tensor) -> None:
    """Overwrite every `u[k]` with the Hessian of the loss in the logits times `u[k]`.

    The equation is in `.reference`; no logit is exponentiated here: `p` is computed once and
    shared by the K vectors, and by all products at the same point. It is not differentiable.

    Args:
        u: `[K, N, C]`, contiguous: K vectors of N rows of C logits. Overwritten.
        p: `[N, C]`, contiguous: the softmax of the logits.
        scale: `[N]`: the share of each row in the loss; 1/N for a plain mean, 0 for an ignored row.
            All three have one dtype.

    Raises:
        ValueError: shapes, dtypes, devices or layouts do not fit, or a gradient is asked for; the
            message names the tensor.
        RuntimeError: FASTKERNELS_BACKEND names a backend that is not there.
    """
    _check(HVP, u, p, scale)
    if u.numel():
        choose(HVP, u.device.type)(u, p, scale)
        # Kernels write behind autograd's back: a graph that saved `u` must notice.
        torch.autograd.graph.increment_version(u)


@operator(fake=_fake_quad, mutates=(), backends=_backends(QUAD))
def cross_entropy_quad(u: Tensor, p: Tensor, scale: Tensor) -> Tensor:
    """`[K]`, float64: `<u[k], H u[k]>` for every k; `u` is read once and nothing else is written.

    It is not differentiable.

    Args:
        u: as for `cross_entropy_hvp_`.
        p: as for `cross_entropy_hvp_`.
        scale: as for `cross_entropy_hvp_`.

    Raises:
        ValueError: shapes, dtypes, devices or layouts do not fit, or a gradient is asked for; the
            message names the tensor.
        RuntimeError: FASTKERNELS_BACKEND names a backend that is not there.
    """
    _check(QUAD, u, p, scale)
    if not u.numel():
        return u.new_zeros(u.shape[0], dtype=torch.float64)
    result: Tensor = choose(QUAD, u.device.type)(u, p, scale)
    return result


def _check(op: str, u: Tensor, p: Tensor, scale: Tensor) -> None:
    if u.dim() != 3 or p.shape != u.shape[1:] or scale.shape != u.shape[1:2]:
        raise ValueError(
            f"{op}: u must be [K, N, C], p [N, C] and scale [N]; got {list(u.shape)}, "
            f"{list(p.shape)} and {list(scale.shape)}"
        )
    for name, t in {"u": u, "p": p, "scale": scale}.items():
        if t.dtype != u.dtype or not t.is_floating_point():
            raise ValueError(f"{op}: {name} is {t.dtype}; u, p and scale share one floating dtype")
        if t.device != u.device:
            raise ValueError(f"{op}: {name} is on {t.device}, u on {u.device}")
        if not t.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous; pass {name}.contiguous()")
        if t.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{op}: {name} requires a gradient, which this op does not have; pass "
                f"{name}.detach(), or call it under torch.no_grad()"
            )
    memory.check(op, (("u", u, op == HVP), ("p", p, False), ("scale", scale, False)))
