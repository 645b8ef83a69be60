"""The result of `fast.landscape`, as plain data."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(kw_only=True, repr=False)
class PathGeometry:
    """One run in the landscape; lists have one entry for each kept step, unless said otherwise.

    Attributes:
        name, steps: those of the path.
        x, y: coordinates in the plane, in units of `||w - w0||`.
        in_plane: share of the squared displacements that lies in the plane, 0..1.
        drift: `||w - w0||`.
        stiff_share: one entry less: norm of the component of each step in the stiff directions of
            the source loss, over the norm of the step, 0..1; None where nothing moved. A step here
            is the displacement between two evaluations.
        rise: measured rise of the source loss since w0, nats.
        forecast: the same by the exact product, `g.d + 1/2 d^T G d`.
        card_forecast: the same by the diagonal of a source card, which is calibrated on steps like
            Adam's first ones. They cost more than those of a run that turns or is held to its
            source.
        card_reaches: whether the card was calibrated on steps that long; beyond, its forecast is
            extrapolated, and neither shown nor counted.
        target_loss, target_accuracy, source_accuracy: as the run measured them (None: it did not),
            with its own head and all its validation data.
    """

    name: str
    steps: list[int]
    x: list[float]
    y: list[float]
    in_plane: float
    drift: list[float]
    stiff_share: list[float | None]
    rise: list[float]
    forecast: list[float]
    card_forecast: list[float]
    card_reaches: list[bool]
    target_loss: list[float | None]
    target_accuracy: list[float | None]
    source_accuracy: list[float | None]

    def __repr__(self) -> str:
        return f"PathGeometry({self.name!r}, {len(self.steps)} steps, drift {self.drift[-1]:.3g})"

    @property
    def card_shown(self) -> list[float | None]:
        """`card_forecast`, None where the card does not reach."""
        pairs = zip(self.card_forecast, self.card_reaches, strict=True)
        return [nats if within else None for nats, within in pairs]

    @property
    def mean_stiff_share(self) -> float | None:
        """Root of the mean square over the steps; None where nothing moved."""
        shares = [s for s in self.stiff_share if s is not None]
        return math.sqrt(sum(s * s for s in shares) / len(shares)) if shares else None


@dataclass(kw_only=True, repr=False)
class Landscape:
    """Losses over a plane of weights and the paths of runs: numbers, lists and strings only.

    Attributes:
        x, y: coordinates of the grid, in units of `||w - w0||`; the origin is w0.
        source_loss, target_loss: `[len(y)][len(x)]`, nats.
        head_of: name of the run whose target head answers all over the plane.
        source_loss_before: source loss at w0, nats.
        matrix: "ggn" or "hessian", of the source loss at w0.
        eigenvalues, residuals: those of the stiff directions, `[k]`.
        converged: whether each residual is below a thousandth of the largest eigenvalue.
        chance: the stiff share that a step in a random direction would have, `sqrt(k / P)`.
        num_parameters: P.
        source_samples, target_samples: number of samples that the losses are means over.
        paths: the runs.
    """

    x: list[float]
    y: list[float]
    source_loss: list[list[float]]
    target_loss: list[list[float]]
    head_of: str
    source_loss_before: float
    matrix: str
    eigenvalues: list[float]
    residuals: list[float]
    converged: bool
    chance: float
    num_parameters: int
    source_samples: int
    target_samples: int
    paths: list[PathGeometry] = field(default_factory=list)

    def __repr__(self) -> str:
        names = ", ".join(p.name for p in self.paths)
        return f"Landscape({len(self.x)} x {len(self.y)} points, paths {names})"

    def correlation(self, kind: str = "forecast") -> float | None:
        """Pearson's correlation of forecast and measured rise over all steps; None where it is not
        defined.

        Args:
            kind: "forecast", or "card_forecast" (as far as the card reaches).
        """
        pairs = [
            (forecast, rise)
            for p in self.paths
            for forecast, rise in zip(
                p.card_shown if kind == "card_forecast" else p.forecast, p.rise, strict=True
            )
            if forecast is not None
        ]
        table = torch.tensor(pairs, dtype=torch.float64).view(-1, 2).T
        if table.shape[1] < 3 or not (table.std(1) > 0).all():
            return None
        return float(torch.corrcoef(table)[0, 1])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)
