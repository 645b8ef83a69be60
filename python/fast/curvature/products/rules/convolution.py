"""Convolutions: K joins the batch, the input or the output channels, never a group.

vmap would turn K kernels into a grouped convolution, which runs at half the rate of the loop. Here
each term is one plain call: tangents of the input join the batch, tangents of the kernel add output
channels, and in the backward pass tangents of the gradient add output channels and tangents of the
input add input channels. All four lie as [B, K, C, H, W] in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fast.curvature.products.rules.base import Call, Tangent, aten, batch_inner, rule


@rule(aten.convolution.default)
def convolution(call: Call):
    x, w = call.args[:2]
    rest = call.args[3:]
    foldable = call.args[8] == 1 and not call.args[6]
    spatial = [1] * (x.ndim - 2)
    x = call.keep(x) if call.is_active(1) else x
    w = call.keep(w) if call.is_active(0) else w

    def derivative(dx: Tangent, dw: Tangent, db: Tangent, *_: Any) -> Tangent:
        out = None
        if dx is not None:
            inner = batch_inner(dx)
            out = aten.convolution(inner.flatten(0, 1), w, None, *rest)
            out = out.view(*inner.shape[:2], *out.shape[1:])
        if dw is not None:
            moved = _by_kernels(x, dw, rest, foldable)
            out = moved if out is None else out.add_(moved)
        out = None if out is None else out.transpose(0, 1)
        if db is not None:
            bias = db[:, None, :].reshape(db.shape[0], 1, -1, *spatial)
            shape = call_shape if out is None else out.shape[1:]
            out = bias.expand(db.shape[0], *shape) if out is None else out.add_(bias)
        return out

    call_shape = call.out.shape
    return derivative


def _by_kernels(x: Tensor, dw: Tensor, rest: Any, foldable: bool) -> Tensor:
    """x convolved with each of K kernels, [B, K, C_out, ...]."""
    if not foldable:
        return torch.stack([aten.convolution(x, k, None, *rest) for k in dw], dim=1)
    out = aten.convolution(x, dw.reshape(-1, *dw.shape[2:]), None, *rest)
    return out.view(x.shape[0], dw.shape[0], dw.shape[1], *out.shape[2:])


@rule(aten.convolution_backward.default)
def convolution_backward(call: Call):
    g, x, w = call.args[:3]
    bias_sizes = call.args[3]
    options, groups, mask = call.args[4:9], call.args[9], call.args[10]
    foldable = groups == 1 and not call.args[7]
    for tensor in (g, x, w):
        call.keep(tensor)

    def backward(g: Tensor, x: Tensor, w: Tensor, outputs: list[bool]) -> tuple[Any, ...]:
        return aten.convolution_backward(
            g, x, w, bias_sizes if outputs[2] else None, *options, groups, outputs
        )

    def input_gradient(dg: Tangent, dw: Tangent) -> Tangent:
        out = None
        if dg is not None:
            inner = batch_inner(dg)
            num = inner.shape[1]
            # Only the shape of the input is read.
            like = x.new_empty(()).expand(x.shape[0] * num, *x.shape[1:])
            out = backward(inner.flatten(0, 1), like, w, [True, False, False])[0]
            out = out.view(x.shape[0], num, *x.shape[1:])
        if dw is not None:
            num = dw.shape[0]
            if foldable:
                kernels = dw.transpose(0, 1).reshape(w.shape[0], num * w.shape[1], *w.shape[2:])
                like = x.new_empty(()).expand(x.shape[0], num * x.shape[1], *x.shape[2:])
                moved = backward(g, like, kernels, [True, False, False])[0]
                moved = moved.view(x.shape[0], num, *x.shape[1:])
            else:
                parts = [backward(g, x, k, [True, False, False])[0] for k in dw]
                moved = torch.stack(parts, dim=1)
            out = moved if out is None else out.add_(moved)
        return None if out is None else out.transpose(0, 1)

    def weight_gradient(dg: Tangent, dx: Tangent) -> Tangent:
        out = None
        if dg is not None and foldable:
            inner = batch_inner(dg)
            num = inner.shape[1]
            like = w.new_empty(()).expand(num * w.shape[0], *w.shape[1:])
            out = backward(inner.flatten(1, 2), x, like, [False, True, False])[1]
            out = out.view(num, *w.shape)
        elif dg is not None:
            out = torch.stack([backward(v, x, w, [False, True, False])[1] for v in dg])
        if dx is not None and foldable:
            inner = batch_inner(dx)
            num = inner.shape[1]
            like = w.new_empty(()).expand(w.shape[0], num * w.shape[1], *w.shape[2:])
            moved = backward(g, inner.flatten(1, 2), like, [False, True, False])[1]
            moved = moved.view(w.shape[0], num, *w.shape[1:]).transpose(0, 1)
            out = moved if out is None else out.add_(moved)
        elif dx is not None:
            moved = torch.stack([backward(g, v, w, [False, True, False])[1] for v in dx])
            out = moved if out is None else out.add_(moved)
        return out

    def derivative(dg: Tangent, dx: Tangent, dw: Tangent, *_: Any) -> tuple[Tangent, ...]:
        by_bias = None
        if mask[2] and dg is not None:
            by_bias = dg.sum([1, *range(3, dg.ndim)])
        return (
            input_gradient(dg, dw) if mask[0] else None,
            weight_gradient(dg, dx) if mask[1] else None,
            by_bias,
        )

    call.differentiable_outputs = tuple(
        i
        for i, depends in enumerate(
            (
                call.is_active(0) or call.is_active(2),
                call.is_active(0) or call.is_active(1),
                call.is_active(0),
            )
        )
        if depends and mask[i]
    )
    return derivative
