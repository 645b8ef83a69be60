"""Scaled dot-product attention: tangents of the fused kernels' forward and backward.

    S = c q k^T,  P = softmax(S),  o = P v
    gv = P^T g,   gP = g v^T,  gS = P (gP - <gP, P>),  gq = c gS k,  gk = c gS^T q

P and gS are computed once per batch; the tangents follow by the product rule. torch's own kernels
of attention have no second derivatives.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fast.curvature.products.rules.base import Call, Tangent, UnsupportedOperation, aten, rule
from fast.curvature.products.rules.matmul import sum_of_products


def _flat(t: Tensor) -> Tensor:
    """A tensor [..., T, d] as [n, T, d], with heads and batch in one dimension."""
    return t.reshape(-1, *t.shape[-2:])


def _flat_tangent(d: Tangent) -> Tangent:
    """A tangent [K, ..., T, d] as [K, n, T, d]."""
    return None if d is None else d.reshape(d.shape[0], -1, *d.shape[-2:])


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)) * scale
    if causal:
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~keep, -math.inf)
    if mask is not None:
        boolean = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -math.inf) if boolean else scores + mask
    p = torch.softmax(scores, -1)
    if mask is not None:
        # Where a row masks every key, the kernels give zero and the softmax NaN.
        p = p.masked_fill((scores == -math.inf).all(-1, keepdim=True), 0.0)
    return p


def _t(m: Tangent) -> Tangent:
    return None if m is None else m.transpose(-1, -2)


def _softmax_tangent(p: Tensor, ds: Tensor) -> Tensor:
    """The tangent of P = softmax(S), P (dS - <dS, P>); it is written into dS."""
    ds = ds.mul_(p)
    return ds.sub_(ds.sum(-1, keepdim=True) * p)


class _Attention:
    """The fixed tensors of one attention, and the tangents of its two passes.

    All tensors are [n, T, d], and all tangents [K, n, T, d], with heads and batch in n.
    """

    def __init__(
        self,
        call: Call,
        qkv: tuple[Tensor, Tensor, Tensor],
        mask: Tensor | None,
        causal: bool,
        scale: float | None,
    ):
        q, k, v = qkv
        if q.shape[:-2] != k.shape[:-2] or q.shape[:-2] != v.shape[:-2]:
            raise UnsupportedOperation("attention with fewer key heads than query heads")
        self.scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        self.p = call.shared(
            ("attention", causal, self.scale),
            (q, k) if mask is None else (q, k, mask),
            lambda: _flat(_probabilities(q, k, mask, causal, self.scale)),
        )
        self.q, self.k, self.v = _flat(q), _flat(k), _flat(v)
        # Set by `prepare`, where queries, keys or values move.
        self.g: Any = None
        self.gp: Any = None
        self.slope: Any = None
        self.gs: Any = None

    def scores(self, dq: Tangent, dk: Tangent) -> Tangent:
        """dP, from dS = c (dq k^T + q dk^T)."""
        if dq is None and dk is None:
            return None
        ds = sum_of_products((dq, _t(self.k)), (self.q, _t(dk)))
        return _softmax_tangent(self.p, ds.mul_(self.scale))

    def forward(self, dq: Tangent, dk: Tangent, dv: Tangent) -> Tensor:
        """The tangent of o."""
        return sum_of_products((self.scores(dq, dk), self.v), (self.p, dv))

    def prepare(self, g: Tensor) -> None:
        """Compute what `backward` reads of the gradient g in o, where q, k or v move."""
        self.g = _flat(g)
        self.gp = torch.bmm(self.g, self.v.transpose(-1, -2))
        self.slope = self.gp - (self.gp * self.p).sum(-1, keepdim=True)
        self.gs = self.p * self.slope * self.scale

    def backward(self, dg: Tangent, dq: Tangent, dk: Tangent, dv: Tangent) -> tuple[Tangent, ...]:
        """The tangents of gq, gk and gv."""
        dp = self.scores(dq, dk)
        by_v = sum_of_products((_t(dp), self.g), (_t(self.p), dg))
        dgp = sum_of_products((dg, _t(self.v)), (self.g, _t(dv)))
        # gS = P (gP - <gP, P>). For dgP this is the softmax's own tangent; the rest moves with dP.
        dgs = None if dgp is None else _softmax_tangent(self.p, dgp)
        if dp is not None:
            overlap = (dp * self.gp).sum(-1, keepdim=True)
            by_p = dp.mul_(self.slope).sub_(overlap * self.p)
            dgs = by_p if dgs is None else dgs.add_(by_p)
        if dgs is not None:
            dgs = dgs.mul_(self.scale)
        by_q = sum_of_products((dgs, self.k), (self.gs, dk))
        by_k = sum_of_products((_t(dgs), self.q), (_t(self.gs), dq))
        return by_q, by_k, by_v


# Places of the mask (None: it is a keyword, or there is none), of the dropout and of `causal` among
# the arguments of torch's kernels: that of CPUs, of float32 and of half precision on CUDA.
FORWARD = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: (None, 3, 4),
    aten._scaled_dot_product_efficient_attention.default: (3, 5, 6),
    aten._scaled_dot_product_flash_attention.default: (None, 3, 4),
}
BACKWARD = {
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: (None, 6, 7),
    aten._scaled_dot_product_efficient_attention_backward.default: (4, 9, 11),
    aten._scaled_dot_product_flash_attention_backward.default: (None, 10, 11),
}


def _attention(
    call: Call, qkv: tuple[Tensor, Tensor, Tensor], places: tuple[int | None, int, int]
) -> _Attention:
    mask_at, dropout_at, causal_at = places
    if call.arg(dropout_at, 0.0):
        raise UnsupportedOperation("fused attention with dropout")
    if mask_at is not None and call.is_active(mask_at):
        raise UnsupportedOperation("attention with a mask that depends on parameters")
    mask = call.kwargs.get("attn_mask") if mask_at is None else call.arg(mask_at)
    return _Attention(call, qkv, mask, call.arg(causal_at, False), call.kwargs.get("scale"))


@rule(*FORWARD)
def forward(call: Call):
    attention = _attention(call, call.args[:3], FORWARD[call.func])
    shape = call.out[0].shape
    call.differentiable_outputs = (0,)
    rest = (None,) * (len(call.out) - 1)

    def derivative(*tangents: Tangent) -> tuple[Any, ...]:
        out = attention.forward(*map(_flat_tangent, tangents[:3]))
        return (out.reshape(out.shape[0], *shape), *rest)

    return derivative


@rule(*BACKWARD)
def backward(call: Call):
    """Its first arguments are g, q, k and v."""
    g, q, k, v = call.args[:4]
    attention = _attention(call, (q, k, v), BACKWARD[call.func])
    shapes = (q.shape, k.shape, v.shape)
    if any(call.active[1:4]):
        attention.prepare(g)
    call.differentiable_outputs = (0, 1, 2)
    rest = (None,) * (len(call.out) - 3)

    def derivative(*tangents: Tangent) -> tuple[Any, ...]:
        out = attention.backward(*map(_flat_tangent, tangents[:4]))
        gradients = [
            None if m is None else m.reshape(m.shape[0], *s)
            for m, s in zip(out, shapes, strict=True)
        ]
        return (*gradients, *rest)

    return derivative
