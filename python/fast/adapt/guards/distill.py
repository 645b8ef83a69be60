"""Stay with what the source head said about target inputs before anything moved.

Learning without Forgetting (Li and Hoiem 2016, arXiv 1606.09282): the loss gets
`weight * T^2 * KL(source outputs at w0 || source outputs now)`, both softened by T. The source head
is a linear layer on features that the step computes anyway, and the outputs at w0 are computed once
per sample, so a step costs no more than before. No source data is needed.

What is remembered of one view of a sample holds for no other: where inputs are augmented, the
outputs at w0 come from a frozen copy of the network, which sees what the network sees.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast.curvature.card.file import fingerprint
from fast.data.trees import leaves, length, pick
from fast.heads import TaskHead, by_sample, features_of, task_head

TEMPERATURE = 2.0


def summed_kl(before: Tensor, now: Tensor) -> Tensor:
    """Sum over samples of `T^2 KL(before || now)`, in nats.

    Args:
        before, now: source outputs `[B, C]`; or `[B, C, ...]`, then averaged over positions.
    """
    softened = ((x.float() / TEMPERATURE).log_softmax(1) for x in (before, now))
    target, answer = softened
    kl = F.kl_div(answer, target, log_target=True, reduction="none").sum(1)
    return (
        TEMPERATURE**2 * kl.flatten(1).mean(1).sum() if kl.dim() > 1 else TEMPERATURE**2 * kl.sum()
    )


class Distillation:
    """The penalty of one run, in micro-batch parts that add up to the mean over a batch.

    Args:
        head: of the model that is trained.
        weight: of the penalty, in units of the target loss.
    """

    def __init__(self, head: TaskHead, weight: float) -> None:
        self.head, self.weight = head, weight

    def places(self, index: Tensor | None, inputs: Any) -> Tensor:
        """Where the outputs at w0 of each sample of a batch are, `[B]` on the CPU; -1: not known.

        Args:
            index: rows in the training data, or None.
            inputs: as the network will see them.
        """
        raise NotImplementedError

    def before(self, places: Tensor, inputs: Any) -> tuple[Tensor | slice, Tensor]:
        """Rows of a micro-batch whose outputs at w0 are known, and these outputs."""
        raise NotImplementedError

    def penalty(self, features: Tensor, places: Tensor, inputs: Any) -> Tensor:
        """Sum over the samples whose outputs at w0 are known, `[]`.

        Args:
            features: of a micro-batch, as the head sees them now; one row of a sample or several.
            places: of its samples.
            inputs: on the model's device.
        """
        rows, outputs = self.before(places, inputs)
        if not len(outputs):
            return torch.zeros((), device=features.device)
        # Several rows of a sample (tokens, pixels) count as one, on average.
        positions = len(features) // length(inputs)
        features = by_sample(features, length(inputs))[rows]
        if positions > 1:
            features, outputs = features.flatten(0, 1), outputs.flatten(0, 1)
        now = self.head.source(features)
        if isinstance(
            self.head.source, nn.Linear
        ):  # has its classes last, where there are positions
            outputs, now = outputs.movedim(-1, 1), now.movedim(-1, 1)
        return self.weight * summed_kl(outputs, now) / positions


def digest(inputs: Any) -> str:
    """Hash of one sample's inputs."""
    return " ".join(fingerprint(x) for x in leaves(inputs))


class CachedDistillation(Distillation):
    """Outputs at w0 of some training samples, computed beforehand.

    Args:
        index: their rows in the training data, `[M]`.
        outputs: `[M, C, ...]`, or `[M, T, C, ...]` where the head sees T rows of a sample.
        num_samples: N of the training data.
        digests: of the M inputs; None where a row has the same inputs always. Of other inputs than
            these, nothing is known.
    """

    def __init__(
        self,
        head: TaskHead,
        weight: float,
        index: Tensor,
        outputs: Tensor,
        num_samples: int,
        digests: list[str] | None = None,
    ) -> None:
        super().__init__(head, weight)
        self.outputs, self.digests = outputs, digests
        self.place = torch.full((num_samples,), -1)
        self.place[index] = torch.arange(len(index))

    def places(self, index: Tensor | None, inputs: Any) -> Tensor:
        assert index is not None
        places = self.place[index]
        if self.digests is not None:
            for i, place in enumerate(places.tolist()):
                if place >= 0 and digest(pick(inputs, i)) != self.digests[place]:
                    places[i] = -1
        return places

    def before(self, places: Tensor, inputs: Any) -> tuple[Tensor | slice, Tensor]:
        rows = (places >= 0).nonzero().squeeze(1)
        return rows.to(self.outputs.device), self.outputs[places[rows].to(self.outputs.device)]


class LiveDistillation(Distillation):
    """Outputs of a frozen copy of the pretrained network: for inputs that are not seen twice, or
    data that have no row numbers.

    A third more work per step, and a copy of the weights.

    Args:
        model: with its new head, at the pretrained weights.
    """

    def __init__(self, head: TaskHead, weight: float, model: nn.Module) -> None:
        self.pretrained = copy.deepcopy(model).requires_grad_(False)
        frozen = task_head(self.pretrained)
        assert frozen is not None
        self.frozen: TaskHead = frozen
        super().__init__(head, weight)

    def places(self, index: Tensor | None, inputs: Any) -> Tensor:
        return torch.arange(length(inputs))

    def before(self, places: Tensor, inputs: Any) -> tuple[Tensor | slice, Tensor]:
        with torch.no_grad():
            features = features_of(self.pretrained, self.frozen, inputs)
            return slice(None), by_sample(self.frozen.source(features), length(inputs))
