"""Operations that combine many values into one: sums, means, softmax and pooling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fast.curvature.products.rules.base import Call, Tangent, aten, dims_of, rule


@rule(aten.sum.dim_IntList, aten.sum.default, aten.mean.dim, aten.mean.default)
def total(call: Call):
    x = call.args[0]
    dims = [d + 1 for d in dims_of(call.arg(1), x.ndim)]
    keepdim = call.arg(2, False)
    mean = call.func in (aten.mean.dim, aten.mean.default)
    reduce = torch.mean if mean else torch.sum
    return lambda d, *_: reduce(d, dims, keepdim) if dims else d


@rule(aten._softmax.default, aten._safe_softmax.default)
def softmax(call: Call):
    """The safe one gives zeros where a whole row is masked, and these do not move."""
    y, dim = call.keep(call.out), call.args[1] % max(call.out.ndim, 1) + 1

    def derivative(d: Tensor, *_: Any) -> Tangent:
        out = d * y
        return out.sub_(out.sum(dim, keepdim=True) * y)

    return derivative


@rule(aten._log_softmax.default)
def log_softmax(call: Call):
    p, dim = call.out.exp(), call.args[1] % max(call.out.ndim, 1) + 1
    return lambda d, *_: d - (d * p).sum(dim, keepdim=True)


@rule(aten._softmax_backward_data.default)
def softmax_backward(call: Call):
    """This is y (g - <g, y>), a function of both g and y."""
    g, y, dim = call.args[:3]
    dim = dim % max(y.ndim, 1)
    y = call.keep(y)
    slope = g - (g * y).sum(dim, keepdim=True) if call.is_active(1) else None
    g = call.keep(g) if call.is_active(1) else None

    def derivative(dg: Tangent, dy: Tangent, *_: Any) -> Tangent:
        out = None
        if dg is not None:
            out = dg * y
            out = out.sub_(out.sum(dim + 1, keepdim=True) * y)
        if dy is not None:
            term = dy * slope
            term = term.sub_((dy * g).sum(dim + 1, keepdim=True) * y)
            out = term if out is None else out.add_(term)
        return out

    return derivative


@rule(aten._log_softmax_backward_data.default)
def log_softmax_backward(call: Call):
    """This is g - exp(y) sum(g), a function of both g and y."""
    g, y, dim = call.args[:3]
    dim = dim % max(y.ndim, 1)
    p = y.exp()
    slope = p * g.sum(dim, keepdim=True) if call.is_active(1) else None

    def derivative(dg: Tangent, dy: Tangent, *_: Any) -> Tangent:
        if dg is None:
            return -(dy * slope)
        out = dg - dg.sum(dim + 1, keepdim=True) * p
        return out if dy is None else out.sub_(dy * slope)

    return derivative


def _over_images(call: Call):
    """A linear operation on images, which are the last three dimensions: K joins the batch."""
    func, rest, kwargs = call.func, call.args[1:], call.kwargs

    def derivative(d: Tensor, *_: Any) -> Tangent:
        lead = d.shape[:-3]
        inner = d.transpose(0, 1) if d.ndim == 5 else d
        out = func(inner.reshape(-1, *d.shape[-3:]), *rest, **kwargs)
        if d.ndim == 5:
            return out.reshape(lead[1], lead[0], *out.shape[-3:]).transpose(0, 1)
        return out.reshape(*lead, *out.shape[-3:])

    return derivative


rule(aten.avg_pool2d.default, aten._adaptive_avg_pool2d.default)(_over_images)


@rule(aten.avg_pool2d_backward.default, aten._adaptive_avg_pool2d_backward.default, by_first=True)
def pool_backward(call: Call):
    """It is linear in the gradient, and reads only the shape of the input."""
    func, x, rest = call.func, call.args[1], call.args[2:]
    shape = x.shape

    def derivative(dg: Tangent) -> Tangent:
        num_vectors = dg.shape[0]
        like = dg.new_empty(()).expand(num_vectors * shape[0], *shape[1:])
        out = func(dg.reshape(-1, *dg.shape[2:]), like, *rest)
        return out.reshape(num_vectors, *shape)

    return derivative


@rule(aten.max_pool2d_with_indices.default)
def max_pool(call: Call):
    out, indices = call.out
    call.differentiable_outputs = (0,)
    flat, shape = indices.flatten(-2), out.shape

    def derivative(d: Tensor, *_: Any) -> tuple[Tensor, None]:
        largest = d.flatten(-2).gather(-1, flat.expand(d.shape[0], *flat.shape))
        return largest.reshape(d.shape[0], *shape), None

    return derivative


@rule(aten.max_pool2d_with_indices_backward.default, by_first=True)
def max_pool_backward(call: Call):
    """The gradient is scattered to fixed indices."""
    indices, shape = call.args[7].flatten(-2), call.args[1].shape

    def derivative(dg: Tangent) -> Tangent:
        num_vectors = dg.shape[0]
        out = dg.new_zeros(num_vectors, *shape).flatten(-2)
        out.scatter_add_(-1, indices.expand(num_vectors, *indices.shape), dg.flatten(-2))
        return out.reshape(num_vectors, *shape)

    return derivative
