"""Random vectors for stochastic estimates: seeded, the same on every device and for every chunk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fast.curvature.operators.base import SymmetricOperator


def require_finite(products: Tensor) -> Tensor:
    """The same; what follows (factorisations, mostly) would fail with messages of its own."""
    if not bool(products.isfinite().all()):
        raise ValueError(
            "a product of the operator is not finite: there is nan or infinity in its parameters, "
            "data or derivatives (as of sqrt at zero), or the products overflow its dtype"
        )
    return products


def draw_probes(
    operator: SymmetricOperator,
    count: int,
    *,
    seed: int,
    chunk: int = 8,
    distribution: str = "rademacher",
) -> Iterator[Tensor]:
    """`count` vectors of `operator`'s space, [chunk, P] at a time (the last may be smaller)."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, count, chunk):
        yield probe_block(
            operator, min(chunk, count - start), generator=generator, distribution=distribution
        )


def probe_block(
    operator: SymmetricOperator,
    count: int,
    *,
    generator: torch.Generator,
    distribution: str = "rademacher",
) -> Tensor:
    """[count, P] of signs or standard normals, drawn on the CPU so that every device agrees."""
    size = operator.shape[0]
    # One row at a time: the n-th probe is the same whatever the chunk.
    rows = []
    for _ in range(count):
        if distribution == "rademacher":
            row = torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8)
            rows.append(row.to(operator.device, operator.dtype).mul_(2).sub_(1))
        elif distribution == "normal":
            row = torch.randn(size, generator=generator, dtype=torch.float32)
            rows.append(row.to(operator.device, operator.dtype))
        else:
            raise ValueError(f"distribution must be 'rademacher' or 'normal'; got {distribution!r}")
    return torch.stack(rows)
