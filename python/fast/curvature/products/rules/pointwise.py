"""Elementwise operations: a tangent is multiplied by a factor, which is computed once for all K."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fast.curvature.products.rules.base import Call, Tangent, aten, prims, rule, spread

# A slope gives f'(x), from the input x, the output y and the call.
Slope = Callable[[Tensor, Tensor, Call], Tensor]


def _unary(*funcs: Any, slope: Slope) -> None:
    """Register y = f(x), with dy = f'(x) dx."""

    @rule(*funcs)
    def unary(call: Call):
        factor = slope(call.args[0], call.out, call)
        return lambda d, *_: d * factor


def _mask(condition: Tensor, like: Tensor) -> Tensor:
    """1 where the condition holds, else 0, in the type of `like`."""
    return condition.to(like.dtype)


def _leaky(x: Tensor, slope: float) -> Tensor:
    """1 where x > 0, else the slope; in the type of x, for numbers alone would be float32."""
    return torch.where(x > 0, x.new_ones(()), x.new_full((), slope))


# Decompositions of torch call some functions by their names in `prims`.
_unary(aten.tanh.default, slope=lambda x, y, c: 1 - y * y)
_unary(aten.sigmoid.default, slope=lambda x, y, c: y * (1 - y))
_unary(aten.exp.default, prims.exp.default, slope=lambda x, y, c: c.keep(y))
_unary(aten.exp2.default, prims.exp2.default, slope=lambda x, y, c: y * math.log(2))
_unary(aten.expm1.default, prims.expm1.default, slope=lambda x, y, c: y + 1)
_unary(aten.log.default, prims.log.default, slope=lambda x, y, c: 1 / x)
_unary(aten.log1p.default, prims.log1p.default, slope=lambda x, y, c: 1 / (1 + x))
_unary(aten.sin.default, slope=lambda x, y, c: x.cos())
_unary(aten.cos.default, slope=lambda x, y, c: -x.sin())
_unary(aten.atan.default, prims.atan.default, slope=lambda x, y, c: 1 / (1 + x * x))
_unary(aten.sqrt.default, slope=lambda x, y, c: 0.5 / y)
_unary(aten.rsqrt.default, slope=lambda x, y, c: -0.5 * y**3)
_unary(aten.reciprocal.default, slope=lambda x, y, c: -y * y)
_unary(aten.abs.default, slope=lambda x, y, c: x.sign())
_unary(aten.erf.default, slope=lambda x, y, c: (2 / math.pi**0.5) * torch.exp(-x * x))
_unary(aten.gelu.default, slope=lambda x, y, c: gelu_slopes(x, c)[0])
_unary(aten.silu.default, slope=lambda x, y, c: silu_slopes(x, c)[0])


@rule(aten.log_sigmoid_forward.default)
def log_sigmoid(call: Call):
    """torch's decomposition has kinks at zero, where the function is smooth."""
    call.differentiable_outputs = (0,)
    slope = torch.sigmoid(-call.args[0])
    return lambda d: (d * slope, None)


@rule(aten.relu.default)
def relu(call: Call):
    mask = _mask(call.out > 0, call.out)
    return lambda d: d * mask


@rule(aten.leaky_relu.default)
def leaky_relu(call: Call):
    factor = _leaky(call.args[0], call.arg(1, 0.01))
    return lambda d, *_: d * factor


@rule(aten.hardtanh.default)
def hardtanh(call: Call):
    x = call.args[0]
    mask = _mask((x > call.arg(1, -1.0)) & (x < call.arg(2, 1.0)), x)
    return lambda d, *_: d * mask


@rule(aten.clamp.default)
def clamp(call: Call):
    x, low, high = call.args[0], call.arg(1), call.arg(2)
    mask = torch.ones_like(x, dtype=torch.bool)
    mask = mask if low is None else mask & (x >= low)
    mask = mask if high is None else mask & (x <= high)
    factor = _mask(mask, x)
    return lambda d, *_: d * factor


@rule(aten.clamp_min.default)
def clamp_min(call: Call):
    factor = _mask(call.args[0] >= call.args[1], call.args[0])
    return lambda d, *_: d * factor


@rule(aten.pow.Tensor_Scalar)
def power(call: Call):
    x, p = call.args
    if p == 0:  # p x^(p - 1) is NaN at x = 0
        return lambda d, *_: torch.zeros_like(d)
    factor = p * x ** (p - 1)
    return lambda d, *_: d * factor


def _ndim(x: Any) -> int:
    return x.ndim if isinstance(x, Tensor) else 0


@rule(aten.neg.default)
def neg(call: Call):
    return lambda d: -d


@rule(aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar)
def add(call: Call):
    a, b = call.args[:2]
    sign = -1.0 if call.func in (aten.sub.Tensor, aten.sub.Scalar) else 1.0
    alpha = sign * call.kwargs.get("alpha", call.arg(2, 1))
    shape, ndim = call.out.shape, call.out.ndim
    a_ndim, b_ndim = _ndim(a), _ndim(b)
    dtype = call.out.dtype

    def derivative(da: Tangent, db: Tangent, *_: Any) -> Tangent:
        if da is not None and db is not None:
            out = torch.add(spread(da, a_ndim, ndim), spread(db, b_ndim, ndim), alpha=alpha)
        elif da is not None:
            out = spread(da, a_ndim, ndim)
        else:
            out = spread(db, b_ndim, ndim)
            out = out if alpha == 1 else out * alpha
        out = out.to(dtype)  # a constant operand may give the result its type
        return out if out.shape[1:] == shape else out.expand(out.shape[0], *shape)

    return derivative


@rule(aten.mul.Tensor, aten.mul.Scalar)
def mul(call: Call):
    a, b = call.args[:2]
    ndim, a_ndim, b_ndim = call.out.ndim, _ndim(a), _ndim(b)
    keep_a: Any = (call.keep(a) if isinstance(a, Tensor) else a) if call.is_active(1) else None
    keep_b: Any = (call.keep(b) if isinstance(b, Tensor) else b) if call.is_active(0) else None

    def derivative(da: Tangent, db: Tangent) -> Tangent:
        if da is None:
            return spread(db, b_ndim, ndim) * keep_a
        out = spread(da, a_ndim, ndim) * keep_b
        if db is None:
            return out
        db = spread(db, b_ndim, ndim)
        # `out` may lack dimensions that broadcast in from b, and then cannot be updated in place.
        full = torch.broadcast_shapes(out.shape[1:], db.shape[1:]) == out.shape[1:]
        return out.addcmul_(db, keep_a) if full else out + db * keep_a

    return derivative


@rule(aten.div.Tensor, aten.div.Scalar)
def div(call: Call):
    a, b = call.args[:2]
    ndim, a_ndim, b_ndim = call.out.ndim, _ndim(a), _ndim(b)
    inverse = 1 / b
    slope: Any = -call.out * inverse if call.is_active(1) else None

    def derivative(da: Tangent, db: Tangent) -> Tangent:
        if da is None:
            return spread(db, b_ndim, ndim) * slope
        out = spread(da, a_ndim, ndim) * inverse
        return out if db is None else out + spread(db, b_ndim, ndim) * slope

    return derivative


@rule(aten.where.self, prims.where.default)
def where(call: Call):
    condition, a, b = call.args
    ndim, a_ndim, b_ndim = call.out.ndim, _ndim(a), _ndim(b)
    # A constant operand, which may be a number, may give the result its shape and its type.
    shape, dtype = call.out.shape, call.out.dtype
    mask = call.keep(condition).expand(shape)

    def derivative(_: None, da: Tangent, db: Tangent) -> Tangent:
        x = 0.0 if da is None else spread(da, a_ndim, ndim).to(dtype)
        y = 0.0 if db is None else spread(db, b_ndim, ndim).to(dtype)
        return torch.where(mask, x, y)

    return derivative


@rule(aten.masked_fill.Scalar)
def masked_fill(call: Call):
    mask, shape, ndim = call.keep(call.args[1]), call.out.shape, call.args[0].ndim

    def derivative(d: Tensor, *_: Any) -> Tensor:
        d = spread(d, ndim, len(shape))
        return d.expand(d.shape[0], *shape).masked_fill(mask, 0.0)

    return derivative


def _backward(func: Any, slopes: Callable[[Tensor, Call], tuple[Tensor, Tensor | None]]) -> None:
    """Register f_backward(g, x) = g f'(x), with slopes(x) = (f'(x), f''(x))."""

    @rule(func)
    def backward(call: Call):
        g, x = call.args[:2]
        first, second = slopes(x, call)
        by_x = second * g if call.is_active(1) else None

        def derivative(dg: Tangent, dx: Tangent = None, *_: Any) -> Tangent:
            if dg is None:
                return dx * by_x
            out = dg * first
            return out if dx is None else out.addcmul_(dx, by_x)

        return derivative


def gelu_slopes(x: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
    """First derivative of GELU and, where an exact Hessian needs it, the second."""
    approximate = call.kwargs.get("approximate", "none")
    slopes = _gelu_tanh if approximate == "tanh" else _gelu
    return call.shared(f"gelu {approximate}", (x,), lambda: slopes(x, call.exact))


def _gelu(x: Tensor, second: bool) -> tuple[Tensor, Tensor | None]:
    density = torch.exp(-0.5 * x * x).div_((2 * math.pi) ** 0.5)
    cdf = torch.erf(x / 2**0.5).add_(1).mul_(0.5)
    return cdf.addcmul_(x, density), density * (2 - x * x) if second else None


def _gelu_tanh(x: Tensor, second: bool) -> tuple[Tensor, Tensor | None]:
    c, a = (2 / math.pi) ** 0.5, 0.044715
    t = torch.tanh(c * (x + a * x**3))
    inner = c * (1 + 3 * a * x * x)
    dt = (1 - t * t) * inner
    first = 0.5 * (1 + t) + 0.5 * x * dt
    if not second:
        return first, None
    d2t = (1 - t * t) * (6 * c * a * x) - 2 * t * dt * inner
    return first, dt + 0.5 * x * d2t


def silu_slopes(x: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
    def slopes() -> tuple[Tensor, Tensor | None]:
        s = torch.sigmoid(x)
        ds = s * (1 - s)
        return s + x * ds, ds * (2 + x * (1 - 2 * s)) if call.exact else None

    return call.shared("silu", (x,), slopes)


def log_sigmoid_slopes(x: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(-x)
    return s, s * (s - 1)


_backward(aten.gelu_backward.default, gelu_slopes)
_backward(aten.log_sigmoid_backward.default, log_sigmoid_slopes)
_backward(aten.silu_backward.default, silu_slopes)
# These two read the output of their function, y.
_backward(aten.tanh_backward.default, lambda y, c: (1 - y * y, -2 * y))
_backward(aten.sigmoid_backward.default, lambda y, c: (y * (1 - y), 1 - 2 * y))


def _masked_backward(func: Any, factor: Callable[[Call], Tensor]) -> None:
    """Register the backward of a piecewise linear function: it does not change with the input."""

    @rule(func, by_first=True)
    def backward(call: Call):
        slope = factor(call)
        return lambda dg: dg * slope


_masked_backward(aten.threshold_backward.default, lambda c: _mask(c.args[1] > c.args[2], c.args[1]))
_masked_backward(
    aten.hardtanh_backward.default,
    lambda c: _mask((c.args[1] > c.args[2]) & (c.args[1] < c.args[3]), c.args[1]),
)
_masked_backward(aten.leaky_relu_backward.default, lambda c: _leaky(c.args[1], c.args[2]))
