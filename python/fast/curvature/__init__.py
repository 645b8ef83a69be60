"""Curvature of a network's loss: Hessian, Gauss-Newton and Fisher matrices by their products.

```python
H = Hessian(model, F.cross_entropy, loader)
H @ V                       # V: [P], [P, K] or a dict of [K, *shape]; the same form back
H.top(5), H.trace(), H.spectrum(), H.check()
```
"""

from fast.curvature.algorithms.cg import Solution, cg
from fast.curvature.algorithms.check import CheckReport, check
from fast.curvature.algorithms.diagonal import hutchinson_diagonal
from fast.curvature.algorithms.lanczos import Eigenpairs, top
from fast.curvature.algorithms.spectrum import Spectrum, spectrum
from fast.curvature.algorithms.summary import Summary, summarise
from fast.curvature.algorithms.trace import Estimate, block_traces, trace
from fast.curvature.audit import Audit, Audited, audit
from fast.curvature.losses.closed_forms import CrossEntropy, SquaredError
from fast.curvature.losses.loss import Loss
from fast.curvature.network.graph import SecondDerivativeError
from fast.curvature.network.memory import keep_freed_memory
from fast.curvature.network.parameter_space import ParameterSpace
from fast.curvature.operators.base import Identity, MatrixOperator, SymmetricOperator
from fast.curvature.operators.fisher_diagonal import fisher_diagonal
from fast.curvature.operators.hessian import GGN, Fisher, Hessian
from fast.curvature.operators.network_operator import NetworkOperator

__all__ = [
    "GGN",
    "Audit",
    "Audited",
    "CheckReport",
    "CrossEntropy",
    "Eigenpairs",
    "Estimate",
    "Fisher",
    "Hessian",
    "Identity",
    "Loss",
    "MatrixOperator",
    "NetworkOperator",
    "ParameterSpace",
    "SecondDerivativeError",
    "Solution",
    "Spectrum",
    "SquaredError",
    "Summary",
    "SymmetricOperator",
    "audit",
    "block_traces",
    "cg",
    "check",
    "fisher_diagonal",
    "hutchinson_diagonal",
    "keep_freed_memory",
    "spectrum",
    "summarise",
    "top",
    "trace",
]
