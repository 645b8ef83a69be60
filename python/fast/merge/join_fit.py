"""Bring two heads to one scale, so that one softmax over the classes of both is calibrated.

The rows of the source's head become `a_s z_s` and those of the target's `a_t z_t + c + v . f`, for
logits z and features f. The scales, the offset c and the direction v are those that make the
cross-entropy over all classes least, on samples of both tasks of which each task has half the
weight. Scales and offset are temperature scaling (Guo et al. 2017, arXiv 1706.04599) and the bias
correction of Wu et al. (2019, arXiv 1905.13260); the direction is a logistic regression of the task
on the features, whose weight decay is chosen by cross-validation. All of it is linear in the
features, so that it becomes part of the heads' own weights and costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fast.merge.joined import Calibration, merged

RIDGES = (1.0, 0.1, 0.01, 1e-3, 1e-4)
FOLDS = 5
ITERATIONS = 100


@dataclass(frozen=True, kw_only=True)
class Side:
    """Samples of one task.

    Attributes:
        source, target: logits of each head, `[N, C_s]` and `[N, C_t]`.
        features: of all networks side by side, `[N, D]`.
        answers: what is right, as probabilities over the classes of the union, `[N, C]`.
    """

    source: Tensor
    target: Tensor
    features: Tensor
    answers: Tensor

    def pick(self, rows: Tensor) -> Side:
        return Side(**{name: x[rows] for name, x in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class Scales:
    """Factors on the logits of each head, and what is added to the target's: `offset + direction .
    f`."""

    source: Tensor
    target: Tensor
    offset: Tensor
    direction: Tensor

    def log_probs(self, side: Side, place: Tensor) -> Tensor:
        """Over the classes of the union, `[N, C]`.

        Args:
            place: the class of each row of the two heads.
        """
        shift = self.offset + side.features @ self.direction
        rows = torch.cat([self.source * side.source, self.target * side.target + shift[:, None]], 1)
        return merged(rows, place, side.answers.shape[1]).log_softmax(1)

    def loss(self, sides: list[Side], place: Tensor) -> Tensor:
        """Cross-entropy in nats, of which each task has an equal share."""
        losses = [-(side.answers * self.log_probs(side, place)).sum(1).mean() for side in sides]
        return torch.stack(losses).mean()


def fit(
    sides: list[Side], place: Tensor, own: list[Tensor], *, labelled: bool, seed: int = 0
) -> tuple[Scales, Calibration]:
    """Fit the scales to samples of the source and of the target.

    Args:
        sides: the source's and the target's samples.
        place: the class of each row.
        own: for the source and the target, which classes of the union it has, as booleans `[C]`.
        labelled: whether the source's answers are labels. The network's own answers say nothing of
            its scale, which then stays 1.

    Returns:
        the scales, and what they came to.
    """
    generator = torch.Generator().manual_seed(seed)
    folds = [
        torch.randperm(len(side.answers), generator=generator).to(place.device) % FOLDS
        for side in sides
    ]
    found = {}
    for ridge in RIDGES:
        losses, mistakes = [], []
        for fold in range(FOLDS):
            held = [side.pick(f == fold) for side, f in zip(sides, folds, strict=True)]
            rest = [side.pick(f != fold) for side, f in zip(sides, folds, strict=True)]
            scales = minimise(rest, place, ridge, labelled)
            losses.append(scales.loss(held, place))
            mistakes.append(_mistaken(scales, held, place, own))
        found[ridge] = torch.stack(losses).mean().item(), torch.stack(mistakes).mean().item()
    ridge = min(found, key=lambda r: found[r][0])
    scales = minimise(sides, place, ridge, labelled)
    one = torch.ones_like(scales.offset)
    plain = Scales(source=one, target=one, offset=0 * one, direction=0 * scales.direction)
    features = torch.cat([side.features.mean(0)[None] for side in sides]).mean(0)
    return scales, Calibration(
        source_scale=scales.source.item(),
        target_scale=scales.target.item(),
        offset=(scales.offset + features @ scales.direction).item(),
        ridge=ridge,
        loss_before=plain.loss(sides, place).item(),
        loss=found[ridge][0],
        mistaken=found[ridge][1],
        source_labelled=labelled,
    )


def minimise(sides: list[Side], place: Tensor, ridge: float, labelled: bool) -> Scales:
    """The scales of least cross-entropy, with weight decay on the direction (L-BFGS)."""
    features = torch.cat([side.features for side in sides])
    mean, std = features.mean(0), features.std(0)
    # A feature that hardly varies would get a large weight for what is rounding.
    std = std + 0.01 * std.mean() + 1e-12
    logs = torch.zeros(2, dtype=mean.dtype, device=mean.device, requires_grad=True)
    offset = mean.new_zeros(()).requires_grad_()
    direction = torch.zeros_like(mean, requires_grad=True)

    def scales() -> Scales:
        source, target = (logs * logs.new_tensor([labelled, True])).exp()
        v = direction / std
        return Scales(source=source, target=target, offset=offset - mean @ v, direction=v)

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = scales().loss(sides, place) + ridge / 2 * direction.square().sum()
        loss.backward()
        return loss

    optimizer = torch.optim.LBFGS(
        [logs, offset, direction], max_iter=ITERATIONS, line_search_fn="strong_wolfe"
    )
    with torch.enable_grad():
        optimizer.step(objective)
    with torch.no_grad():
        return scales()


def _mistaken(scales: Scales, sides: list[Side], place: Tensor, own: list[Tensor]) -> Tensor:
    shares = [
        (~mine[scales.log_probs(side, place).argmax(1)]).double().mean()
        for side, mine in zip(sides, own, strict=True)
    ]
    return torch.stack(shares).mean()
