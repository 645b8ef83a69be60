"""SGD with momentum and a pull towards an anchor, in plain torch.

    g  <- g + weight_decay w                        (coupled, as torch.optim.SGD)
    b  <- g at the first step, else momentum b + (1 - dampening) g
    u  <- w - lr (g + momentum b if nesterov, else b)
    w  <- (u + c w0) / (1 + c),                     c = lr anchor_decay F

`g` is the gradient after `grad_scale` and clipping, negated when maximizing. The last line is
`fastkernels._update_reference`'s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastkernels import _update_reference
from fastkernels._update import Batch


def _sgd(
    h: Tensor, step: Tensor, w: Tensor, g: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    lr, momentum, dampening, nesterov, weight_decay = h[:5]
    g = g + weight_decay * w
    if b is None:
        return w - lr * g, None
    b = torch.where(step == 1, g, momentum * b + (1 - dampening) * g)
    return w - lr * torch.where(nesterov != 0, g + momentum * b, b), b


def anchored_sgd_(batch: Batch) -> None:
    """Update every tensor of `batch` in place."""
    _update_reference.run(batch, _sgd)
