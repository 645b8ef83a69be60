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
    spatial, shape = [1] * (x.ndim - 2), call.out.shape
    x = call.keep(x) if call.is_active(1) else x
    w = call.keep(w) if call.is_active(0) else w

    def derivative(dx: Tangent, dw: Tangent, db: Tangent, *_: Any) -> Tangent:
        out = None
        if dx is not None:
            inner = batch_inner(dx)
            out = aten.convolution(inner.flatten(0, 1), w, None, *rest)
            out = out.view(*inner.shape[:2], *out.shape[1:])
        if dw is not None:
            term = _by_kernels(x, dw, rest, foldable)
            out = term if out is None else out.add_(term)
        out = None if out is None else out.transpose(0, 1)
        if db is not None:
            bias = db[:, None, :].reshape(db.shape[0], 1, -1, *spatial)
            out = bias.expand(db.shape[0], *shape) if out is None else out.add_(bias)
        return out

    return derivative


def _by_kernels(x: Tensor, dw: Tensor, rest: Any, foldable: bool) -> Tensor:
    """The convolutions of x with each of K kernels, [B, K, C_out, ...]."""
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
    mirror = kernels.transpose(0, 1).flip(*range(2, kernels.ndim))
    return aten.convolution(g, mirror, None, stride, around, dilation, False, [0] * len(around), 1)


class _Backward:
    """The fixed tensors of one backward convolution: gradient g, input x and kernel w.

    The gradient in the input is bilinear in g and w, that in the kernel in g and x, so that each
    tangent is the sum of two terms.
    """

    def __init__(self, call: Call):
        self.g, self.x, self.w = (call.keep(t) for t in call.args[:3])
        # Stride, padding, dilation, transposed, output padding.
        self.options, self.groups = call.args[4:9], call.args[9]
        self.foldable = self.groups == 1 and not self.options[3]

    def call(self, g: Tensor, x: Tensor, w: Tensor, which: int) -> Tensor:
        """One gradient of torch's: that in the input (0) or in the kernel (1)."""
        mask = [which == 0, which == 1, False]
        out = aten.convolution_backward(g, x, w, None, *self.options, self.groups, mask)
        gradient: Tensor = out[which]
        return gradient

    def in_input(self, g: Tensor, w: Tensor) -> Tensor:
        """The gradient in the input, for g of any batch and a kernel of any input channels."""
        out = _flipped(g, w, self.options) if self.groups == 1 else None
        if out is None:
            # Only the shape of the input is read.
            channels = w.shape[0] if self.options[3] else w.shape[1] * self.groups
            like = self.x.new_empty(()).expand(len(g), channels, *self.x.shape[2:])
            out = self.call(g, like, w, 0)
        return out

    def input_tangent(self, dg: Tangent, dw: Tangent) -> Tangent:
        """The tangent of the gradient in the input."""
        x, w, out = self.x, self.w, None
        if dg is not None:
            inner = batch_inner(dg)
            out = self.in_input(inner.flatten(0, 1), w).view(x.shape[0], -1, *x.shape[1:])
        if dw is not None:
            term = self._input_tangent_by_kernels(dw)
            out = term if out is None else out.add_(term)
        return None if out is None else out.transpose(0, 1)

    def _input_tangent_by_kernels(self, dw: Tensor) -> Tensor:
        """[B, K, C_in, ...]: K joins the input channels of the kernel."""
        if not self.foldable:
            return torch.stack([self.in_input(self.g, k) for k in dw], dim=1)
        num, w, x = dw.shape[0], self.w, self.x
        kernels = dw.transpose(0, 1).reshape(w.shape[0], num * w.shape[1], *w.shape[2:])
        return self.in_input(self.g, kernels).view(x.shape[0], num, *x.shape[1:])

    def kernel_tangent(self, dg: Tangent, dx: Tangent) -> Tangent:
        """The tangent of the gradient in the kernel."""
        out = None if dg is None else self._kernel_tangent_by_gradients(dg)
        if dx is not None:
            term = self._kernel_tangent_by_inputs(dx)
            out = term if out is None else out.add_(term)
        return out

    def _kernel_tangent_by_gradients(self, dg: Tensor) -> Tensor:
        """[K, *w]: K joins the channels of the gradient."""
        if not self.foldable:
            return torch.stack([self.call(v, self.x, self.w, 1) for v in dg])
        inner, w = batch_inner(dg), self.w
        num = inner.shape[1]
        like = w.new_empty(()).expand(num * w.shape[0], *w.shape[1:])
        return self.call(inner.flatten(1, 2), self.x, like, 1).view(num, *w.shape)

    def _kernel_tangent_by_inputs(self, dx: Tensor) -> Tensor:
        """[K, *w]: K joins the channels of the input."""
        if not self.foldable:
            return torch.stack([self.call(self.g, v, self.w, 1) for v in dx])
        inner, w = batch_inner(dx), self.w
        num = inner.shape[1]
        like = w.new_empty(()).expand(w.shape[0], num * w.shape[1], *w.shape[2:])
        out = self.call(self.g, inner.flatten(1, 2), like, 1)
        return out.view(w.shape[0], num, *w.shape[1:]).transpose(0, 1)


@rule(aten.convolution_backward.default)
def convolution_backward(call: Call):
    tangents, mask = _Backward(call), call.args[10]

    def derivative(dg: Tangent, dx: Tangent, dw: Tangent, *_: Any) -> tuple[Tangent, ...]:
        by_bias = None
        if mask[2] and dg is not None:
            by_bias = dg.sum([1, *range(3, dg.ndim)])
        return (
            tangents.input_tangent(dg, dw) if mask[0] else None,
            tangents.kernel_tangent(dg, dx) if mask[1] else None,
            by_bias,
        )

    g, x, w = (call.is_active(i) for i in range(3))
    depends = g or w, g or x, g  # the gradients in the input, the kernel and the bias
    call.differentiable_outputs = tuple(i for i in range(3) if depends[i] and mask[i])
    return derivative
