"""Random vectors for stochastic estimates: seeded, the same on every device and for every chunk."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fast.curvature.network.parameter_space import ParameterSpace


def require_finite(products: Tensor) -> Tensor:
    """Return `products`, or raise ValueError: factorisations fail with messages of their own."""
    if not bool(products.isfinite().all()):
        raise ValueError(
            "a product of the operator is not finite: there is nan or infinity in its parameters, "
            "data or derivatives (as of sqrt at zero), or the products overflow its dtype"
        )
    return products


def draw_probes(
    space: ParameterSpace, count: int, *, seed: int, chunk: int = 8
) -> Iterator[Tensor]:
    """`count` vectors of random signs, [chunk, P] at a time (the last block may be smaller)."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, count, chunk):
        yield sign_block(space, min(chunk, count - start), generator)


def sign_block(space: ParameterSpace, count: int, generator: torch.Generator) -> Tensor:
    """[count, P] of random signs."""
    # The CPU draws one row at a time: the n-th probe is the same for every device and chunk.
    rows = [
        torch.randint(0, 2, (space.numel,), generator=generator, dtype=torch.int8)
        for _ in range(count)
    ]
    return torch.stack([r.to(space.device, space.dtype).mul_(2).sub_(1) for r in rows])


def normal_block(space: ParameterSpace, count: int, generator: torch.Generator) -> Tensor:
    """[count, P] of standard normals."""
    rows = [
        torch.randn(space.numel, generator=generator, dtype=torch.float32) for _ in range(count)
    ]
    return torch.stack([r.to(space.device, space.dtype) for r in rows])
