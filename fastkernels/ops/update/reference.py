"""The anchored updates in plain torch: the truth the other backends are held to.

AdamW:

    m  <- beta1 m + (1 - beta1) g                   v  <- beta2 v + (1 - beta2) g^2
    u  <- w (1 - lr weight_decay) - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

SGD with momentum, as torch.optim.SGD:

    g  <- g + weight_decay w
    b  <- g at the first step, else momentum b + (1 - dampening) g
    u  <- w - lr (g + momentum b if nesterov, else b)

and then, for both, the proximal pull to the anchor w0:

    w  <- (u + c w0) / (1 + c),                     c = lr anchor_decay F

`g` is the gradient after `grad_scale` and clipping, negated when maximizing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkernels import codes
from fastkernels.ops.update.call import MAX_PULL, UpdateCall
from fastkernels.ops.update.checks import prepare


def _adamw(
    h: Tensor, step: Tensor, w: Tensor, g: Tensor, m: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    lr, beta1, beta2, eps, weight_decay = h[:5]
    # torch's lerp, which starts from the end that is nearer: small gradients are not lost in a
    # large m.
    m = torch.where(1 - beta1 < 0.5, m + (1 - beta1) * (g - m), g - beta1 * (g - m))
    v = beta2 * v + (1 - beta2) * g.square()
    denominator = v.sqrt() / (1 - beta2**step).sqrt() + eps
    return w * (1 - lr * weight_decay) - lr / (1 - beta1**step) * (m / denominator), m, v


def _sgd(
    h: Tensor, step: Tensor, w: Tensor, g: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    lr, momentum, dampening, nesterov, weight_decay = h[:5]
    g = g + weight_decay * w
    if b is None:
        return w - lr * g, None
    b = torch.where(step == 1, g, momentum * b + (1 - dampening) * g)
    return w - lr * torch.where(nesterov != 0, g + momentum * b, b), b


# (row of hyper, step [], w, g, *moments or None) -> (u, *new moments), flat, compute dtype
RULES: dict[str, Callable[..., tuple[Any, ...]]] = {
    "anchored_adamw_": _adamw,
    "anchored_sgd_": _sgd,
}


def _entry(tensors: Sequence[Any], i: int) -> Any:
    """Entry i of an optional list: None when the list is off or the entry is empty."""
    t = tensors[i] if tensors else None
    return None if t is None or t.numel() == 0 else t


def run(call: UpdateCall) -> None:
    """Step every tensor of `call` in place."""
    call, write_back = prepare(call)
    squares = torch.zeros(4, dtype=torch.float64, device=call.params[0].device)
    scale, skip = _gradient_scale(call, squares)

    def store(target: Tensor, value: Tensor) -> None:
        target.copy_(torch.where(skip, target, value.to(target.dtype)))

    for i, param in enumerate(call.params):
        if param.numel():
            _step(call, i, scale, squares, store)
        store(call.steps[i], call.steps[i] + 1)
    if call.stats is not None:
        squares[:3].sqrt_()
        squares[3] *= 0.5
        store(call.stats, squares)
    write_back()


def _gradient_scale(call: UpdateCall, squares: Tensor) -> tuple[Tensor, Tensor]:
    """What gradients are multiplied by, and whether the step is skipped, both `[]`.

    Args:
        squares: float64 `[4]`, sums for `stats`; that of the unscaled gradients is added.
    """
    device = squares.device
    scale = torch.ones((), dtype=torch.float64, device=device)
    if call.grad_scale is not None:
        scale = scale / call.grad_scale.to(device).double().reshape(())
    for g in call.grads:
        squares[0] += (g.double() * scale).square().sum()
    skip = torch.zeros((), dtype=torch.bool, device=device)
    if call.found_inf is not None:
        skip = call.found_inf.to(device).reshape(()) != 0
    if call.max_grad_norm is not None:
        norm = squares[0].sqrt()
        if call.grad_scale is not None:
            skip = skip | ~norm.isfinite()
        scale = scale * (call.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    return scale, skip


def _step(
    call: UpdateCall,
    i: int,
    scale: Tensor,
    squares: Tensor,
    store: Callable[[Tensor, Tensor], None],
) -> None:
    """Step tensor i and its moments; its parts of `squares` are added."""
    param, columns = call.params[i], call.rule.columns
    dtype = codes.compute_dtype(param)
    h = call.hyper[call.groups[i]].to(param.device)
    step = call.steps[i].double() + 1
    remainder = _entry(call.remainders, i)
    if remainder is not None:
        remainder = codes.flat(remainder)
    w = codes.load_param(codes.flat(param), remainder).to(dtype)
    sign = torch.where(h[columns.index("maximize")] != 0, -scale, scale)
    g = codes.flat(call.grads[i]).to(dtype) * sign.to(dtype)
    moments = [None if _entry(ms, i) is None else codes.flat(ms[i]) for ms in call.moments]
    scales = [_entry(s, i) for s in call.moment_scales]
    old = [
        None if m is None else codes.load(m, s, signed=k == 0).to(dtype)
        for k, (m, s) in enumerate(zip(moments, scales, strict=True))
    ]
    new_w, *new = RULES[call.rule.name](h, step, w, g, *old)
    if _entry(call.anchors, i) is not None:
        new_w = _pulled(call, i, h, new_w, squares)
    squares[2] += (new_w - w).double().square().sum()
    for target, value in codes.store_param(codes.flat(param), remainder, new_w):
        store(target, value)
    for k, (m, s, value) in enumerate(zip(moments, scales, new, strict=True)):
        if m is not None:
            draws = functools.partial(codes.draws, param.numel(), call.seed, step)
            for target, part in codes.store(m, s, value, draws, signed=k == 0):
                store(target, part)


def _pulled(call: UpdateCall, i: int, h: Tensor, u: Tensor, squares: Tensor) -> Tensor:
    """Weights u of tensor i after the pull, flat; `h` is the row of its group in `hyper`."""
    columns, dtype = call.rule.columns, u.dtype
    w0 = codes.flat(_entry(call.anchors, i)).to(dtype)
    c = h[columns.index("lr")] * h[columns.index("anchor_decay")].clamp(max=MAX_PULL)
    c = c.clamp(max=MAX_PULL).to(dtype)
    f = _entry(call.curvature, i)
    if f is not None:
        f = codes.load(codes.flat(f), _entry(call.curvature_scales, i), signed=False)
        c = c * f.to(dtype)
    # From w0 on for a strong pull: u may be so large that w0 is lost in it.
    weak, strong = u + c / (1 + c) * (w0 - u), w0 + (u - w0) / (1 + c)
    w = torch.where(c > 1, strong, weak)
    away = (w - w0).double().square()
    squares[1] += away.sum()
    squares[3] += (away if f is None else away * f.double()).sum()
    return w
