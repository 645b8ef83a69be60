"""Learning-rate factor of a step."""

from __future__ import annotations

import math


def lr_factor(schedule: str, step: int, steps: int, warmup: int) -> float:
    """Factor on the peak learning rate at `step` (0-based) of `steps`.

    Linear warm-up to 1 over `warmup` steps, then constant, or half a cosine down to 0 (Loshchilov
    and Hutter 2017, arXiv 1608.03983).
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
