"""Check that inputs are finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fast.data.trees import leaves
from fast.errors import counted

# Samples that are checked together, so that the intermediate results take little memory.
CHUNK = 4096


def broken_rows(inputs: Any) -> Tensor | None:
    """Which samples hold a number that is not finite, bool `[N]`; None where all are integers."""
    rows: Tensor | None = None
    for x in leaves(inputs):
        if x.is_floating_point() and x.dim():
            broken = torch.cat([_broken(part) for part in x.unsqueeze(-1).split(CHUNK)])
            rows = broken if rows is None else rows | broken
    return rows


def _broken(samples: Tensor) -> Tensor:
    # A finite sum has finite terms, and takes a tenth of the time of looking at each of them.
    if samples.sum().isfinite():
        return torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    return ~samples.isfinite().flatten(1).all(1)


def check_finite_inputs(inputs: Any, name: str, numbers: Tensor | None = None) -> None:
    """Raise ValueError where a sample holds a number that is not finite.

    Args:
        numbers: the numbers `[B]` that these samples have in the data (default: 0, 1, ...).
    """
    rows = broken_rows(inputs)
    if rows is not None and rows.any():
        first = rows.nonzero()[0]
        raise ValueError(
            f"{name}: {counted(int(rows.sum()), 'sample is', 'samples are')} not finite (NaN or "
            "infinite), the first is number "
            f"{int(first if numbers is None else numbers[first.cpu()])}; drop them"
        )
