"""Source and target loss over the plane that runs have moved in, and the directions of their
steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fast.analysis.landscape.network import MATRICES, MovableNetwork, subset
from fast.analysis.landscape.path import WeightPath
from fast.analysis.landscape.plane import Plane, grid
from fast.analysis.landscape.result import Landscape, PathGeometry
from fast.curvature import NetworkOperator
from fast.curvature.card import SourceCard
from fast.data.dataset import Data
from fast.progress import bar

# Residual over the largest eigenvalue. On the digits the shares of single steps are then within
# 0.4 % of those at 1e-5; at 1e-2 they were off by up to 27 %, and hardly a product was saved.
EIGEN_TOL = 1e-3
BATCH = 128


def landscape(
    paths: WeightPath | Sequence[WeightPath],
    source: Any,
    target: Any,
    *,
    resolution: int = 21,
    samples: int = 256,
    num_stiff: int = 5,
    matrix: str = "ggn",
    card: SourceCard | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Landscape:
    """Where adaptation went, and what it cost the source task.

    The plane goes through the pretrained weights w0. For one path it is the plane closest to all of
    its steps (their principal components about w0); for two it goes through their ends; for more it
    is the plane closest to their ends. The networks are copied: no weight, buffer or mode changes.

    This costs `resolution^2` evaluations of both samples, about 15 products for each stiff
    direction, and one product for each step.

    Args:
        paths: runs that started from the same weights, kept by `fast.PathRecorder`.
        source: labelled data: `(x, y)`, a Dataset or a DataLoader.
        target: the same, of the target task.
        resolution: grid points along the longer side.
        samples: the most samples of source and of target; losses, curvature and forecasts are all
            means over these.
        num_stiff: k, the number of stiff directions: eigenvectors of the largest eigenvalues of the
            source matrix at w0.
        matrix: "ggn" (Gauss-Newton) or "hessian", for stiff directions and forecast.
        card: makes `card_forecast` (default: estimated on the source samples at w0).
        seed: seed of the samples and of all random vectors.
        progress: show bars; None shows them in a terminal or a notebook.

    Raises:
        ValueError: an option is out of range, paths start from different weights, or the weights
            never moved.
    """
    if isinstance(paths, WeightPath):
        paths = [paths]
    origin = _check(paths, resolution, num_stiff, matrix)
    network = MovableNetwork(paths[0].model, paths[0].parameters, BATCH)
    source_data = subset(source, "source", samples, seed)
    target_data = subset(target, "target", samples, seed)

    spanning = paths[0].weights if len(paths) == 1 else torch.stack([p.weights[-1] for p in paths])
    plane = Plane.through(origin, spanning - origin, seed)
    x, y = grid([plane.coordinates(p.weights - origin) for p in paths], resolution)
    surfaces = _surfaces(network, plane, x, y, source_data, target_data, progress)

    network.move_to(origin)
    before = network.source_loss(source_data)
    card = card.bind(network.model) if card else network.card(source_data, seed)
    with network.curvature(source_data, matrix) as operator:
        stiff = operator.top(
            num_stiff, which="largest", tol=EIGEN_TOL, seed=seed, progress=progress
        )
        gradient = operator.gradient()
        orders = [_second_order(operator, gradient, p.weights - origin) for p in paths]
    geometry = []
    for path, forecast in zip(paths, orders, strict=True):
        losses, by_card = _along(network, path, source_data, card)
        rise = [loss - before for loss in losses]
        geometry.append(_geometry(path, plane, stiff.vectors.cpu(), rise, forecast, by_card))
    return Landscape(
        x=x,
        y=y,
        source_loss=surfaces[0],
        target_loss=surfaces[1],
        head_of=paths[0].name,
        source_loss_before=before,
        matrix=matrix,
        eigenvalues=stiff.values.tolist(),
        residuals=stiff.residuals.tolist(),
        converged=stiff.converged,
        chance=math.sqrt(num_stiff / len(origin)),
        num_parameters=len(origin),
        source_samples=source_data.num_samples or 0,
        target_samples=target_data.num_samples or 0,
        paths=geometry,
    )


def _check(paths: Sequence[WeightPath], resolution: int, num_stiff: int, matrix: str) -> Tensor:
    """Check the arguments; returns the weights `[P]` that all paths start from."""
    if not paths:
        raise ValueError("paths is empty: record one with fast.PathRecorder")
    if matrix not in MATRICES:
        raise ValueError(f"matrix must be one of {', '.join(MATRICES)}; got {matrix!r}")
    if resolution < 3:
        raise ValueError(f"resolution must be at least 3; got {resolution}")
    first = paths[0]
    if not 1 <= num_stiff <= first.weights.shape[1]:
        raise ValueError(
            f"num_stiff must lie between 1 and P = {first.weights.shape[1]}; got {num_stiff}"
        )
    for path in paths:
        if len(path.steps) < 2:
            raise ValueError(f"path {path.name!r} has {len(path.steps)} points; it needs 2 or more")
        if not torch.isfinite(path.weights).all():
            raise ValueError(f"path {path.name!r} has weights that are not finite; lower its lr")
        if path.parameters != first.parameters or not torch.equal(
            path.weights[0], first.weights[0]
        ):
            raise ValueError(
                f"paths {first.name!r} and {path.name!r} start from different weights: adapt the "
                "same pretrained network"
            )
    return first.weights[0]


def _surfaces(
    network: MovableNetwork,
    plane: Plane,
    x: list[float],
    y: list[float],
    source: Data,
    target: Data,
    progress: bool | None,
) -> tuple[list[list[float]], list[list[float]]]:
    """Source and target loss, `[len(y)][len(x)]`."""
    over_source: list[list[float]] = []
    over_target: list[list[float]] = []
    with bar(len(x) * len(y), "landscape", progress, unit="point") as ticks:
        for v in y:
            over_source.append([])
            over_target.append([])
            for u in x:
                network.move_to(plane.at(u, v))
                over_source[-1].append(network.source_loss(source))
                over_target[-1].append(network.target_loss(target))
                ticks.update()
    return over_source, over_target


def _geometry(
    path: WeightPath,
    plane: Plane,
    stiff: Tensor,
    rise: list[float],
    forecast: list[float],
    by_card: list[tuple[float, bool]],
) -> PathGeometry:
    """Where a path lies in the plane, and what its steps cost.

    Args:
        stiff: the stiff directions, `[P, k]`.
        rise, forecast, by_card: for each step, the rise of the source loss as measured, by the
            exact product, and by the card.
    """
    d = path.weights - plane.origin
    x, y = plane.coordinates(d).T.tolist()
    return PathGeometry(
        name=path.name,
        steps=path.steps,
        x=x,
        y=y,
        in_plane=plane.share(d),
        drift=d.double().norm(dim=1).tolist(),
        stiff_share=_shares(d, stiff),
        rise=rise,
        forecast=forecast,
        card_forecast=[nats for nats, _ in by_card],
        card_reaches=[within for _, within in by_card],
        target_loss=[row.get("target_loss") for row in path.history],
        target_accuracy=[row.get("target_accuracy") for row in path.history],
        source_accuracy=[row.get("source_accuracy") for row in path.history],
    )


def _second_order(operator: NetworkOperator, gradient: Tensor, d: Tensor) -> list[float]:
    """`g.d + 1/2 d^T A d` of each row of `d`, `[n, P]`."""
    rows = d.to(operator.device, operator.dtype)
    linear = (rows @ gradient).double()
    return (linear + operator.quad(rows.T) / 2).tolist()


def _along(
    network: MovableNetwork, path: WeightPath, source: Data, card: SourceCard
) -> tuple[list[float], list[tuple[float, bool]]]:
    """Source loss at each of the path's weights, and the rise that the card forecasts there."""
    losses, forecasts = [], []
    # With batch norm per task the source has norms that no path moves, so the source loss belongs
    # to the path's own network. The card is bound to the first path's network.
    own_network = MovableNetwork(path.model, path.parameters, BATCH)
    for weights in path.weights:
        own_network.move_to(weights)
        losses.append(own_network.source_loss(source))
        network.move_to(weights)
        forecasts.append(network.forecast(card))
    return losses, forecasts


def _shares(d: Tensor, stiff: Tensor) -> list[float | None]:
    """Norm of each step's component in the span of `stiff`, `[P, k]`, over the norm of the step."""
    shares: list[float | None] = []
    for step in d.diff(dim=0):
        norm = float(step.double().norm())
        shares.append(float((step @ stiff).double().norm()) / norm if norm else None)
    return shares
