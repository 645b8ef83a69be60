"""Extreme eigenpairs by block Lanczos with full reorthogonalisation and thick restarts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fast.curvature.operator import SymmetricOperator
from fast.curvature.probes import probe_block
from fast.curvature.progress import bar

WHICH = ("magnitude", "largest", "smallest")


@dataclass(frozen=True)
class Eigenpairs:
    """values [k] (float64, in the order of `which`), vectors [P, k] with unit columns,
    residuals [k] = |A x - value x|, which bounds the distance to an eigenvalue."""

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    num_matvecs: int
    converged: bool

    def __repr__(self) -> str:
        pairs = zip(self.values.tolist(), self.residuals.tolist(), strict=True)
        rows = ", ".join(f"{v:.6g} (residual {r:.1e})" for v, r in pairs)
        end = "" if self.converged else ", not converged"
        return f"Eigenpairs({rows}; {self.num_matvecs} products{end})"


def top(
    operator: SymmetricOperator,
    k: int = 1,
    *,
    which: str = "magnitude",
    tol: float = 1e-4,
    max_matvecs: int | None = None,
    block_size: int = 1,
    subspace: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Eigenpairs:
    """The k extreme eigenpairs (thick-restart Lanczos: Wu and Simon 2000).

    Args:
        which: of largest "magnitude", or the algebraically "largest" or "smallest".
        tol: a pair has converged when its residual is below tol times the largest |eigenvalue|
            found; the eigenvalue is then more accurate than that (about tol^2 over the gap).
        max_matvecs: products after which the best pairs so far are returned with
            `converged=False`; default 40 k + 200.
        block_size: vectors per product. More find clustered eigenvalues and make better use of
            batched products, at more products in all.
        subspace: basis vectors kept, each of P numbers; default max(2 k + 20, 4 block_size).
    """
    size = operator.shape[0]
    if not 1 <= k <= size:
        raise ValueError(f"k must lie between 1 and P = {size}; got {k}")
    if which not in WHICH:
        raise ValueError(f"which must be one of {WHICH}; got {which!r}")
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1; got {block_size}")
    block_size = min(block_size, size)
    limit = min(subspace or max(2 * k + 20, 4 * block_size), size)
    if limit < min(k + block_size, size):
        raise ValueError(f"subspace must be at least k + block_size; got {subspace}")
    max_matvecs = max_matvecs or 40 * k + 200

    generator = torch.Generator().manual_seed(seed)
    basis = torch.empty((limit + block_size, size), dtype=operator.dtype, device=operator.device)
    start = probe_block(operator, block_size, generator=generator, distribution="normal")
    basis[:block_size] = _orthonormal_rows(start)[0]
    projected = torch.zeros((limit + block_size,) * 2, dtype=torch.float64)
    used, known, matvecs = block_size, 0, 0

    with bar(max_matvecs, f"top {k}", progress) as ticks:
        while True:
            block = basis[known:used]
            w = operator.rows(block)
            matvecs += block.shape[0]
            ticks.update(block.shape[0])
            w, coefficients = _orthogonalise(w, basis[:used])
            projected[:used, known:used] = coefficients
            projected[known:used, :used] = coefficients.T
            known = used
            following, coupling = _orthonormal_rows(w)

            theta, s = torch.linalg.eigh(projected[:used, :used])
            order = _order(theta, which)
            theta, s = theta[order], s[:, order]
            # Only the last block couples to the vectors outside the basis.
            residuals = (coupling @ s[used - block.shape[0] : used]).norm(dim=0)
            scale = theta.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
            full = used >= size
            enough = used >= k
            done = enough and bool((residuals[:k] <= tol * scale).all())
            if (done or full or matvecs >= max_matvecs) and enough:
                vectors = s[:, :k].T.to(basis) @ basis[:used]
                return Eigenpairs(
                    theta[:k], vectors.T, residuals[:k], matvecs, converged=done or full
                )
            if used + block.shape[0] > limit:
                keep = min(k + max(4, k // 2), limit - block.shape[0])
                basis[:keep] = s[:, :keep].T.to(basis) @ basis[:used]
                projected.zero_()
                projected[:keep, :keep] = torch.diag(theta[:keep])
                used = known = keep
            room = min(following.shape[0], size - used)
            basis[used : used + room] = following[:room]
            used += room


def _order(theta: Tensor, which: str) -> Tensor:
    key = {"magnitude": -theta.abs(), "largest": -theta, "smallest": theta}[which]
    return key.argsort()


def _orthogonalise(w: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """w [b, P] minus its part in the rows of `basis`, and that part's coefficients, float64.

    Twice is enough (Kahan and Parlett): one pass leaves an error that grows with every step.
    """
    coefficients = torch.zeros((basis.shape[0], w.shape[0]), dtype=torch.float64)
    for _ in range(2):
        c = basis @ w.T
        w = w - c.T @ basis
        coefficients += c.double().cpu()
    return w, coefficients


def _orthonormal_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    """Q [b, P] with orthonormal rows and R [b, b] with w = R^T Q; R in float64.

    Rows that vanish (an invariant subspace was found) come out as directions of their own, and
    their entries of R as zero.
    """
    q, r = torch.linalg.qr(w.T)
    return q.T, r.double().cpu()
