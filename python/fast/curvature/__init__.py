"""Curvature of a network's loss: Hessian, Gauss-Newton and Fisher matrices by their products.

```python
H = Hessian(model, F.cross_entropy, loader)
H @ V                       # V: [P], [P, K] or a dict of [K, *shape]; the same form back
H.top(5), H.trace(), H.spectrum(), H.check()
```
"""

from fast.curvature.cg import Solution, cg
from fast.curvature.check import CheckReport, check
from fast.curvature.closed_forms import CrossEntropy, SquaredError
from fast.curvature.diagonal import fisher_diagonal, hutchinson_diagonal
from fast.curvature.graph import SecondDerivativeError
from fast.curvature.hessian import GGN, Fisher, Hessian
from fast.curvature.lanczos import Eigenpairs, top
from fast.curvature.losses import Loss
from fast.curvature.operator import Identity, MatrixOperator, SymmetricOperator
from fast.curvature.space import ParameterSpace
from fast.curvature.spectrum import Spectrum, spectrum
from fast.curvature.summary import Summary, summarise
from fast.curvature.trace import Estimate, block_traces, trace

__all__ = [
    "GGN",
    "CheckReport",
    "CrossEntropy",
    "Eigenpairs",
    "Estimate",
    "Fisher",
    "Hessian",
    "Identity",
    "Loss",
    "MatrixOperator",
    "ParameterSpace",
    "SecondDerivativeError",
    "Solution",
    "Spectrum",
    "SquaredError",
    "Summary",
    "SymmetricOperator",
    "block_traces",
    "cg",
    "check",
    "fisher_diagonal",
    "hutchinson_diagonal",
    "spectrum",
    "summarise",
    "top",
    "trace",
]
