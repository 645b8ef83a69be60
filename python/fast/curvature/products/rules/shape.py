"""Operations that move values, or make constants: tangents are moved in the same way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from fast.curvature.products.rules.base import (
    Call,
    Tangent,
    UnsupportedOperation,
    aten,
    prims,
    rule,
    spread,
)


@rule(
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
def view(call: Call):
    shape = call.out.shape
    return lambda d, *_: d.reshape(d.shape[0], *shape)


@rule(aten.alias.default, aten.detach.default, aten.lift_fresh.default)
def alias(call: Call):
    return lambda d: d


@rule(aten.clone.default)
def clone(call: Call):
    # Clones serve to change the memory order, which views of the tangent then need as well.
    dense = call.out.is_contiguous()
    return lambda d, *_: d.contiguous() if dense else d


@rule(aten._to_copy.default, prims.convert_element_type.default)
def to_copy(call: Call):
    dtype = call.out.dtype
    if not dtype.is_floating_point:
        call.differentiable_outputs = ()
    return lambda d, *_: d.to(dtype)


@rule(aten.t.default)
def t(call: Call):
    return lambda d: d if d.ndim < 3 else d.transpose(1, 2)


@rule(aten.transpose.int)
def transpose(call: Call):
    ndim = call.args[0].ndim
    i, j = (dim % ndim + 1 for dim in call.args[1:])
    return lambda d, *_: d.transpose(i, j)


@rule(aten.permute.default)
def permute(call: Call):
    ndim = call.args[0].ndim
    order = [0] + [dim % ndim + 1 for dim in call.args[1]]
    return lambda d, *_: d.permute(order)


@rule(aten.expand.default)
def expand(call: Call):
    shape, ndim = call.out.shape, call.args[0].ndim
    return lambda d, *_: spread(d, ndim, len(shape)).expand(d.shape[0], *shape)


@rule(aten.slice.Tensor)
def slice_(call: Call):
    dim = call.arg(1, 0) % call.args[0].ndim + 1
    rest = call.args[2:]
    return lambda d, *_: aten.slice.Tensor(d, dim, *rest)


@rule(aten.select.int)
def select(call: Call):
    dim, index = call.args[1] % call.args[0].ndim + 1, call.args[2]
    return lambda d, *_: d.select(dim, index)


@rule(aten.cat.default, aten.stack.default)
def join(call: Call):
    shapes = [t.shape for t in call.args[0]]
    dim = call.arg(1, 0) % call.out.ndim + 1
    combine = torch.cat if call.func is aten.cat.default else torch.stack

    def derivative(parts: list[Tangent], *_: Any) -> Tensor:
        some = next(p for p in parts if p is not None)
        zero = some.new_zeros(())
        whole = [
            zero.expand(some.shape[0], *s) if p is None else p
            for p, s in zip(parts, shapes, strict=True)
        ]
        return combine(whole, dim)

    return derivative


@rule(aten.split.Tensor, aten.split_with_sizes.default)
def split(call: Call):
    sizes, dim = call.args[1], call.arg(2, 0) % call.args[0].ndim + 1
    return lambda d, *_: d.split(sizes, dim)


@rule(aten.unbind.int)
def unbind(call: Call):
    dim = call.arg(1, 0) % call.args[0].ndim + 1
    return lambda d, *_: d.unbind(dim)


# These are linear in the first argument, where the others are fixed. torch's vmap runs them over K.
LINEAR = (
    aten.flip.default,
    aten.roll.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.gather.default,
    aten.repeat.default,
    aten.tril.default,
    aten.triu.default,
    aten.cumsum.default,
    aten.slice_backward.default,
    aten.select_backward.default,
    aten.unfold.default,
    aten.unfold_backward.default,
    aten.diagonal.default,
    aten.native_dropout_backward.default,
    aten.embedding_dense_backward.default,
    aten.upsample_nearest2d.default,
    aten.upsample_nearest2d_backward.default,
    aten.upsample_bilinear2d.default,
    aten.upsample_bilinear2d_backward.default,
)


@rule(*LINEAR, by_first=True)
def linear(call: Call):
    func, rest, kwargs = call.func, call.args[1:], call.kwargs
    if any(call.active[1:]):
        raise UnsupportedOperation(f"{func} with an index that depends on parameters")

    return vmap(lambda v: func(v, *rest, **kwargs))


# Results that do not change with the values of the arguments.
rule(
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
    *(
        getattr(getattr(aten, f), k)
        for f in ("eq", "ne", "lt", "le", "gt", "ge")
        for k in ("Scalar", "Tensor")
    ),
    # Those of `prims` come from decompositions, which may not ask for equality: see `Recorder`.
    *(getattr(prims, f).default for f in ("lt", "le", "gt", "ge")),
)(Call.constant)


@rule(aten.constant_pad_nd.default)
def constant_pad(call: Call):
    """The padding is a constant, whatever its value: a tangent is padded with zeros."""
    pad = call.args[1]
    return lambda d, *_: aten.constant_pad_nd(d, pad, 0)


@rule(aten.embedding.default, by_first=True)
def embedding(call: Call):
    """The tangent's rows are looked up; the row `padding_idx` does not move, as in autograd."""
    index, padding = call.args[1], call.arg(2, -1)
    is_padding = index[..., None] == padding if padding >= 0 else None

    def derivative(d: Tensor) -> Tensor:
        out = d[:, index]
        return out if is_padding is None else out.masked_fill_(is_padding, 0.0)

    return derivative


@rule(aten.native_dropout.default)
def native_dropout(call: Call):
    out, mask = call.out
    call.differentiable_outputs = (0,)
    p = call.args[1]
    scale = 0.0 if p == 1 else 1 / (1 - p)
    factor = mask.to(out.dtype) * (scale if call.arg(2, True) else 1.0)
    return lambda d, *_: (d * factor, None)
