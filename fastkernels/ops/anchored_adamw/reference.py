"""AdamW with a pull towards an anchor, in plain torch: the truth the other backends are held to.

    m  <- beta1 m + (1 - beta1) g                   v  <- beta2 v + (1 - beta2) g^2
    u  <- w (1 - lr weight_decay) - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
    w  <- (u + c w0) / (1 + c),                     c = lr anchor_decay F

`g` is the gradient after `grad_scale` and clipping, negated when maximizing. `m` is torch's lerp,
which starts from `g` where `beta1 <= 1/2`: small gradients are not lost in a large `m`. The last
line is `fastkernels._update_reference`'s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastkernels import _update_reference
from fastkernels._update import Batch


def _adamw(
    h: Tensor, step: Tensor, w: Tensor, g: Tensor, m: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    lr, beta1, beta2, eps, weight_decay = h[:5]
    m = torch.where(1 - beta1 < 0.5, m + (1 - beta1) * (g - m), g - beta1 * (g - m))
    v = beta2 * v + (1 - beta2) * g.square()
    denominator = v.sqrt() / (1 - beta2**step).sqrt() + eps
    return w * (1 - lr * weight_decay) - lr / (1 - beta1**step) * (m / denominator), m, v


def anchored_adamw_(batch: Batch) -> None:
    """Update every tensor of `batch` in place."""
    _update_reference.run(batch, _adamw)
