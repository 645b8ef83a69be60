"""AdamW with a pull towards an anchor, in plain torch: the truth the other backends are held to.

    m  <- m + (1 - beta1) (g - m)                   v  <- beta2 v + (1 - beta2) g^2
    u  <- w (1 - lr weight_decay) - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
    w  <- (u + c w0) / (1 + c),                     c = lr anchor_decay F

`g` is the gradient after `grad_scale` and clipping, negated when maximizing. The last line is
`fastkernels._update`'s.
"""

from __future__ import annotations

from torch import Tensor

from fastkernels import _update

HYPER = ("lr", "beta1", "beta2", "eps", "weight_decay", "anchor_decay", "maximize")


def _adamw(
    h: Tensor, step: Tensor, w: Tensor, g: Tensor, m: Tensor, v: Tensor
) -> tuple[Tensor, ...]:
    lr, beta1, beta2, eps, weight_decay = h[:5]
    m = m + (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * g.square()
    correction1 = 1 - beta1**step
    correction2 = (1 - beta2**step).sqrt()
    denominator = v.sqrt() / correction2 + eps
    return w * (1 - lr * weight_decay) - lr / correction1 * m / denominator, m, v


def anchored_adamw_(batch: _update.Batch) -> None:
    """Update every tensor of `batch` in place."""
    _update.run_reference(batch, _adamw, HYPER.index("anchor_decay"), HYPER.index("maximize"))
