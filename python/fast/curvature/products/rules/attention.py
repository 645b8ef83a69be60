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
from fast.curvature.products.rules.matmul import batched


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


def _terms(pairs: list[tuple[Tensor | None, Tensor | None]]) -> Tangent:
    """The sum of a_i @ b_i over the pairs without None.

    A factor [n, p, q] does not move: it gets a dimension K of stride zero.
    """
    out = None
    for a, b in pairs:
        if a is None or b is None:
            continue
        num_vectors = max(a.shape[0] if a.ndim == 4 else 1, b.shape[0] if b.ndim == 4 else 1)
        a = a if a.ndim == 4 else a.expand(num_vectors, *a.shape)
        b = b if b.ndim == 4 else b.expand(num_vectors, *b.shape)
        out = batched(a, b, out)
    return out


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
        ds = _terms(
            [
                (dq, self.k.transpose(-1, -2)),
                (self.q, None if dk is None else dk.transpose(-1, -2)),
            ]
        )
        return _softmax_tangent(self.p, ds.mul_(self.scale))

    def forward(self, dq: Tangent, dk: Tangent, dv: Tangent) -> Tensor:
        """The tangent of o."""
        return _terms([(self.scores(dq, dk), self.v), (self.p, dv)])

    def prepare(self, g: Tensor) -> None:
        """Compute what `backward` reads of the gradient g in o, where q, k or v move."""
        self.g = _flat(g)
        self.gp = torch.bmm(self.g, self.v.transpose(-1, -2))
        self.slope = self.gp - (self.gp * self.p).sum(-1, keepdim=True)
        self.gs = self.p * self.slope * self.scale

    def backward(self, dg: Tangent, dq: Tangent, dk: Tangent, dv: Tangent) -> tuple[Tangent, ...]:
        """The tangents of gq, gk and gv."""
        dp = self.scores(dq, dk)
        by_v = _terms(
            [
                (None if dp is None else dp.transpose(-1, -2), self.g),
                (self.p.transpose(-1, -2), dg),
            ]
        )
        dgp = _terms(
            [(dg, self.v.transpose(-1, -2)), (self.g, None if dv is None else dv.transpose(-1, -2))]
        )
        # gS = P (gP - <gP, P>). For dgP this is the softmax's own tangent; the rest moves with dP.
        dgs = None if dgp is None else _softmax_tangent(self.p, dgp)
        if dp is not None:
            overlap = (dp * self.gp).sum(-1, keepdim=True)
            by_p = dp.mul_(self.slope).sub_(overlap * self.p)
            dgs = by_p if dgs is None else dgs.add_(by_p)
        if dgs is not None:
            dgs = dgs.mul_(self.scale)
        by_q = _terms([(dgs, self.k), (self.gs, dk)])
        by_k = _terms(
            [
                (None if dgs is None else dgs.transpose(-1, -2), self.q),
                (None if dq is None else self.gs.transpose(-1, -2), dq),
            ]
        )
        return by_q, by_k, by_v


def _no_dropout(p: float) -> None:
    if p:
        raise UnsupportedOperation("fused attention with dropout")


def _fixed_mask(call: Call, at: int) -> None:
    if call.is_active(at):
        raise UnsupportedOperation("attention with a mask that depends on parameters")


def _forward_rule(call: Call, mask: Tensor | None, causal: bool, scale: float | None):
    attention = _Attention(call, call.args[:3], mask, causal, scale)
    out = call.out[0]
    shape = out.shape
    call.differentiable_outputs = (0,)
    rest = (None,) * (len(call.out) - 1)

    def derivative(dq: Any, dk: Any, dv: Any, *_: Any) -> tuple[Any, ...]:
        out_tangent = attention.forward(_flat_tangent(dq), _flat_tangent(dk), _flat_tangent(dv))
        return (out_tangent.reshape(out_tangent.shape[0], *shape), *rest)

    return derivative


def _backward_rule(call: Call, mask: Tensor | None, causal: bool, scale: float | None):
    g, q, k, v = call.args[:4]
    attention = _Attention(call, (q, k, v), mask, causal, scale)
    shapes = (q.shape, k.shape, v.shape)
    if any(call.active[1:4]):
        attention.prepare(g)
    call.differentiable_outputs = (0, 1, 2)
    rest = (None,) * (len(call.out) - 3)

    def derivative(dg: Any, dq: Any, dk: Any, dv: Any, *_: Any) -> tuple[Any, ...]:
        tangents = attention.backward(
            _flat_tangent(dg), _flat_tangent(dq), _flat_tangent(dk), _flat_tangent(dv)
        )
        gradients = [
            None if m is None else m.reshape(m.shape[0], *s)
            for m, s in zip(tangents, shapes, strict=True)
        ]
        return (*gradients, *rest)

    return derivative


@rule(aten._scaled_dot_product_flash_attention_for_cpu.default)
def flash_cpu(call: Call):
    _no_dropout(call.arg(3, 0.0))
    return _forward_rule(
        call, call.kwargs.get("attn_mask"), call.arg(4, False), call.kwargs.get("scale")
    )


@rule(aten._scaled_dot_product_flash_attention_for_cpu_backward.default)
def flash_cpu_backward(call: Call):
    _no_dropout(call.arg(6, 0.0))
    return _backward_rule(
        call, call.kwargs.get("attn_mask"), call.arg(7, False), call.kwargs.get("scale")
    )


@rule(aten._scaled_dot_product_efficient_attention.default)
def efficient(call: Call):
    """The kernel for float32 on CUDA.

    Its arguments are q, k, v, bias, compute_log_sumexp, dropout and causal.
    """
    _no_dropout(call.arg(5, 0.0))
    _fixed_mask(call, 3)
    return _forward_rule(call, call.arg(3, None), call.arg(6, False), call.kwargs.get("scale"))


@rule(aten._scaled_dot_product_efficient_attention_backward.default)
def efficient_backward(call: Call):
    """Its arguments are g, q, k, v, bias, out, log-sum-exp, random state (2), dropout, output mask
    and causal.
    """
    _no_dropout(call.arg(9, 0.0))
    _fixed_mask(call, 4)
    return _backward_rule(call, call.arg(4, None), call.arg(11, False), call.kwargs.get("scale"))


@rule(aten._scaled_dot_product_flash_attention.default)
def flash(call: Call):
    """The kernel for half precision on CUDA. Its arguments are q, k, v, dropout and causal."""
    _no_dropout(call.arg(3, 0.0))
    return _forward_rule(call, None, call.arg(4, False), call.kwargs.get("scale"))


@rule(aten._scaled_dot_product_flash_attention_backward.default)
def flash_backward(call: Call):
    """Its arguments are g, q, k, v, out, log-sum-exp, lengths (4), dropout, causal and random state
    (2).
    """
    _no_dropout(call.arg(10, 0.0))
    return _backward_rule(call, None, call.arg(11, False), call.kwargs.get("scale"))
