"""Measure what a forgetting budget limits: how the network answers held-back source inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast.adapt.config import Budget
from fast.curvature.card.answers import divergence, expected_rise
from fast.data.source_inputs import SourceInputs
from fast.heads.outputs import source_features, source_logits

# Cosines are divided by it, as in contrastively trained encoders (MoCo, He et al. 2020,
# arXiv 1911.05722).
TEMPERATURE = 0.07
NEVER = -1e4
# Source inputs that are held back for checks, at most half of all. With a budget there are enough
# to know the final loss within a fifth or so.
HELD_FOR_FORECAST, HELD_FOR_BUDGET = 128, 512


class ForgettingMeter:
    """The exact quantity that a budget limits, on some source inputs.

    The network's answers are the logits of its source head. If a network is valued for its features
    instead, its answers go by neighbourhood: which class mean is nearest to a feature vector, or,
    without labels, which other sample.

    In nats, with labels, forgetting is the rise of the cross-entropy; the samples should be data
    that the network was not trained on. Without labels it is the rise to be expected on such data
    given how far the answers diverge (`expected_rise`), or for features the divergence itself. In
    points, with labels, it is the accuracy lost. Without labels it is what the pretrained network
    itself expects to lose, the mean of `p0(its answer) - p0(the answer now)`; features have no
    accuracy without labels.

    Args:
        model: the network at its pretrained weights.
        samples: source inputs, on the model's device.
        points: measure points of accuracy (0..1), not nats.
        skill: "answers", "features", or "auto": features if there are labels that the source head
            cannot give, or if it has a single output.
        top: the largest label of all source inputs, of which `samples` may be a part (default: the
            largest of `samples`). With it, "auto" does not depend on which inputs are held back.

    Raises:
        ValueError: there is not one answer to each sample, or one is not finite; labels are out of
            the head's range; or features cannot be compared: hardly two samples share a label, or
            points are asked for without labels.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: SourceInputs,
        points: bool,
        skill: str = "auto",
        top: int | None = None,
    ) -> None:
        self.samples, self.points, self.labels = samples, points, samples.labels
        self.by_features = skill == "features"
        if not self.by_features:
            self.before = source_logits(model, samples)
            # Softmax makes a sure answer of a single output, which no step would ever change.
            one = self.before.shape[1] == 1
            if one and skill == "answers":
                raise ValueError(
                    "source_skill='answers': the source head has one output, and so no classes to "
                    "choose from: set source_skill='features'"
                )
            self.by_features = one or self._has_other_labels(self.before.shape[1], skill, top)
        if self.by_features:
            self._number_labels()
            self.before = self._answers(model, samples.size)
        elif len(self.before) != samples.size:
            raise ValueError(
                f"source_inputs: the network answers {samples.size} samples with "
                f"{len(self.before)} rows of logits, and one of each is needed: let its forward "
                "return [B, C, ...]"
            )
        if not self.before.isfinite().all():
            raise ValueError(
                "source_inputs: the network's answers to them are not finite (NaN or infinite)"
            )

    def _has_other_labels(self, classes: int, skill: str, top: int | None) -> bool:
        """Whether there are labels that a source head of this many classes cannot give.

        Raises:
            ValueError: there are, and the user asked for answers.
        """
        if self.labels is None:
            return False
        top = int(self.labels.max()) if top is None else top
        if top < classes:
            return False
        if skill == "answers":
            raise ValueError(
                f"source_inputs: label {top}, and the source head has {classes} classes. Where the "
                "source skill is in the features, set source_skill='features'"
            )
        return True

    def _number_labels(self) -> None:
        """Number the labels that features are compared by from 0.

        Raises:
            ValueError: there are none, and points to count; or hardly two samples share one.
        """
        if self.labels is None:
            if self.points:
                raise ValueError(
                    "forget_budget: points of accuracy of features need source_inputs with labels, "
                    "(inputs, labels); without, give nats (0.1)"
                )
            return
        _, self.labels, counts = self.labels.unique(return_inverse=True, return_counts=True)
        if int((counts > 1).sum()) < 2:
            raise ValueError(
                f"source_inputs: {len(self.labels)} held-back samples of {len(counts)} classes, "
                "hardly two of a class: give more, or leave out the labels"
            )

    @property
    def size(self) -> int:
        return self.samples.size

    def __call__(self, model: nn.Module, size: int | None = None) -> float:
        """What is lost so far.

        Args:
            size: how many of the samples, from the first (default: all).
        """
        size = self.size if size is None or self.by_features else min(size, self.size)
        now, before = self._answers(model, size), self.before[:size]
        y = None if self.labels is None else self.labels[:size]
        if self.points:
            return _accuracy_lost(before, now, y)
        if y is not None:
            return float(F.cross_entropy(now, y) - F.cross_entropy(before, y))
        return float((divergence if self.by_features else expected_rise)(before, now))

    def _answers(self, model: nn.Module, size: int) -> Tensor:
        part = self.samples if size == self.size else self.samples.part(0, size)
        if not self.by_features:
            return source_logits(model, part)
        features = source_features(model, part)
        if len(features) != size:
            raise ValueError(
                f"source_inputs: {len(features)} feature vectors of {size} samples, and one of "
                "each is needed to compare them: set source_skill='answers'"
            )
        return by_neighbours(F.normalize(features.double(), dim=1), self.labels)


def by_neighbours(features: Tensor, labels: Tensor | None) -> Tensor:
    """Each sample's answer as logits, computed from all the other samples.

    Args:
        features: `[N, D]`, vectors of length 1.
        labels: `[N]` of K classes, or None.

    Returns:
        cosines over `TEMPERATURE`: `[N, K]` with the class means, a sample being left out of its
        own class's mean; or, without labels, `[N, N]` with the other samples.
    """
    if labels is None:
        cosines = (features @ features.T) / TEMPERATURE
        return cosines.fill_diagonal_(NEVER)
    members = F.one_hot(labels).to(features.dtype)
    sums = members.T @ features
    cosines = features @ F.normalize(sums, dim=1).T
    own = (features * F.normalize(sums[labels] - features, dim=1)).sum(1, keepdim=True)
    return torch.where(members > 0, own, cosines) / TEMPERATURE


def _accuracy_lost(before: Tensor, now: Tensor, labels: Tensor | None) -> float:
    if labels is not None:
        right_before, right = (
            (x.argmax(1) == labels).double().mean().item() for x in (before, now)
        )
        return right_before - right
    p = before.double().softmax(1)
    first, last = (p.gather(1, x.argmax(1, keepdim=True)).mean() for x in (before, now))
    return float(first - last)


def hold_back(
    model: nn.Module, samples: SourceInputs, *, budget: Budget | None, skill: str
) -> tuple[SourceInputs, ForgettingMeter]:
    """Split source inputs: the first are for the method, the last are held back for a meter.

    Args:
        model: the network at its pretrained weights, with its own head.

    Returns:
        the first inputs, and the meter on the last.

    Raises:
        ValueError: see `ForgettingMeter`.
    """
    wanted = HELD_FOR_FORECAST if budget is None else HELD_FOR_BUDGET
    first = samples.size - min(wanted, samples.size // 2)
    held = samples.part(first, samples.size).to(next(model.parameters()).device)
    points = budget is not None and budget.points
    top = None if samples.labels is None else int(samples.labels.max())
    return samples.part(0, first), ForgettingMeter(model, held, points, skill, top)
