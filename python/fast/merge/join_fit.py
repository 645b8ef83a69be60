"""Bring two heads to one scale, so that one softmax over the classes of both is calibrated.

For logits z and features f, the logits of the source's head become `a_s z_s` and those of the
target's head `a_t z_t + c + v . f`. The scales a, the offset c and the direction v minimise the
cross-entropy over all classes on samples of both tasks, each of which has half the weight. The
scales are temperature scaling (Guo et al. 2017, arXiv 1706.04599), the offset is the bias
correction of Wu et al. (2019, arXiv 1905.13260), and the direction is a logistic regression of the
task on the features, whose weight decay is chosen by cross-validation. All of it is linear in the
features, so that it becomes part of the heads' own weights and costs nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fast.merge.joined import HeadCalibration, merged

RIDGES = (0.1, 0.01, 1e-3, 1e-4)
FOLDS = 3
ITERATIONS = 60
STD_FLOOR = 0.01
# A factor on a head's logits lies between this and one over this. Heads that are far too sure make
# the line search try steps at which an unbounded factor would overflow.
LARGEST_SCALE = 1e4


@dataclass(frozen=True, kw_only=True)
class Side:
    """Samples of one task.

    Attributes:
        source, target: logits of each head, `[N, C_s]` and `[N, C_t]`.
        features: the features of all networks side by side, `[N, D]`.
        answers: the right answers, as probabilities over the classes of the union, `[N, C]`.
    """

    source: Tensor
    target: Tensor
    features: Tensor
    answers: Tensor

    def pick(self, rows: Tensor) -> Side:
        """The samples of these rows."""
        return Side(**{name: x[rows] for name, x in vars(self).items()})


Sides = tuple[Side, ...]  # the source's and the target's


@dataclass(frozen=True, kw_only=True)
class Scales:
    """The scale of two heads: logits are multiplied by `source` and `target`, and to the target's
    `offset + direction . f` is added."""

    source: Tensor
    target: Tensor
    offset: Tensor
    direction: Tensor

    def log_probs(self, side: Side, place: Tensor) -> Tensor:
        """Log-probabilities over the classes of the union, `[N, C]`.

        Args:
            place: the class of each row of the two heads.
        """
        shift = self.offset + side.features @ self.direction
        rows = torch.cat([self.source * side.source, self.target * side.target + shift[:, None]], 1)
        return merged(rows, place, side.answers.shape[1]).log_softmax(1)

    def loss(self, sides: Sides, place: Tensor) -> Tensor:
        """The mean over both tasks of their cross-entropy, in nats."""
        losses = [-(side.answers * self.log_probs(side, place)).sum(1).mean() for side in sides]
        return torch.stack(losses).mean()


def fit(
    sides: Sides, place: Tensor, own: tuple[Tensor, Tensor], *, labelled: bool
) -> tuple[Scales, HeadCalibration]:
    """Fit the scales to samples of the source and of the target.

    Args:
        sides: the source's samples and the target's.
        place: the class of each row.
        own: which classes of the union the source has, and which the target, as booleans `[C]`.
        labelled: whether the source's answers are labels. The network's own answers cannot tell
            its scale, which then stays 1.

    Returns:
        the scales, and figures that say how well they fit.
    """
    features = torch.cat([side.features for side in sides])
    mean, std = features.mean(0), features.std(0)
    # A feature that hardly varies would get a large weight for what is rounding.
    std = std + STD_FLOOR * std.mean() + 1e-12
    sides = tuple(replace(side, features=(side.features - mean) / std) for side in sides)
    losses, mistaken = _cross_validated(sides, place, own, labelled)
    best = int(losses.argmin())
    scales = minimise(sides, place, RIDGES[best], labelled)
    one = torch.ones_like(scales.offset)
    before = Scales(source=one, target=one, offset=0 * one, direction=0 * mean)
    calibration = HeadCalibration(
        source_scale=scales.source.item(),
        target_scale=scales.target.item(),
        offset=scales.offset.item(),
        ridge=RIDGES[best],
        loss_before=before.loss(sides, place).item(),
        loss=losses[best].item(),
        mistaken=mistaken[best].item(),
        source_labelled=labelled,
    )
    direction = scales.direction / std
    scales = replace(scales, offset=scales.offset - mean @ direction, direction=direction)
    return scales, calibration


def _cross_validated(
    sides: Sides, place: Tensor, own: tuple[Tensor, Tensor], labelled: bool
) -> tuple[Tensor, Tensor]:
    """For each of `RIDGES`, the loss and the share of mistaken samples, on held-out folds."""
    generator = torch.Generator().manual_seed(0)
    folds = [torch.randperm(len(s.answers), generator=generator) % FOLDS for s in sides]
    losses, mistaken = torch.zeros(2, len(RIDGES), dtype=sides[0].features.dtype)
    for fold in range(FOLDS):
        rest, held_out = (
            tuple(s.pick((f == fold) == held_back) for s, f in zip(sides, folds, strict=True))
            for held_back in (False, True)
        )
        scales = None
        for i, ridge in enumerate(RIDGES):
            scales = minimise(rest, place, ridge, labelled, scales)
            losses[i] += scales.loss(held_out, place).item() / FOLDS
            mistaken[i] += _mistaken(scales, held_out, place, own) / FOLDS
    return losses, mistaken


def minimise(
    sides: Sides, place: Tensor, ridge: float, labelled: bool, start: Scales | None = None
) -> Scales:
    """Minimise the cross-entropy plus `ridge / 2 * |direction|^2` over the scales, by L-BFGS.

    Args:
        start: where to begin (default: with the heads as they are).
    """
    like = sides[0].features
    logs, offset = like.new_zeros(2), like.new_zeros(())
    direction = like.new_zeros(like.shape[1])
    if start is not None:
        logs = _unbounded(torch.stack([start.source, start.target]).log())
        offset, direction = start.offset.clone(), start.direction.clone()
    unknowns = [x.requires_grad_() for x in (logs, offset, direction)]
    learns = logs.new_tensor([labelled, True])

    def scales() -> Scales:
        source, target = (_bounded(logs) * learns).exp()
        return Scales(source=source, target=target, offset=offset, direction=direction)

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = scales().loss(sides, place) + ridge / 2 * direction.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer = torch.optim.LBFGS(unknowns, max_iter=ITERATIONS, line_search_fn="strong_wolfe")
    with torch.enable_grad():
        optimizer.step(objective)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return Scales(**{name: x.detach() for name, x in vars(scales()).items()})


def _bounded(logs: Tensor) -> Tensor:
    most = math.log(LARGEST_SCALE)
    return most * (logs / most).tanh()


def _unbounded(logs: Tensor) -> Tensor:
    most = math.log(LARGEST_SCALE)
    return most * (logs / most).clamp(-0.99, 0.99).atanh()


def _mistaken(scales: Scales, sides: Sides, place: Tensor, own: tuple[Tensor, Tensor]) -> float:
    """The share of samples that are given a class which their task does not have."""
    shares = [
        (~classes[scales.log_probs(side, place).argmax(1)]).double().mean()
        for side, classes in zip(sides, own, strict=True)
    ]
    return torch.stack(shares).mean().item()
