"""Symmetric linear operators over named parameters, and their algebra."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fast.curvature.algorithms.arguments import check_finite
from fast.curvature.algorithms.cg import solve
from fast.curvature.algorithms.check import CheckReport, Finding, check
from fast.curvature.algorithms.diagonal import hutchinson_diagonal
from fast.curvature.algorithms.lanczos import Eigenpairs, top
from fast.curvature.algorithms.spectrum import Spectrum, spectrum
from fast.curvature.algorithms.trace import Estimate, trace
from fast.curvature.network.parameter_space import Blocks, ParameterSpace, Vectors, dot

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator as ScipyOperator


class SymmetricOperator(abc.ABC):
    """A symmetric [P, P] matrix known by its products.

    `A @ V` takes V as [P], [P, K] or a dict name -> [K, *shape], and answers in the same form.
    Operators over the same parameters add, subtract and scale: `2 * H + 1e-3 * Identity(H.space)`.
    """

    space: ParameterSpace

    @abc.abstractmethod
    def products(self, vectors: Blocks) -> Blocks:
        """One [K, *shape] block per parameter in, the same out. The input is never modified."""

    @property
    def shape(self) -> tuple[int, int]:
        return (self.space.numel, self.space.numel)

    @property
    def dtype(self) -> torch.dtype:
        return self.space.dtype

    @property
    def device(self) -> torch.device:
        return self.space.device

    @property
    def T(self) -> SymmetricOperator:
        return self

    def __matmul__(self, vectors: Vectors) -> Vectors:
        return self.matmat(vectors)

    def matmat(self, vectors: Vectors, out: Vectors | None = None) -> Vectors:
        """A V; written into `out` where there is one (of the form and shapes of `vectors`)."""
        blocks, restore = self.space.unpack(vectors)
        result = restore(self.products(blocks) if blocks[0].shape[0] else blocks)
        if out is None:
            return result
        if isinstance(out, Tensor) and isinstance(result, Tensor):
            return out.copy_(result)
        if isinstance(out, dict) and isinstance(result, dict):
            for name, value in result.items():
                out[name].copy_(value)
            return out
        raise TypeError("out must have the form of V: a tensor for a tensor, a dict for a dict")

    def rows(self, vectors: Tensor) -> Tensor:
        """A V with one vector per row, [K, P] -> [K, P]."""
        return self.space.join(self.products(self.space.split(vectors)))

    def quad(self, vectors: Vectors) -> Tensor:
        """v^T A v of every vector, [K] (0-d for a single vector), in float64."""
        blocks, _ = self.space.unpack(vectors)
        values = self.quadratics(blocks)
        single = isinstance(vectors, Tensor) and vectors.ndim == 1
        if isinstance(vectors, dict):
            single = vectors[self.space.names[0]].shape == self.space.shapes[0]
        return values[0] if single else values

    def quadratics(self, vectors: Blocks) -> Tensor:
        """v^T A v of each of the K vectors, [K], in float64."""
        return dot(vectors, self.products(vectors))

    def dense(self, chunk: int = 64) -> Tensor:
        """The explicit [P, P] matrix: P products, for small P."""
        eye = torch.eye(self.shape[0], dtype=self.dtype, device=self.device)
        return torch.cat([self.rows(part) for part in eye.split(chunk)])

    # Each algorithm is a function of any symmetric matrix, in a module of its own.

    def trace(self, **options: Any) -> Estimate:
        """See `fast.curvature.trace`."""
        return trace(self, **options)

    def diagonal(self, **options: Any) -> Tensor:
        """Estimate of the diagonal, [P]; see `fast.curvature.hutchinson_diagonal`."""
        return hutchinson_diagonal(self, **options)

    def top(self, k: int = 1, **options: Any) -> Eigenpairs:
        """The k eigenpairs of largest magnitude; see `fast.curvature.top`."""
        return top(self, k, **options)

    def spectrum(self, **options: Any) -> Spectrum:
        """Spectral density; see `fast.curvature.spectrum`."""
        return spectrum(self, **options)

    def solve(self, b: Vectors, **options: Any) -> Vectors:
        """A^-1 b by conjugate gradients; see `fast.curvature.cg`.

        Warns (RuntimeWarning) where the iterations ran out before `tol` was reached.
        """
        return solve(self, b, **options)

    def check(self, **options: Any) -> CheckReport:
        """Symmetry, linearity, determinism and more; see `fast.curvature.check`."""
        return check(self, **options)

    def findings(self, v: Tensor, av: Tensor, rtol: float) -> list[Finding]:
        """What `check` looks at in this kind of matrix alone, given one product A v (both [P])."""
        return []

    def to_scipy(self) -> ScipyOperator:
        """The operator for scipy.sparse.linalg: numpy in and out, moved to the device and back."""
        from scipy.sparse.linalg import LinearOperator

        def matmat(v: Any) -> Any:
            tensor = torch.as_tensor(v, dtype=self.dtype).to(self.device)
            result = self.matmat(tensor)
            assert isinstance(result, Tensor)
            return result.cpu().to(outside).numpy()

        # numpy has no bfloat16.
        outside = torch.float32 if self.dtype == torch.bfloat16 else self.dtype
        dtype = torch.empty((), dtype=outside).numpy().dtype
        return LinearOperator(
            self.shape,
            matvec=lambda v: matmat(v.reshape(-1)),
            rmatvec=lambda v: matmat(v.reshape(-1)),
            matmat=matmat,
            rmatmat=matmat,
            dtype=dtype,
        )

    def damped(self, damping: float) -> SymmetricOperator:
        """A + damping * I."""
        check_finite(damping=damping)
        return Sum(self, Identity(self.space) * damping)

    def __add__(self, other: SymmetricOperator) -> SymmetricOperator:
        if not isinstance(other, SymmetricOperator):
            return NotImplemented
        return Sum(self, other)

    def __sub__(self, other: SymmetricOperator) -> SymmetricOperator:
        if not isinstance(other, SymmetricOperator):
            return NotImplemented
        return Sum(self, other * -1.0)

    def __mul__(self, factor: float) -> SymmetricOperator:
        if not isinstance(factor, int | float):
            return NotImplemented
        check_finite(factor=factor)
        return Scaled(self, float(factor))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> SymmetricOperator:
        if not isinstance(divisor, int | float):
            return NotImplemented
        return Scaled(self, 1.0 / divisor)

    def __neg__(self) -> SymmetricOperator:
        return self * -1.0

    def __repr__(self) -> str:
        return f"{type(self).__name__}(P={self.shape[0]}, {self.dtype}, {self.device})"


class Sum(SymmetricOperator):
    """A + B over the same parameters."""

    def __init__(self, first: SymmetricOperator, second: SymmetricOperator):
        if first.space != second.space:
            raise ValueError(
                f"operators over different parameters do not add: P = {first.shape[0]} and "
                f"{second.shape[0]}, names {first.space.names[:3]} and {second.space.names[:3]}"
            )
        self.first, self.second = first, second
        self.space = first.space

    def products(self, vectors: Blocks) -> Blocks:
        return list(torch._foreach_add(self.first.products(vectors), self.second.products(vectors)))

    def quadratics(self, vectors: Blocks) -> Tensor:
        return self.first.quadratics(vectors) + self.second.quadratics(vectors)


class Scaled(SymmetricOperator):
    """factor * A."""

    def __init__(self, base: SymmetricOperator, factor: float):
        self.base, self.factor = base, factor
        self.space = base.space

    def products(self, vectors: Blocks) -> Blocks:
        return list(torch._foreach_mul(self.base.products(vectors), self.factor))

    def quadratics(self, vectors: Blocks) -> Tensor:
        return self.base.quadratics(vectors) * self.factor


class Identity(SymmetricOperator):
    """I over a parameter space, such as the `space` of another operator."""

    def __init__(self, space: ParameterSpace):
        self.space = space

    def products(self, vectors: Blocks) -> Blocks:
        return [v.clone() for v in vectors]


class MatrixOperator(SymmetricOperator):
    """An operator from a function [K, P] -> [K, P], or from an explicit symmetric [P, P] matrix."""

    def __init__(
        self,
        matrix: Tensor | Callable[[Tensor], Tensor],
        size: int | None = None,
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ):
        if isinstance(matrix, Tensor):
            if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
                raise ValueError(f"matrix must be [P, P]; got {list(matrix.shape)}")
            explicit = matrix
            self._rows: Callable[[Tensor], Tensor] = lambda v: v @ explicit.T
            size, dtype, device = matrix.shape[0], matrix.dtype, matrix.device
        else:
            if size is None:
                raise ValueError("size (P) is needed with a function")
            self._rows = matrix
        self.space = ParameterSpace({"x": torch.empty(size, dtype=dtype, device=device)})

    def products(self, vectors: Blocks) -> Blocks:
        return [self._rows(vectors[0])]
