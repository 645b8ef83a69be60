"""The Hessian of cross-entropy in the logits, in plain torch.

With p the softmax of row n and a its share of the loss, for every vector u:

    (H u)_n = a (p * u - p <p, u>)          <u, H u> = sum over n of a (<p, u^2> - <p, u>^2)

Labels do not appear: they move the gradient, p - y, only.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _wide(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def cross_entropy_hvp_(u: Tensor, p: Tensor, scale: Tensor) -> None:
    w, v = _wide(p), _wide(u)
    deviation = v - torch.linalg.vecdot(v, w[None])[..., None]
    u.copy_(deviation.mul_(w * _wide(scale)[:, None]))


def cross_entropy_quad(u: Tensor, p: Tensor, scale: Tensor) -> Tensor:
    w, v = _wide(p), _wide(u)
    deviation = v - torch.linalg.vecdot(v, w[None])[..., None]
    rows = torch.linalg.vecdot(deviation * w, deviation)
    total: Tensor = (rows.double() * scale.double()).sum(1)
    return total
