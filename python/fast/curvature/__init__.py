"""Curvature of a network's loss: Hessian, Gauss-Newton and Fisher matrices by their products."""

from fast.curvature.diagonal import fisher_diagonal, hutchinson_diagonal
from fast.curvature.hessian import GGN, Fisher, Hessian
from fast.curvature.operator import Identity, MatrixOperator, SymmetricOperator
from fast.curvature.space import ParameterSpace

__all__ = [
    "GGN",
    "Fisher",
    "Hessian",
    "Identity",
    "MatrixOperator",
    "ParameterSpace",
    "SymmetricOperator",
    "fisher_diagonal",
    "hutchinson_diagonal",
]
