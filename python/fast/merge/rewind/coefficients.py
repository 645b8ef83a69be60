"""How far each layer may go: what it gives to the target, over what it costs the source."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast.data.trees import pick
from fast.heads import forward_logits
from fast.heads.forward import in_mode
from fast.merge.rewind.features import SourceFeatures
from fast.merge.rewind.target import Target

# Gradients of a few samples are noisy, so no layer goes further than others by more than this.
MOST = 4.0
SAMPLES = 64


def reaches(
    model: nn.Module,
    shared: Mapping[str, nn.Parameter],
    differences: Mapping[str, Tensor],
    *,
    place: float,
    features: SourceFeatures,
    target: Target,
) -> list[float]:
    """How far each parameter goes, over how far the one goes that goes least.

    Near `place` the target's loss falls with a layer's coefficient `t_b` by `gain_b`, its gradient,
    and the source's features move by `cost_b t_b^2 / 2`, so their gradient is `cost_b place`. With
    the sum of what is paid given, the most is gained at `t_b ~ gain_b / cost_b`. The layers are
    those that own the parameters.

    Args:
        model: on the line at `place`.
        shared: parameters of both tasks, by name.
        differences: `w1 - w0` of these.

    Returns:
        the reach of each parameter, at least 1.
    """
    rows = torch.arange(min(SAMPLES, features.samples.size), device=features.before.device)
    with in_mode(model, False):
        cost = _slopes(features.distance(model, rows).mean(), shared, differences)
        logits = forward_logits(model, pick(target.inputs, slice(SAMPLES)))
        loss = F.cross_entropy(logits, target.labels[:SAMPLES])
        gain = _slopes(-loss, shared, differences)
    ratios = {layer: max(gain[layer], 0.0) / max(cost[layer] / place, 1e-12) for layer in cost}
    middle = sorted(ratios.values())[len(ratios) // 2] or max(ratios.values())
    if not middle:
        return [1.0] * len(shared)
    share = {layer: min(max(r / middle, 1 / MOST), MOST) for layer, r in ratios.items()}
    least = min(share.values())
    return [share[_layer(name)] / least for name in shared]


def _slopes(
    loss: Tensor, shared: Mapping[str, nn.Parameter], differences: Mapping[str, Tensor]
) -> dict[str, float]:
    """The gradient of a loss by the coefficient of each layer: `sum g (w1 - w0)`."""
    grads = torch.autograd.grad(loss, list(shared.values()), allow_unused=True)
    slopes: dict[str, float] = {}
    for name, grad in zip(shared, grads, strict=True):
        slope = 0.0 if grad is None else float((grad.double() * differences[name].double()).sum())
        slopes[_layer(name)] = slopes.get(_layer(name), 0.0) + slope
    return slopes


def _layer(name: str) -> str:
    return name.rpartition(".")[0]
