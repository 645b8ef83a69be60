"""The curvature of one loss in a few figures: loss, gradient, top eigenvalues, trace and spectral
density, and the first of these by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from fast.curvature.algorithms.lanczos import Eigenpairs, top
from fast.curvature.algorithms.protocol import Symmetric
from fast.curvature.algorithms.spectrum import Spectrum, spectrum
from fast.curvature.algorithms.trace import Estimate, block_traces, trace
from fast.curvature.network.network import Params

# The largest eigenvalue of a layer is only compared with its neighbours', by eye.
LAYER_TOL, LAYER_MATVECS = 1e-2, 40


class LossMatrix(Symmetric, Protocol):
    """A curvature matrix that also knows its loss, and its principal blocks."""

    def value_and_gradient(self) -> tuple[float, Tensor]: ...

    def blocks(self, by: str | Mapping[str, Params] = ...) -> Mapping[str, Symmetric]: ...


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One principal block: its size, its trace, and its eigenvalue of largest magnitude."""

    numel: int
    trace: Estimate
    top: Eigenpairs

    def as_dict(self) -> dict[str, Any]:
        return {"parameters": self.numel, "trace": vars(self.trace), "top": _pairs(self.top)}


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Curvature of one loss; without layers `layers` is empty, without density `spectrum` None."""

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
    operator: LossMatrix,
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
        num_top: number of eigenpairs, those of largest magnitude.
        trace_matvecs: products for the trace, and as many for the traces of the layers.
        num_probes: probes of the spectral density, `num_lanczos_steps` products each; 0 leaves the
            density out.
        layers: the argument of `Hessian.blocks`; None leaves the layers out.
    """
    loss, gradient = operator.value_and_gradient()
    options: dict[str, Any] = {"seed": seed, "progress": progress}
    pairs = top(operator, min(num_top, operator.space.numel), **options)
    total = trace(operator, trace_matvecs, **options)
    density = spectrum(operator, num_probes, num_lanczos_steps, **options) if num_probes else None
    parts = {}
    if layers is not None:
        blocks = operator.blocks(layers)
        names = {name: block.space.names for name, block in blocks.items()}
        traces = block_traces(operator, names, trace_matvecs, **options)
        for name, block in blocks.items():
            largest = top(block, 1, tol=LAYER_TOL, max_matvecs=LAYER_MATVECS, **options)
            parts[name] = Layer(numel=block.space.numel, trace=traces[name], top=largest)
    return Summary(
        numel=operator.space.numel,
        loss=loss,
        gradient_norm=float(gradient.norm()),
        top=pairs,
        trace=total,
        spectrum=density,
        layers=parts,
    )


def _pairs(pairs: Eigenpairs) -> dict[str, Any]:
    return {
        "values": pairs.values.tolist(),
        "residuals": pairs.residuals.tolist(),
        "converged": pairs.converged,
        "num_matvecs": pairs.num_matvecs,
    }
