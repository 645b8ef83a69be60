"""Distillation: the source head should say of target inputs what it said before training.

Learning without Forgetting (Li and Hoiem 2016, arXiv 1606.09282) adds
`weight * T^2 * KL(source outputs at w0 || source outputs now)` to the loss, both softened by T. The
source head is a linear layer on features that the step computes anyway, and the outputs at w0 are
computed once per sample, so a step costs no more than before. No source data is needed.

An output that is remembered for one view of a sample is wrong for any other. Where inputs are
augmented, the outputs at w0 come from a frozen copy of the network, which sees the same views. The
copy costs a third more work per step, and the memory of the weights.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast.adapt.guards.base import Guard, Seen
from fast.curvature.card.file import fingerprint
from fast.data.dataset import Data
from fast.data.trees import leaves, length, move, pick
from fast.heads import by_sample, features_of

log = logging.getLogger("fast")

TEMPERATURE = 2.0
# The most bytes of remembered outputs.
MOST_BYTES = 2**28


def summed_kl(before: Tensor, now: Tensor) -> Tensor:
    """Sum over samples of `T^2 KL(before || now)`, in nats.

    Args:
        before, now: source outputs `[B, C]`; or `[B, C, ...]`, then averaged over positions.
    """
    target, answer = ((x.float() / TEMPERATURE).log_softmax(1) for x in (before, now))
    kl = F.kl_div(answer, target, log_target=True, reduction="none").sum(1)
    per_sample = kl.flatten(1).mean(1) if kl.dim() > 1 else kl
    return TEMPERATURE**2 * per_sample.sum()


def digest(inputs: Any) -> str:
    """Hash of one sample's inputs."""
    return " ".join(fingerprint(x) for x in leaves(inputs))


@dataclass(frozen=True, kw_only=True)
class Remembered:
    """Source outputs at w0 for M of the training samples.

    Attributes:
        rows: row numbers of these samples in the training data, `[M]`.
        outputs: `[M, C, ...]`, or `[M, T, C, ...]` where the head sees T rows per sample.
        num_samples: number of samples in the training data.
        digests: hashes of the M inputs, by which other views of a row are told apart; None where
            a row always has the same inputs.
        inputs: the training inputs, if they are in memory; else None.
    """

    rows: Tensor
    outputs: Tensor
    num_samples: int
    digests: list[str] | None = None
    inputs: Any = None


class SourceOutputs:
    """Collects what the source head says of training samples, up to `MOST_BYTES`.

    Args:
        source: the layer that makes the source's logits from features.
        data: the training data that the samples come from.
    """

    def __init__(self, source: nn.Module, data: Data) -> None:
        self._source, self._data = source, data
        self._rows: list[Tensor] = []
        self._outputs: list[Tensor] = []
        self._bytes = 0
        # A data set may show a row otherwise at a later visit; tensors in memory cannot.
        self._digests: list[str] | None = None if data.dataset is None else []

    @torch.no_grad()
    def add(self, features: Tensor, inputs: Any, index: Tensor) -> None:
        """Add a batch.

        Args:
            features: what the head sees of the batch.
            inputs: its inputs, `[B, ...]`.
            index: row numbers of its samples, `[B]`.
        """
        if self._bytes >= MOST_BYTES:
            return
        self._outputs.append(by_sample(self._source(features), len(index)))
        self._bytes += self._outputs[-1].nbytes
        self._rows.append(index)
        if self._digests is not None:
            self._digests += [digest(pick(inputs, i)) for i in range(len(index))]

    def remembered(self) -> Remembered | None:
        """All that was added, or None where nothing was."""
        if not self._outputs:
            return None
        return Remembered(
            rows=torch.cat(self._rows),
            outputs=torch.cat(self._outputs),
            num_samples=self._data.num_samples or 0,
            digests=self._digests,
            inputs=self._data.inputs,
        )


class Distillation(Guard):
    """The penalty; its micro-batch parts add up to the mean over a batch.

    Args:
        source: the layer that makes the source's logits, `[B, D] -> [B, C]`.
        weight: weight of the penalty, in units of the target loss.
        remembered: outputs at w0; with None they come from a frozen copy.
        pretrained_copy: returns a copy of the network at w0, its head and its source layer; it is
            called when the copy is first needed.
    """

    def __init__(
        self,
        *,
        source: nn.Module,
        weight: float,
        remembered: Remembered | None,
        pretrained_copy: Callable[[], tuple[nn.Module, nn.Module, nn.Module]],
    ) -> None:
        self.source, self.weight = source, weight
        self._pretrained_copy = pretrained_copy
        self._frozen: tuple[nn.Module, nn.Module, nn.Module] | None = None
        self.remembered = remembered
        if remembered is None:
            self._frozen = pretrained_copy()
        else:
            self._place = torch.full((remembered.num_samples,), -1)
            self._place[remembered.rows] = torch.arange(len(remembered.rows))

    @property
    def live(self) -> bool:
        """Whether the outputs at w0 come from a frozen copy."""
        return self.remembered is None

    def go_live(self) -> None:
        """Take the outputs at w0 from a frozen copy from now on."""
        if not self.live:
            self.remembered, self._frozen = None, self._pretrained_copy()

    def check(self, rows: Tensor, inputs: Any) -> None:
        """Go live if the inputs of these rows differ from those of the training data.

        Raises:
            ValueError: the training data have no such rows.
        """
        if self.remembered is None:
            return
        count = self.remembered.num_samples
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < count:
            raise ValueError(
                f"rows must be in 0..{count - 1}, for train has {count} samples; got "
                f"{int(rows.min())}..{int(rows.max())}. Leave rows out where they are not known"
            )
        if self.remembered.inputs is None:
            return
        seen = leaves(inputs)
        own = leaves(move(pick(self.remembered.inputs, rows.cpu()), seen[0].device))
        if not all(
            a.shape == b.shape and torch.equal(a, b) for a, b in zip(seen, own, strict=True)
        ):
            self._leave_memory()

    def _leave_memory(self) -> None:
        log.info(
            "the inputs of these rows are not those of the training data: source answers come from "
            "a frozen copy of the network from now on"
        )
        self.go_live()

    def places(self, rows: Tensor | None, inputs: Any) -> Tensor:
        """Index of each sample's outputs at w0, `[B]` on the CPU; -1 where none are remembered.

        Args:
            rows: row numbers of the batch in the training data, or None.
            inputs: inputs of the batch, as the network will see them.
        """
        if rows is None:
            self.go_live()
        if self.remembered is None:
            return torch.arange(length(inputs))
        assert rows is not None
        places = self._place[rows.cpu()]
        if self.remembered.digests is None:
            return places
        known = (places >= 0).nonzero().flatten().tolist()
        others = [i for i in known if digest(pick(inputs, i)) != self.remembered.digests[places[i]]]
        if len(others) == len(known) > 1:  # the loop shows other views than the data set
            self._leave_memory()
            return torch.arange(length(inputs))
        places[others] = -1
        return places

    def penalty(self, seen: Seen) -> Tensor | None:
        if not seen.batch.remembered or seen.features is None:
            return None
        # Every rank calls the layers, even one whose share has no answers: they may be sharded.
        rows, outputs = self._before(seen.batch.places, seen.inputs)
        # Several rows of a sample (tokens, pixels) count as one, on average.
        size = length(seen.inputs)
        positions = len(seen.features) // size
        features = by_sample(seen.features, size)[rows]
        if positions > 1:
            features, outputs = features.flatten(0, 1), outputs.flatten(0, 1)
        # In 16 bits, where the network alone runs under autocast, as Accelerate prepares it.
        now = self.source(features.to(next(self.source.parameters()).dtype))
        if isinstance(self.source, nn.Linear):  # its classes are the last dimension
            outputs, now = outputs.movedim(-1, 1), now.movedim(-1, 1)
        return self.weight * summed_kl(outputs, now) / positions / seen.batch.remembered

    def _before(self, places: Tensor, inputs: Any) -> tuple[Tensor | slice, Tensor]:
        """The rows of the micro-batch whose outputs at w0 are known, and these outputs."""
        if self.remembered is not None:
            outputs = self.remembered.outputs
            rows = (places >= 0).nonzero().squeeze(1)
            return rows.to(outputs.device), outputs[places[rows].to(outputs.device)]
        assert self._frozen is not None
        model, head, source = self._frozen
        with torch.no_grad():
            rows = by_sample(source(features_of(model, head, inputs)), length(inputs))
        return slice(None), rows

    def state_dict(self) -> dict[str, Any]:
        return {"live": self.live}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["live"]:
            self.go_live()
