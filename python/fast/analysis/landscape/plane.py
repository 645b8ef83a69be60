"""The plane through the pretrained weights that lies closest to where runs have led."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# The room around the paths is this share of the longer side.
MARGIN = 0.25
# The shorter side is at least this share of the longer: a path is often hardly bent.
MIN_ASPECT = 0.5
# Below this share of the first direction's square, the second is rounding.
RANK_TOL = 1e-10


@dataclass(kw_only=True)
class Plane:
    """`origin + x * basis[0] + y * basis[1]`.

    Attributes:
        origin: `[P]`, the pretrained weights.
        basis: `[2, P]`, orthonormal: coordinates have the unit of `||w - w0||`.
    """

    origin: Tensor
    basis: Tensor

    @classmethod
    def through(cls, origin: Tensor, displacements: Tensor, seed: int = 0) -> Plane:
        """The plane of least squared distance to `origin + displacements`, through `origin`.

        The first axis is turned towards the last displacement, the second so that the displacement
        farthest from the first axis has y > 0. Displacements on one line leave the second direction
        open: it is then drawn at random.

        Args:
            displacements: `[n, P]`.

        Raises:
            ValueError: all of them are zero.
        """
        d = displacements.double() if len(displacements) <= 4 else displacements
        gram = (d @ d.T).double()
        values, vectors = torch.linalg.eigh(gram)
        if not values[-1] > 0:
            raise ValueError("the weights did not move: there is no path to draw; run more steps")
        rows = (vectors[:, -2:].flip(1).T.to(d) @ d).to(displacements)
        if len(d) < 2 or not values[-2] > RANK_TOL * values[-1]:
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(len(origin), generator=generator).to(displacements)
            rows = torch.stack([rows[0], noise])
        basis = torch.linalg.qr(rows.T)[0].T.contiguous()
        return cls(origin=origin, basis=_turned(basis, displacements))

    def coordinates(self, displacements: Tensor) -> Tensor:
        """`[n, P]` -> `[n, 2]`, in float64."""
        return (displacements @ self.basis.T).double()

    def share(self, displacements: Tensor) -> float:
        """Share of the squared displacements that lies in the plane, 0..1."""
        total = float(displacements.double().square().sum())
        return float(self.coordinates(displacements).square().sum()) / total if total else 1.0

    def at(self, x: float, y: float) -> Tensor:
        """The weights `[P]` at this place."""
        return self.origin + x * self.basis[0] + y * self.basis[1]


def _turned(basis: Tensor, displacements: Tensor) -> Tensor:
    """The same plane, its axes turned as `Plane.through` says."""
    xy = displacements @ basis.T
    ahead = xy[-1] if xy[-1].norm() > 0 else xy[xy.norm(dim=1).argmax()]
    ahead = ahead / ahead.norm()
    across = torch.stack([-ahead[1], ahead[0]])
    side = xy @ across
    if side[side.abs().argmax()] < 0:
        across = -across
    return torch.stack([ahead, across]) @ basis


def grid(coordinates: Sequence[Tensor], resolution: int) -> tuple[list[float], list[float]]:
    """Places x and y of a grid of square cells that holds all of `coordinates` with a margin.

    Args:
        coordinates: `[n, 2]` each.
        resolution: points along the longer side.
    """
    points = torch.cat([*coordinates, torch.zeros(1, 2, dtype=torch.float64)])
    low, high = points.min(0).values, points.max(0).values
    longer = float((high - low).max())
    middle = (low + high) / 2
    half = ((high - low) / 2).clamp_min(MIN_ASPECT * longer / 2) + MARGIN * longer
    sides = []
    for m, h in zip(middle.tolist(), half.tolist(), strict=True):
        count = max(3, round(resolution * h / float(half.max())))
        sides.append(torch.linspace(m - h, m + h, count, dtype=torch.float64).tolist())
    return sides[0], sides[1]
