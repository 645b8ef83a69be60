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


# Below this many output channels, oneDNN takes up to five times as long for the gradient in the
# input as for the convolution that gives the same (4 channels, 32 x 32: 1.97 and 0.42 ms; 8: 0.31
# and 0.21; with 16 and more they are equal, but for layers of 1 x 1).
FEW_CHANNELS = 9


def _flipped(g: Tensor, kernels: Tensor, options: Any) -> Tensor | None:
    """The gradient in the input by a convolution with flipped kernels, where that is quicker."""
    (stride, padding, dilation), transposed = options[:3], options[3]
    few = g.shape[1] < FEW_CHANNELS and g.device.type == "cpu"
    if not few or transposed or any(s != 1 for s in stride):
        return None
    sizes = zip(kernels.shape[2:], padding, dilation, strict=True)
    around = [d * (k - 1) - p for k, p, d in sizes]
    if min(around) < 0:
        return None
    flipped = kernels.transpose(0, 1).flip(*range(2, kernels.ndim))
    return aten.convolution(g, flipped, None, stride, around, dilation, False, [0] * len(around), 1)


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

    def pulled_back(g: Tensor, w: Tensor) -> Tensor:
        """The gradient in the input."""
        out = _flipped(g, w, options) if groups == 1 else None
        if out is None:
            # Only the shape of the input is read.
            channels = w.shape[0] if options[3] else w.shape[1] * groups
            like = x.new_empty(()).expand(len(g), channels, *x.shape[2:])
            out = backward(g, like, w, [True, False, False])[0]
        return out

    def input_gradient(dg: Tangent, dw: Tangent) -> Tangent:
        out = None
        if dg is not None:
            inner = batch_inner(dg)
            out = pulled_back(inner.flatten(0, 1), w).view(x.shape[0], -1, *x.shape[1:])
        if dw is not None:
            num = dw.shape[0]
            if foldable:
                kernels = dw.transpose(0, 1).reshape(w.shape[0], num * w.shape[1], *w.shape[2:])
                moved = pulled_back(g, kernels).view(x.shape[0], num, *x.shape[1:])
            else:
                moved = torch.stack([pulled_back(g, k) for k in dw], dim=1)
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
