"""Conjugate gradients for several right-hand sides at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fast.curvature.algorithms.arguments import check_finite, check_whole
from fast.curvature.algorithms.protocol import Symmetric
from fast.curvature.network.parameter_space import Vectors
from fast.errors import warn
from fast.progress import bar


@dataclass(frozen=True, kw_only=True)
class Solution:
    """The solution in the form of b, and how good it is.

    Attributes:
        residuals: [K], |b - A x| / |b| of each column, by a last product.
        num_iterations: products with all columns before that.
        converged: whether the iteration came to the tolerance, and all residuals are within twice
            of it; rounding keeps those of an ill-conditioned A larger.
    """

    solution: Vectors = field(repr=False)
    residuals: Tensor
    num_iterations: int
    converged: bool


def cg(
    operator: Symmetric,
    b: Vectors,
    *,
    tol: float = 1e-5,
    max_iterations: int = 100,
    progress: bool | None = None,
) -> Solution:
    """Solve A x = b for positive definite A (Hestenes and Stiefel 1952), all K columns in step.

    Raises:
        ValueError: a direction of negative curvature shows that A is not positive definite (use
            fast.GGN instead of fast.Hessian, or `.damped(...)`); b is not finite; or an option is
            no number.
    """
    check_whole(max_iterations=max_iterations)
    check_finite(tol=tol)
    space = operator.space
    blocks, restore = space.unpack(b)
    rhs = space.join(blocks)
    if not bool(rhs.isfinite().all()):
        raise ValueError("b holds NaN or infinity")
    # Squares of tiny (huge) numbers underflow (overflow): every column is solved at size one.
    size = rhs.abs().amax(dim=1, keepdim=True) if rhs.numel() else rhs.new_ones((len(rhs), 1))
    size = torch.where(size > 0, size, 1)
    rhs = rhs / size
    x = torch.zeros_like(rhs)
    r, p = rhs.clone(), rhs.clone()
    scale = rhs.norm(dim=1).clamp_min(torch.finfo(rhs.dtype).tiny)
    rr = torch.linalg.vecdot(r, r)
    iterations = 0
    with bar(max_iterations, "cg", progress, unit="product") as ticks:
        while iterations < max_iterations:
            active = rr.sqrt() > tol * scale
            if not bool(active.any()):
                break
            ap = operator.rows(p)
            iterations += 1
            ticks.update()
            pap = torch.linalg.vecdot(p, ap)
            if bool((pap[active] <= 0).any()):
                raise ValueError(
                    "cg met a direction of negative or zero curvature: the operator is not "
                    "positive definite; use fast.GGN, or add damping with .damped(...)"
                )
            step = torch.where(active, rr / pap, 0)[:, None]
            x += step * p
            r -= step * ap
            new = torch.linalg.vecdot(r, r)
            p = r + torch.where(active, new / rr, 0)[:, None] * p
            rr = new
    # Rounding has parted the residual of the iteration from that of x.
    left = rhs - operator.rows(x) if iterations else rhs
    residuals = (left.norm(dim=1) / scale).double().cpu()
    return Solution(
        solution=restore(space.split(x * size)),
        residuals=residuals,
        num_iterations=iterations,
        converged=bool((rr.sqrt() <= tol * scale).all() and (residuals <= 2 * tol).all()),
    )


def solve(operator: Symmetric, b: Vectors, **options: Any) -> Vectors:
    """The solution alone, with a RuntimeWarning where `cg` has not reached `tol`."""
    result = cg(operator, b, **options)
    if not result.converged:
        warn(
            f"solve: after {result.num_iterations} iterations the relative residual is "
            f"{float(result.residuals.max()):.1e}: raise max_iterations, add damping with "
            ".damped(...), take parameters of float64, or fast.curvature.cg, which returns the "
            "residuals",
            RuntimeWarning,
        )
    return result.solution
