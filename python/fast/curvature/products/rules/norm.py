"""Layer norm, batch norm and group norm, by one derivation for all three.

With n = (x - m(x)) r the normalised input and m the mean over the normalised entries, the
derivative of n is the symmetric projection  P(u) = r (u - m(u) - n m(n u)),  so that

    y  = w n + b        dy  = w P(dx) + n dw + db
    gx = P(w g)         dgx = -r m(n dx) gx + r (dh - m(dh) - dn m(n h) - n m(dn h + n dh))

with h = w g, dh = w dg + g dw, dn = P(dx).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fast.curvature.products.rules.base import Call, Tangent, aten, rule


class Normalised:
    """The normalised input n of one call, its factor r, and the projection P.

    Args:
        dims: the dimensions that are normalised over, of the tensor without K.
    """

    def __init__(self, n: Tensor, r: Tensor, dims: list[int]):
        self.n, self.r = n, r
        self.dims = [d + 1 for d in dims]

    @classmethod
    def over(cls, x: Tensor, dims: list[int], eps: float) -> Normalised:
        var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
        r = torch.rsqrt(var + eps)
        return cls((x - mean) * r, r, dims)

    def mean(self, u: Tensor) -> Tensor:
        return u.mean(self.dims, keepdim=True)

    def project(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """P(u), and m(n u)."""
        overlap = self.mean(u * self.n)
        out = u - self.mean(u)
        return out.addcmul_(self.n, overlap, value=-1).mul_(self.r), overlap

    def prepare(self, h: Tensor) -> None:
        """Compute what `backward` reads of h, where the input moves."""
        gx, along = self.project(h[None])
        self.h = h * self.r
        self.gx = gx[0] * -self.r
        self.along = along[0] * self.r

    def backward(self, dh: Tangent, dx: Tangent) -> tuple[Tangent, Tangent]:
        """The tangent of P(h), and P(dx)."""
        out, dn = None, None
        if dh is not None:
            out, _ = self.project(dh)
        if dx is not None:
            dn, overlap = self.project(dx)
            out = self.gx * overlap if out is None else out.addcmul_(self.gx, overlap)
            out.addcmul_(dn, self.along, value=-1)
            out.addcmul_(self.n, self.mean(dn * self.h), value=-1)
        return out, dn


class Fixed:
    """Batch norm in eval mode: n = (x - mean) r is affine in x, so that P(u) = r u."""

    def __init__(self, x: Tensor, mean: Tensor, var: Tensor, eps: float):
        shape = [1, -1] + [1] * (x.ndim - 2)
        self.r = torch.rsqrt(var + eps).view(shape)
        self.n = (x - mean.view(shape)) * self.r

    def project(self, u: Tensor) -> tuple[Tensor, None]:
        return u * self.r, None

    def prepare(self, h: Tensor) -> None:
        """P does not depend on the input."""

    def backward(self, dh: Tangent, dx: Tangent) -> tuple[Tangent, Tangent]:
        return None if dh is None else dh * self.r, None if dx is None else dx * self.r


def _forward(call: Call, norm: Normalised | Fixed, w: Tensor | None, shape: list[int]):
    """The derivative of w n + b.

    Args:
        shape: that of w and b where they broadcast against the tensor.
    """
    wide = None if w is None else w.view(shape)
    scale = norm.r if wide is None else norm.r * wide if isinstance(norm, Fixed) else None

    def derivative(dx: Tangent, dw: Tangent, db: Tangent) -> Tangent:
        out = None
        if dx is not None and scale is not None and isinstance(norm, Fixed):
            out = dx * scale
        elif dx is not None:
            out, _ = norm.project(dx)
            out = out if wide is None else out.mul_(wide)
        if dw is not None:
            term = dw.view(-1, *shape)
            out = norm.n * term if out is None else out.addcmul_(norm.n, term)
        if db is not None:
            term = db.view(-1, *shape)
            out = term.expand(-1, *norm.n.shape) if out is None else out.add_(term)
        return out

    return derivative


def _backward(
    call: Call,
    norm: Normalised | Fixed,
    g: Tensor,
    w: Tensor | None,
    shape: list[int],
    rows: list[int],
    mask: list[bool],
):
    """The derivative of (gx, sum g n, sum g).

    Args:
        shape: that of w where it broadcasts against the tensor.
        rows: the dimensions that are summed over.
        mask: which of the three are computed.
    """
    wide = None if w is None else w.view(shape)
    moving = call.is_active(1)
    if moving:
        norm.prepare(g if wide is None else g * wide)
    over = [d + 1 for d in rows]
    size: Any = None if w is None else w.shape

    def derivative(dg: Tangent, dx: Tangent, dw: Tangent) -> tuple[Any, ...]:
        dh = None
        if dg is not None:
            dh = dg if wide is None else dg * wide
        if dw is not None:
            term = g * dw.view(-1, *shape)
            dh = term if dh is None else dh.add_(term)
        gx, dn = norm.backward(dh, dx)
        gw = gb = None
        if mask[1]:
            parts = [] if dg is None else [(dg * norm.n).sum(over)]
            parts += [] if dn is None else [(dn * g).sum(over)]
            gw = sum(parts[1:], parts[0]).reshape(-1, *size) if parts else None
        if mask[2] and dg is not None:
            gb = dg.sum(over).reshape(-1, *size)
        return gx if mask[0] else None, gw, gb

    depends = (True, call.is_active(0) or moving, call.is_active(0))
    call.differentiable_outputs = tuple(i for i in range(3) if mask[i] and depends[i])
    return derivative


def _layer(call: Call, x: Tensor, ndim: int, mean: Tensor, rstd: Tensor) -> Normalised:
    n = call.shared("layer norm", (x, mean, rstd), lambda: (x - mean) * rstd)
    return Normalised(n, rstd, list(range(x.ndim - ndim, x.ndim)))


@rule(aten.native_layer_norm.default)
def layer_norm(call: Call):
    x, shape, w = call.args[:3]
    norm = _layer(call, x, len(shape), *call.out[1:])
    call.differentiable_outputs = (0,)
    wide = [1] * (x.ndim - len(shape)) + list(shape)
    derivative = _forward(call, norm, w, wide)
    return lambda dx, _, dw, db, *__: (derivative(dx, dw, db), None, None)


@rule(aten.native_layer_norm_backward.default)
def layer_norm_backward(call: Call):
    g, x, shape, mean, rstd, w, _, mask = call.args
    first = x.ndim - len(shape)
    norm = _layer(call, x, len(shape), mean, rstd)
    wide = [1] * first + list(shape)
    derivative = _backward(call, norm, g, w, wide, list(range(first)), mask)
    return lambda dg, dx, _, __, ___, dw, *____: derivative(dg, dx, dw)


def _batch_norm(call: Call, x: Tensor, mean: Any, var: Any, train: bool, eps: float):
    if train:
        dims = [0, *range(2, x.ndim)]
        return call.shared(("batch norm", eps), (x,), lambda: Normalised.over(x, dims, eps))
    return call.shared(("batch norm", eps), (x, mean, var), lambda: Fixed(x, mean, var, eps))


@rule(aten.native_batch_norm.default, aten._native_batch_norm_legit.default)
def batch_norm(call: Call):
    x, w, _, mean, var, train, _, eps = call.args
    call.differentiable_outputs = (0,)
    shape = [x.shape[1] if d == 1 else 1 for d in range(x.ndim)]
    derivative = _forward(call, _batch_norm(call, x, mean, var, train, eps), w, shape)
    return lambda dx, dw, db, *__: (derivative(dx, dw, db), None, None)


@rule(aten.native_batch_norm_backward.default)
def batch_norm_backward(call: Call):
    g, x, w, mean, var, _, _, train, eps, mask = call.args
    norm = _batch_norm(call, x, mean, var, train, eps)
    shape = [x.shape[1] if d == 1 else 1 for d in range(x.ndim)]
    rows = [0, *range(2, x.ndim)]
    derivative = _backward(call, norm, g, w, shape, rows, mask)
    return lambda dg, dx, dw, *__: derivative(dg, dx, dw)


def _group_norm(call: Call, x: Tensor, mean: Tensor, rstd: Tensor) -> Normalised:
    """The input as [N, groups, channels of a group, ...], normalised over all but the first two."""
    apart = [*mean.shape, *[1] * (x.ndim - 1)]
    mean, rstd = mean.view(apart), rstd.view(apart)
    by_group = x.reshape(*apart[:2], -1, *x.shape[2:])
    n = call.shared("group norm", (x, mean, rstd), lambda: (by_group - mean) * rstd)
    return Normalised(n, rstd, list(range(2, by_group.ndim)))


def _grouped(d: Tangent, shape: torch.Size) -> Tangent:
    return None if d is None else d.reshape(d.shape[0], *shape)


@rule(aten.native_group_norm.default)
def group_norm(call: Call):
    x, w = call.args[:2]
    norm = _group_norm(call, x, *call.out[1:])
    call.differentiable_outputs = (0,)
    shape, group_shape = x.shape, norm.n.shape
    derivative = _forward(call, norm, w, [1, *group_shape[1:3], *[1] * (x.ndim - 2)])

    def ungrouped(dx: Tangent, dw: Tangent, db: Tangent, *_: Any) -> tuple[Tensor, None, None]:
        out = derivative(_grouped(dx, group_shape), dw, db)
        return out.reshape(out.shape[0], *shape), None, None

    return ungrouped


@rule(aten.native_group_norm_backward.default)
def group_norm_backward(call: Call):
    g, x, mean, rstd, w = call.args[:5]
    norm = _group_norm(call, x, mean, rstd)
    shape, group_shape, mask = x.shape, norm.n.shape, call.args[9]
    rows = [0, *range(3, len(group_shape))]
    wide = [1, *group_shape[1:3], *[1] * (x.ndim - 2)]
    derivative = _backward(call, norm, g.reshape(group_shape), w, wide, rows, mask)

    def ungrouped(dg: Tangent, dx: Tangent, _: None, __: None, dw: Tangent, *___: Any):
        gx, gw, gb = derivative(_grouped(dg, group_shape), _grouped(dx, group_shape), dw)
        return None if gx is None else gx.reshape(gx.shape[0], *shape), gw, gb

    return ungrouped
