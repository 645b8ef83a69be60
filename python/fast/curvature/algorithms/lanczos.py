"""Extreme eigenpairs by block Lanczos with full reorthogonalisation and thick restarts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fast.curvature.algorithms.arguments import check_finite, check_whole
from fast.curvature.algorithms.probes import normal_block, require_finite
from fast.curvature.algorithms.protocol import Symmetric
from fast.progress import bar

WHICH = ("magnitude", "largest", "smallest")


@dataclass(frozen=True, kw_only=True)
class Eigenpairs:
    """The k extreme eigenpairs of a symmetric matrix A.

    Attributes:
        values: [k], float64, in the order of `which`.
        vectors: [P, k], unit columns.
        residuals: [k] = |A x - value x|, which bounds the distance to an eigenvalue; at least what
            the rounding of products may hide, 10 eps times the largest |eigenvalue| seen.
        num_matvecs: products that they cost.
        converged: whether every residual is within the tolerance, up to that rounding.
    """

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
    operator: Symmetric,
    k: int = 1,
    *,
    which: str = "magnitude",
    tol: float = 1e-4,
    max_matvecs: int | None = None,
    block_size: int = 1,
    multiple: bool = False,
    subspace: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Eigenpairs:
    """The k extreme eigenpairs (thick-restart Lanczos: Wu and Simon 2000).

    A matrix of low rank, or with few different eigenvalues, has a Krylov space that ends early: the
    iteration then goes on from a random vector orthogonal to it, at least once more than needed.

    Args:
        which: the eigenvalues of largest "magnitude", or the algebraically "largest" or "smallest".
        tol: a pair has converged when its residual is below tol times the largest |eigenvalue|
            seen; the eigenvalue is then more accurate than that (about tol^2 over the gap).
        max_matvecs: products after which the best pairs so far are returned with
            `converged=False`; default 40 k + 200.
        block_size: vectors per product. Larger blocks find clustered eigenvalues and make better
            use of batched products, but need more products in all. A single vector sees a multiple
            eigenvalue only once, unless its Krylov space ends early.
        multiple: after convergence, look for further copies of the eigenvalues from random vectors
            orthogonal to all eigenvectors so far, until one brings nothing new. This is meant for
            networks with symmetries; each look costs about as much as one more eigenpair.
        subspace: number of basis vectors, of P numbers each; default max(2 k + 20, 4 block_size).

    Raises:
        ValueError: an option is out of range, or a product is not finite.
    """
    size = operator.space.numel
    check_whole(k=k, seed=seed)
    check_whole(block_size=block_size, least=1)
    check_finite(tol=tol)
    if not 1 <= k <= size:
        raise ValueError(f"k must lie between 1 and P = {size}; got {k}")
    if which not in WHICH:
        raise ValueError(f"which must be one of {WHICH}; got {which!r}")
    block_size = min(block_size, size)
    limit = min(subspace or max(2 * k + 20, 4 * block_size), size)
    if limit < min(k + block_size, size):
        raise ValueError(f"subspace must be at least k + block_size; got {subspace}")
    max_matvecs = max_matvecs or 40 * k + 200
    krylov = _Subspace(operator, k, which, limit, block_size, multiple, seed)
    matvecs = 0
    with bar(max_matvecs, f"top {k}", progress, unit="product") as ticks:
        while True:
            count = krylov.expand()
            matvecs += count
            ticks.update(count)
            is_converged, full = krylov.converged(tol), krylov.num_rows >= size
            if (is_converged or full or matvecs >= max_matvecs) and krylov.num_rows >= k:
                values, vectors, residuals = krylov.best()
                return Eigenpairs(
                    values=values,
                    vectors=vectors,
                    residuals=residuals,
                    num_matvecs=matvecs,
                    converged=is_converged or full,
                )
            krylov.advance()


class _Subspace:
    """The rows of an orthonormal basis: converged eigenvectors, then the current Krylov run.

    A run ends at an invariant subspace. Its converged pairs are locked, and a random block
    orthogonal to them starts the next run, which can see what the first could not: other copies of
    the same eigenvalue, and the rest of the spectrum.

    The first `lock` rows are the eigenvectors. The first `num_multiplied` rows have been multiplied
    with A, and those from there to `num_rows` have not. `projection` is the matrix in this basis;
    `theta` and `s` are the run's Ritz values and vectors.
    """

    def __init__(
        self,
        operator: Symmetric,
        k: int,
        which: str,
        limit: int,
        block_size: int,
        multiple: bool,
        seed: int,
    ):
        self.operator, self.k, self.which = operator, k, which
        self.limit, self.block_size, self.multiple = limit, block_size, multiple
        self.generator = torch.Generator().manual_seed(seed)
        rows, space = limit + block_size, operator.space
        self.basis = torch.empty(rows, space.numel, dtype=space.dtype, device=space.device)
        self.projection = torch.empty(rows, rows, dtype=torch.float64)
        self.locked = torch.zeros(0, dtype=torch.float64)
        self.locked_residuals = torch.zeros(0, dtype=torch.float64)
        self.num_multiplied = self.num_rows = 0
        self.scale = self.tolerance = 0.0
        self._start()

    @property
    def lock(self) -> int:
        """The number of eigenvectors that have converged for good."""
        return len(self.locked)

    def _start(self) -> None:
        """Start a run from a random block."""
        space = self.operator.space
        rows = normal_block(space, min(self.block_size, space.numel - self.lock), self.generator)
        rows = _orthogonalise(rows, self.basis[: self.lock])[0]
        block = _orthonormal_rows(rows, self.basis[: self.lock], 0.0)[0]
        self.num_multiplied = self.lock
        self._append(block)

    def _append(self, rows: Tensor) -> None:
        """Put rows after those that have been multiplied."""
        self.basis[self.num_multiplied : self.num_multiplied + len(rows)] = rows
        self.num_rows = self.num_multiplied + len(rows)

    def expand(self) -> int:
        """Multiply the newest rows, compute the run's Ritz pairs, return the number of products."""
        old, used = self.num_multiplied, self.num_rows
        w = require_finite(self.operator.rows(self.basis[old:used]))
        w, coefficients = _orthogonalise(w, self.basis[:used])
        self.projection[:used, old:used] = coefficients
        self.projection[old:used, :used] = coefficients.T
        run = slice(self.lock, used)
        self.theta, self.s = torch.linalg.eigh(self.projection[run, run])
        self.scale = max(self.scale, float(self.theta.abs().max()), torch.finfo(torch.float64).tiny)
        self.following, coupling = _orthonormal_rows(w, self.basis[:used], self.scale)
        # Only the newest rows couple to what lies outside of the basis.
        self.residuals = (coupling @ self.s[old - self.lock :]).norm(dim=0)
        self.num_multiplied = used
        return used - old

    def _best(self) -> tuple[Tensor, Tensor, Tensor]:
        """Values, residuals and places of the best k, counted through locked rows and the run."""
        values = torch.cat([self.locked, self.theta])
        residuals = torch.cat([self.locked_residuals, self.residuals])
        order = _order(values, self.which)[: self.k]
        return values[order], residuals[order], order

    def converged(self, tol: float) -> bool:
        """Whether the best k pairs are within `tol`, and nothing better can be expected."""
        limit = self.tolerance = tol * self.scale
        if bool((self.residuals <= limit).all()):  # within `tol` the run has ended
            self.following = self.following[:0]
        if self.num_rows < self.k or not bool((self._best()[1] <= limit).all()):
            return False
        # The best pair of a run from a random block tells what is left of the spectrum.
        lead = _order(self.theta, self.which)[0]
        if self.residuals[lead] > limit:
            return False
        if self.lock < self.k:
            if len(self.following) and not self.multiple:
                return True
        else:
            worst = self.locked[_order(self.locked, self.which)[self.k - 1]]
            gap = _key(self.theta[lead], self.which) - _key(worst, self.which)
            if gap >= -limit:
                return True
        self.following = self.following[:0]  # keep what converged, and look again
        return False

    def best(self) -> tuple[Tensor, Tensor, Tensor]:
        """The best k pairs: values [k], vectors [P, k] and residuals [k]."""
        values, residuals, order = self._best()
        mix = torch.zeros((len(order), self.num_rows), dtype=torch.float64)
        for row, place in zip(mix, order.tolist(), strict=True):
            if place < self.lock:
                row[place] = 1.0
            else:
                row[self.lock :] = self.s[:, place - self.lock]
        vectors = (mix.to(self.basis) @ self.basis[: self.num_rows]).T
        return values, vectors, residuals.clamp_min(_noise(self.basis, self.scale))

    def advance(self) -> None:
        """Append the next rows to multiply with, and restart where there is no room for them."""
        if not len(self.following):
            self._lock_run()
            self._start()
            return
        if self.num_rows + len(self.following) > self.limit:
            room = self.limit - self.lock - len(self.following)
            count = max(1, min(self.k + max(4, self.k // 2), room))
            self._keep(_order(self.theta, self.which)[:count])
        self._append(self.following)

    def _keep(self, order: Tensor) -> None:
        """Restart the run from some of its Ritz vectors."""
        first, last = self.lock, self.lock + len(order)
        self.basis[first:last] = (
            self.s[:, order].T.to(self.basis) @ self.basis[first : self.num_rows]
        )
        self.projection[first:last, first:last] = torch.diag(self.theta[order])
        self.theta, self.residuals = self.theta[order], self.residuals[order]
        self.num_multiplied = self.num_rows = last

    def _lock_run(self) -> None:
        """End the run, and lock its converged pairs."""
        rows = (self.residuals <= self.tolerance).nonzero()[:, 0]
        self._keep(rows[_order(self.theta[rows], self.which)])
        self.locked = torch.cat([self.locked, self.theta])
        self.locked_residuals = torch.cat([self.locked_residuals, self.residuals])
        # Where the next run would have no room, only the best k stay.
        if self.lock > max(self.k, self.limit - self.block_size - self.k - 4):
            order = _order(self.locked, self.which)[: self.k]
            self.basis[: len(order)] = self.basis[order.to(self.basis.device)]
            self.locked, self.locked_residuals = self.locked[order], self.locked_residuals[order]


def _key(theta: Tensor, which: str) -> Tensor:
    """A number for each eigenvalue, which is small for those that are looked for."""
    return {"magnitude": -theta.abs(), "largest": -theta, "smallest": theta}[which]


def _order(theta: Tensor, which: str) -> Tensor:
    """The places of the eigenvalues, those that are looked for first."""
    return _key(theta, which).argsort()


def _noise(like: Tensor, scale: float) -> float:
    """What rounding may leave of a product of size `scale`, in the type of `like`."""
    return 10 * torch.finfo(like.dtype).eps * scale


def _orthogonalise(w: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Take its part in the rows of `basis` away from w [b, P].

    It returns what is left, and the coefficients of that part in float64.

    Two passes are enough (Kahan and Parlett); the error of a single one grows with every step.
    """
    coefficients = torch.zeros((basis.shape[0], w.shape[0]), dtype=torch.float64)
    for _ in range(2):
        c = basis @ w.T
        w = w - c.T @ basis
        coefficients += c.double().cpu()
    return w, coefficients


def _orthonormal_rows(w: Tensor, basis: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Take w apart: w = R^T Q, with orthonormal rows Q [r, P], r <= b, and R [r, b] in float64.

    w is a product of size `scale` minus its part in `basis`. A row of which only rounding is left
    is dropped: its direction may lie anywhere, also inside `basis`.
    """
    noise = _noise(w, scale)
    coupling = torch.zeros((w.shape[0],) * 2, dtype=torch.float64)
    q = w.new_empty(w.shape)
    count = 0
    for i, row in enumerate(w):
        v, c = _orthogonalise(row[None], q[:count])
        coupling[:count, i] = c[:, 0]
        norm = float(v.norm())
        if norm <= noise:
            continue
        coupling[count, i] = norm
        v = v / norm
        if norm <= 1e-2 * scale:  # the division has magnified rounding
            for others in (basis, q[:count]):
                v, _ = _orthogonalise(v, others)
            v = v / v.norm()
        q[count] = v[0]
        count += 1
    return q[:count], coupling[:count]
