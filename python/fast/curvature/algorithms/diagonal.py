"""The diagonal of any symmetric operator."""

from __future__ import annotations

import torch
from torch import Tensor

from fast.curvature.algorithms.arguments import check_whole
from fast.curvature.algorithms.probes import draw_probes
from fast.curvature.algorithms.protocol import Symmetric


def hutchinson_diagonal(
    operator: Symmetric, num_matvecs: int = 32, *, seed: int = 0, chunk: int = 8
) -> Tensor:
    """Mean of v * (A v) over vectors v of random signs, [P] (Bekas, Kokiopoulou and Saad 2007).

    The estimate is unbiased; the variance of entry i is the sum of the squared off-diagonal entries
    of row i, divided by `num_matvecs`.
    """
    check_whole(seed=seed)
    check_whole(num_matvecs=num_matvecs, least=1)
    space = operator.space
    total = torch.zeros(space.numel, dtype=space.dtype, device=space.device)
    for v in draw_probes(space, num_matvecs, seed=seed, chunk=chunk):
        total += (v * operator.rows(v)).sum(0)
    return total / num_matvecs
