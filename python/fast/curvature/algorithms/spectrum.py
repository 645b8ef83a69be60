"""Spectral density by stochastic Lanczos quadrature."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fast.curvature.algorithms.arguments import check_whole
from fast.curvature.algorithms.probes import require_finite, sign_block
from fast.curvature.algorithms.protocol import Symmetric
from fast.progress import bar

# Bytes of Lanczos vectors that are held for several probes at once.
BASIS_BYTES = 512 * 2**20


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Quadrature of the spectral density of a [P, P] matrix A: the density is about
    (1 / probes) sum_ij weights_ij delta(x - nodes_ij).

    Each probe's weights add up to one, so `P * (weights * f(nodes)).sum(1).mean()` estimates the
    trace of f(A).

    Attributes:
        nodes, weights: [probes, steps].
        size: P.
    """

    nodes: Tensor = field(repr=False)
    weights: Tensor = field(repr=False)
    size: int

    def expectation(self, function: Any) -> tuple[float, float]:
        """tr f(A) and its standard error over the probes; `function` maps a tensor to a tensor."""
        values = self.size * (self.weights * function(self.nodes)).sum(1)
        spread = float(values.std()) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        return float(values.mean()), spread

    def density(
        self, grid: Tensor | None = None, sigma: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """(grid [G], density [G]): a Gaussian of width `sigma` (1 % of the range) at every node."""
        low, high = float(self.nodes.min()), float(self.nodes.max())
        reach = max(high - low, 1e-12)
        sigma = sigma or 0.01 * reach
        if grid is None:
            grid = torch.linspace(
                low - 0.05 * reach, high + 0.05 * reach, 1000, dtype=torch.float64
            )
        z = (grid[:, None] - self.nodes.reshape(1, -1)) / sigma
        bumps = torch.exp(-0.5 * z * z) / (sigma * (2 * torch.pi) ** 0.5)
        return grid, bumps @ self.weights.reshape(-1) / self.nodes.shape[0]

    def plot(self, path: str | Path | None = None, *, ax: Any = None, label: str = "") -> Any:
        """Draw the density on a logarithmic axis (matplotlib); save a PNG when `path` is given."""
        if ax is None:
            # pyplot would open a display and may change the caller's backend.
            from matplotlib.figure import Figure

            ax = Figure(figsize=(7, 4), layout="constrained").subplots()
        grid, density = self.density()
        ax.semilogy(grid, density, label=label or None)
        ax.set_ylim(bottom=max(1e-8, 0.1 / self.size) / max(float(grid[-1] - grid[0]), 1e-12))
        ax.set(xlabel="eigenvalue", ylabel="density")
        if label:
            ax.legend(loc="upper right")
        if path is not None:
            ax.figure.savefig(path, dpi=150, format="png")
        return ax


def spectrum(
    operator: Symmetric,
    num_probes: int = 8,
    num_lanczos_steps: int = 64,
    *,
    seed: int = 0,
    progress: bool | None = None,
) -> Spectrum:
    """Spectral density (Lin, Saad and Yang 2016; Ghorbani, Krishnan and Xiao 2019).

    It costs num_probes * num_lanczos_steps products, several probes at a time. Full
    reorthogonalisation holds num_lanczos_steps vectors of P numbers per probe.
    """
    space = operator.space
    size = space.numel
    check_whole(seed=seed)
    check_whole(num_probes=num_probes, num_lanczos_steps=num_lanczos_steps, least=1)
    steps = min(num_lanczos_steps, size)
    together = max(1, min(num_probes, BASIS_BYTES // (steps * size * space.dtype.itemsize)))
    generator = torch.Generator().manual_seed(seed)
    nodes, weights = [], []
    with bar(num_probes * steps, "spectrum", progress, unit="product") as ticks:
        for start in range(0, num_probes, together):
            count = min(together, num_probes - start)
            probes = sign_block(space, count, generator)
            for tridiagonal in tridiagonals(operator, probes, steps, ticks):
                theta, s = torch.linalg.eigh(tridiagonal)
                nodes.append(theta)
                weights.append(s[0] ** 2)
    width = max(len(n) for n in nodes)
    return Spectrum(
        nodes=_pad(nodes, width, weights=False),
        weights=_pad(weights, width, weights=True),
        size=size,
    )


def tridiagonals(operator: Symmetric, probes: Tensor, steps: int, ticks: Any) -> list[Tensor]:
    """One Lanczos run per probe [K, P], all in step: their tridiagonal matrices, in float64.

    A run that meets an invariant subspace ends there; its matrix is smaller.
    """
    count, size = probes.shape
    basis = probes.new_zeros((steps, count, size))
    basis[0] = probes / probes.norm(dim=1, keepdim=True)
    alpha = torch.zeros((count, steps), dtype=torch.float64)
    beta = torch.zeros((count, steps), dtype=torch.float64)
    for j in range(steps):
        w = require_finite(operator.rows(basis[j]))
        ticks.update(count)
        alpha[:, j] = torch.linalg.vecdot(w, basis[j]).double().cpu()
        for _ in range(2):
            c = torch.einsum("jkp,kp->jk", basis[: j + 1], w)
            w = w - torch.einsum("jk,jkp->kp", c, basis[: j + 1])
        norm = w.norm(dim=1)
        if j + 1 < steps:
            beta[:, j] = norm.double().cpu()
            alive = (norm > 0)[:, None]
            basis[j + 1] = torch.where(alive, w / norm.clamp_min(1e-30)[:, None], 0)
    out = []
    tolerance = 10 * torch.finfo(operator.space.dtype).eps
    for a, b in zip(alpha, beta, strict=True):
        small = (b[:-1] <= tolerance * (a.abs().max() + b.abs().max())).nonzero()
        end = int(small[0]) + 1 if len(small) else steps
        off = b[: end - 1]
        out.append(torch.diag(a[:end]) + torch.diag(off, 1) + torch.diag(off, -1))
    return out


def _pad(rows: list[Tensor], width: int, *, weights: bool) -> Tensor:
    """[len(rows), width]: a shorter run repeats its last node with weight zero."""
    out = torch.zeros((len(rows), width), dtype=torch.float64)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row
        target[len(row) :] = 0.0 if weights else row[-1]
    return out
