"""From a diagonal to nats: the rise of the source loss, measured along steps as Adam takes them.

Steps of fine-tuning are coherent: `d^T H d` exceeds `sum H_ii d_i^2` by orders of magnitude, and a
sure network is flat around its weights and steep further out. Neither a diagonal nor an exact
Hessian at the pretrained weights tells how much a finite step forgets; the network's own answers
along such a step do.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast.curvature.card.answers import Answers, expected_rise
from fast.curvature.network.batches import Batches
from fast.curvature.operators.hessian import GGN
from fast.data.source_inputs import SourceInputs
from fast.errors import warn
from fast.heads import evaluating, forward_logits, source_task
from fast.heads.class_axis import classes_second
from fast.heads.outputs import source_logits

# Sizes of the steps that are tried, as multiples of Adam's usual step of 1e-3 per weight.
STEP_SIZES = (3e-4, 1e-3, 3e-3)
DIRECTIONS = 2
# Nats beyond which the network is destroyed, and its loss measures how sure it is of being wrong.
CEILING = 5.0
EXPONENTS = (0.5, 2.0)
LEAST = 1e-9  # nats; a smaller rise is rounding


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """`nats = scale * energy ** exponent`, with `energy = 1/2 sum C_ii (w - w0)_i^2`.

    Attributes:
        spread: largest factor between a measured step and this line.
        coherence: `d^T G d / sum G_ii d_i^2` of these steps d, by exact Gauss-Newton products: the
            factor by which the diagonal alone is too small; NaN where it was not measured.
        points: the measurements, `(energy, nats)`.
    """

    scale: float
    exponent: float
    spread: float
    coherence: float
    points: tuple[tuple[float, float], ...] = ()

    def nats(self, energy: float) -> float:
        """Forecast rise of the source loss."""
        return self.scale * max(energy, 0.0) ** self.exponent

    def energy(self, nats: float) -> float:
        """The energy at which `nats` are forecast; infinite where no measured step cost any."""
        if not self.scale:
            return math.inf
        return (max(nats, 0.0) / self.scale) ** (1 / self.exponent)

    def reaches(self, energy: float) -> bool:
        """Whether steps of this energy were measured: beyond them a forecast is extrapolated.

        Steps are measured along signs of gradients, as Adam's first steps are. The steps of a run
        turn and are pulled back to the source: within reach, too, they cost less than is forecast.
        """
        energies = [e for e, nats in self.points if nats < CEILING]
        return not energies or energy <= max(energies)

    def through(self, energy: float, nats: float, exponent: float | None = None) -> Calibration:
        """The line moved to one more measurement, that of a run itself.

        Args:
            exponent: the slope of the new line (default: that of this one).
        """
        if not (energy > 0 and nats > 0):
            return self
        slope = self.exponent if exponent is None else exponent
        return dataclasses.replace(self, scale=nats / energy**slope, exponent=slope)


def calibrate(
    model: nn.Module,
    params: Mapping[str, nn.Parameter],
    diagonal: Mapping[str, Tensor],
    data: SourceInputs,
    temperature: float | None,
    seed: int,
) -> Calibration:
    """Measure the rise along signs of gradients of random labels, which Adam's first steps are.

    This costs two gradients, a Gauss-Newton product (4 gradients) and 7 forward passes of `data`.
    The weights are put back exactly.

    Args:
        params: backbone parameter -> its tensor.
        diagonal: the same names -> `C_ii`.
        temperature: that of the Gauss-Newton matrix; None leaves the product out, and coherence.
    """
    device = next(iter(params.values())).device
    probe = data.to(device)
    weights: list[Tensor] = list(params.values())
    before = [p.detach().clone() for p in weights]
    answers = source_logits(model, probe)
    generator = torch.Generator().manual_seed(seed)
    points: list[tuple[float, float]] = []
    coherence: list[float] = []
    for _ in range(DIRECTIONS):
        step = _signs(model, weights, probe, answers, generator)
        unit = 0.5 * sum(
            float((diagonal[n].double() * d.double().square()).sum())
            for n, d in zip(params, step, strict=True)
        )
        if not unit > 0:
            continue
        if temperature is not None and not coherence:
            coherence.append(_exact(model, params, step, probe, temperature) / unit)
        try:
            for size in STEP_SIZES:
                with torch.no_grad():
                    torch._foreach_add_(weights, step, alpha=-size)
                now = source_logits(model, probe)
                nats = float(expected_rise(answers, now))
                with torch.no_grad():
                    torch._foreach_copy_(weights, before)
                points.append((unit * size**2, nats))
        finally:
            with torch.no_grad():
                torch._foreach_copy_(weights, before)
    if all(abs(nats) < LEAST for _, nats in points):
        warn(
            "source card: no step of the backbone changes the source answers, so nothing is "
            "forecast to be lost; is the source head connected, and has it more than one output?",
            RuntimeWarning,
        )
        return Calibration(
            scale=0.0, exponent=1.0, spread=1.0, coherence=math.nan, points=tuple(points)
        )
    return fit(points, coherence[0] if coherence else math.nan)


def fit(points: Sequence[tuple[float, float]], coherence: float) -> Calibration:
    """Least squares of `log nats` over `log energy`, with the slope held within `EXPONENTS`.

    Raises:
        ValueError: no step changed the answers.
    """
    usable = [(e, n) for e, n in points if e > 0 and LEAST < n < CEILING]
    usable = usable or [(e, n) for e, n in points if e > 0 and n > 0 and math.isfinite(n)]
    if not usable:
        raise ValueError(
            "the source answers do not change with the backbone: is the source head connected, and "
            "are the source inputs finite?"
        )
    x = [math.log(e) for e, _ in usable]
    y = [math.log(n) for _, n in usable]
    slope = statistics.linear_regression(x, y).slope if len({*x}) > 1 else 1.0
    slope = min(max(slope, EXPONENTS[0]), EXPONENTS[1])
    offset = statistics.fmean(y) - slope * statistics.fmean(x)
    spread = max(abs(b - offset - slope * a) for a, b in zip(x, y, strict=True))
    return Calibration(
        scale=math.exp(offset),
        exponent=slope,
        spread=math.exp(spread),
        coherence=coherence,
        points=tuple(points),
    )


def _signs(
    model: nn.Module,
    weights: Sequence[Tensor],
    probe: SourceInputs,
    answers: Tensor,
    generator: torch.Generator,
) -> list[Tensor]:
    """Signs of the gradient of the loss of random labels, one tensor per weight."""
    classes = answers.shape[1]
    labels = torch.randint(classes, (answers.shape[0],), generator=generator).to(answers.device)
    with evaluating(model), source_task(model), torch.enable_grad():
        logits = classes_second(model, forward_logits(model, probe.inputs).float(), probe.inputs)
        if logits.dim() > 2:
            logits = logits.flatten(2).mean(2)
        loss = F.cross_entropy(logits, labels)
        grads = torch.autograd.grad(loss, list(weights), allow_unused=True)
    zeros = (torch.zeros_like(p) for p in weights)
    return [z if g is None else g.sign() for g, z in zip(grads, zeros, strict=True)]


def _exact(
    model: nn.Module,
    params: Mapping[str, nn.Parameter],
    step: Sequence[Tensor],
    probe: SourceInputs,
    temperature: float,
) -> float:
    """`1/2 d^T G d` of a step d, by a product with the Gauss-Newton matrix G."""
    names = [f"model.{n}" for n in params]
    with evaluating(model), source_task(model):
        batch = (probe.inputs, None)  # the Gauss-Newton matrix of cross-entropy needs no label
        data = Batches([batch], labels=None)
        operator = GGN(Answers(model, temperature), "cross_entropy", data, names)
        quad = float(operator.quad(dict(zip(names, step, strict=True))))
        return 0.5 * temperature**2 * quad
