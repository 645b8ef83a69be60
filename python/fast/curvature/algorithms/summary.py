"""The curvature of one loss in a few figures: loss, gradient, top eigenvalues, trace, density, and
the same by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fast.curvature.algorithms.lanczos import Eigenpairs, top
from fast.curvature.algorithms.spectrum import Spectrum, spectrum
from fast.curvature.algorithms.trace import Estimate, block_traces, trace
from fast.curvature.network.network import Params
from fast.curvature.operators.hessian import NetworkOperator

# A layer's largest eigenvalue is there to be compared with its neighbours' by eye.
LAYER_TOL, LAYER_MATVECS = 1e-2, 40


@dataclass(frozen=True)
class Layer:
    """One principal block: number of parameters, trace, eigenvalue of largest magnitude."""

    numel: int
    trace: Estimate
    top: Eigenpairs

    def as_dict(self) -> dict[str, Any]:
        return {"parameters": self.numel, "trace": vars(self.trace), "top": _pairs(self.top)}


@dataclass(frozen=True)
class Summary:
    """Curvature of one loss. `layers` is empty where it was not asked for, `spectrum` None."""

    numel: int
    loss: float
    gradient_norm: float
    top: Eigenpairs
    trace: Estimate
    spectrum: Spectrum | None
    layers: dict[str, Layer]

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON; eigenvectors are left out."""
        density = self.spectrum
        return {
            "parameters": self.numel,
            "loss": self.loss,
            "gradient_norm": self.gradient_norm,
            "top": _pairs(self.top),
            "trace": vars(self.trace),
            "spectrum": density
            and {"nodes": density.nodes.tolist(), "weights": density.weights.tolist()},
            "layers": {name: layer.as_dict() for name, layer in self.layers.items()},
        }


def summarise(
    operator: NetworkOperator,
    *,
    num_top: int = 5,
    trace_matvecs: int = 48,
    num_probes: int = 4,
    num_lanczos_steps: int = 48,
    layers: str | Mapping[str, Params] | None = "layer",
    seed: int = 0,
    progress: bool | None = None,
) -> Summary:
    """Everything in `Summary`, each estimate with its error.

    Args:
        num_top: eigenpairs of largest magnitude.
        trace_matvecs: products for the trace, and again for the traces of the layers.
        num_probes: of the spectral density, `num_lanczos_steps` products each; 0: no density.
        layers: as `NetworkOperator.blocks` takes it; None: no layers.
    """
    loss, gradient = operator.value_and_gradient()
    shared: dict[str, Any] = {"seed": seed, "progress": progress}
    num_top = min(num_top, operator.shape[0])
    pairs = top(operator, num_top, **shared)
    total = trace(operator, trace_matvecs, **shared)
    density = None
    if num_probes:
        density = spectrum(operator, num_probes, num_lanczos_steps, **shared)
    found = {}
    if layers is not None:
        blocks = operator.blocks(layers)
        traces = block_traces(
            operator, {n: b.space.names for n, b in blocks.items()}, trace_matvecs, **shared
        )
        for name, block in blocks.items():
            best = top(block, 1, tol=LAYER_TOL, max_matvecs=LAYER_MATVECS, **shared)
            found[name] = Layer(block.shape[0], traces[name], best)
    return Summary(operator.shape[0], loss, float(gradient.norm()), pairs, total, density, found)


def _pairs(pairs: Eigenpairs) -> dict[str, Any]:
    return {
        "values": pairs.values.tolist(),
        "residuals": pairs.residuals.tolist(),
        "converged": pairs.converged,
        "num_matvecs": pairs.num_matvecs,
    }
