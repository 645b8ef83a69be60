"""Rehearse the features of source inputs inside the batches of the target.

Each batch gives an eighth of its places to source inputs, and the loss gets

    weight * mean over samples of e^2 / (2 * TOLERANCE),  e = |f(x) - f0(x)|^2 / variance of f0

over them: f is what the head sees, f0 what it saw at the pretrained weights. It is feature
distillation (FitNets, Romero et al. 2015, arXiv 1412.6550) on replayed inputs, with e squared: the
pull is `weight * e / TOLERANCE` times that of e itself, so it is gentle where features hardly move
and hard where they run away, and one weight does for robust and for fragile networks. It grows no
further beyond `STEEPEST`, so that a step too far is not answered by a larger one.

Where e is above `TOLERANCE` all the same, the learning rate of the run is too high for this network
and is divided by as much: one rate does for ResNets, which bear 1.5e-3, and for a MobileNet or a
transformer, which do not. A step costs what it cost before; no label and no source head is needed.
docs/research.md has what was tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast.adapt.defaults import TARGET_INPUTS
from fast.adapt.guards.base import Guard, Seen, SourceBatch
from fast.data.dataset import Data
from fast.data.source_inputs import SourceInputs
from fast.data.stream import TrainBatches, row_batches
from fast.data.trees import length, move, pick
from fast.heads import by_sample, features_of
from fast.ranks import ALONE, Ranks
from fastkernels.codes import compute_dtype

SHARE = 1 / 8
# The e that is pulled back at the plain weight. At the end of a run it was 0.03-0.05 for ResNet-20
# on signs, and 0.4 for a MobileNet without norm layers.
TOLERANCE = 0.1
# The largest pull, as a multiple of that of e.
STEEPEST = 3.0
# Features that are lost have to find back: the learning rate falls by no more than this.
LEAST = 0.1
# Bytes of features that are kept: maps of a fully convolutional network are large.
FEATURE_BYTES = 2**28
CHUNK = 128
# Target inputs whose features are kept where there are no source inputs.
OWN_INPUTS = 512
# Steps over which e is averaged while it falls, and while it rises: features that run away have to
# be caught within the ramp. Against 10 for both and a look at every fifth step, on five pairs: the
# source kept 0.5 points more, the target the same.
FALL, RISE = 10, 3


def places_for(batch_size: int) -> int:
    """How many places of a batch source inputs get."""
    return max(1, round(SHARE * batch_size)) if batch_size > 1 else 0


def make_room(data: Data, size: int, seed: int, rehearsed: str) -> tuple[TrainBatches, int]:
    """Target batches, and how many places beside them rehearse.

    The places are taken from the target's, so that a step costs what it did; a user's DataLoader
    keeps its own batches, and they come on top.

    Args:
        size: samples of a step.
        rehearsed: whose features: see `fast.adapt.plan.Plan`.

    Raises:
        ValueError: batches of one sample, and source inputs to rehearse beside it.
    """
    batches = TrainBatches(data, size, seed)
    size = batches.given_size or size
    own = rehearsed == TARGET_INPUTS
    if not rehearsed or (own and (size < 2 or not _can_be_kept(batches))):
        return batches, 0
    if size < 2:
        raise ValueError(
            "batch_size must be at least 2 to rehearse features beside the target; or set "
            "rehearse=0"
        )
    places = places_for(size)
    return TrainBatches(data, size - places, seed), places


def _can_be_kept(batches: TrainBatches) -> bool:
    """Whether the inputs are tensors and nothing else: names, texts, ... cannot be put together."""
    inputs = next(batches.from_step(0))[0]
    parts = inputs.values() if isinstance(inputs, Mapping) else inputs
    return isinstance(inputs, Tensor) or all(isinstance(part, Tensor) for part in parts)


class Rehearsal(Guard):
    """Source inputs and the features they had at the pretrained weights.

    Attributes:
        restraint: factor on the learning rate, at most 1.

    Args:
        model: at the pretrained weights, answering the source task.
        head: the module whose input the features are.
        samples: source inputs.
        name: what these are called in messages.
        size: of them per step.
        weight: of the penalty, in units of the target loss.
        seed: of their order.
        ranks: that share the inputs of a step.

    Raises:
        ValueError: features that are not finite, or the same for all inputs.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        head: nn.Module,
        samples: SourceInputs,
        name: str,
        size: int,
        weight: float,
        seed: int,
        ranks: Ranks = ALONE,
    ) -> None:
        self.weight, self._ranks = weight, ranks
        device = next(model.parameters()).device
        parts: list[Tensor] = []
        for inputs, _ in samples.batches(CHUNK):
            rows = features_of(model, head, move(inputs, device))
            rows = rows.to(compute_dtype(rows))
            parts.append(by_sample(rows, length(inputs)))
            if sum(p.nbytes for p in parts) > FEATURE_BYTES:
                break
        self.features = torch.cat(parts)
        _check_features(self.features, name)
        self.moved = 0.0
        self.restraint = 1.0
        # The sum of e over the samples of this step, on the device, and their number.
        self._seen, self._count = torch.zeros((), dtype=self.features.dtype, device=device), 0
        self.scale = scale_of(self.features)
        count = len(self.features)
        self.inputs = pick(samples.inputs, slice(count))
        self._size, self._seed = size, seed
        self._rows: Iterator[Tensor] = iter(())
        self._next = -1

    def source_batch(self, step: int) -> SourceBatch | None:
        if step != self._next:
            self._rows = row_batches(len(self.features), self._size, self._seed, step)
        rows = next(self._rows)
        self._next = step + 1
        total, rows = len(rows) / self._ranks.size, rows[self._ranks.share]
        if not len(rows):
            return None
        features = self.features[rows.to(self.features.device)]
        return SourceBatch(inputs=pick(self.inputs, rows), reference=features, total=total)

    def penalty(self, seen: Seen) -> Tensor | None:
        source = seen.batch.source
        if source is None or seen.source_features is None:
            return None
        before = source.reference
        now = by_sample(seen.source_features, len(before))
        e = distances(now, before, self.scale)
        with torch.no_grad():
            self._seen += e.sum()
        self._count += len(e)
        return self.weight / TOLERANCE * pull(e, "sum") / source.total

    def lr_factor(self) -> float:
        return self.restraint

    def after_step(self, step: int) -> None:
        """Take in what the step has seen, and decide on the learning rate of the next.

        On a GPU this waits for the step: all that is lost is the time to launch the next one. A
        budget that leaves the penalty more room leaves it the learning rate too.
        """
        seen, count = self._seen, self._count
        if self._ranks.size > 1:  # all of them decide alike
            both = self._ranks.sum_(torch.stack([seen, seen.new_tensor(count)]).double())
            seen, count = both[0], int(both[1])
        if not count:
            return
        e = seen.item() / count
        self._seen.zero_()
        self._count = 0
        self.moved += (e - self.moved) / (RISE if e > self.moved else FALL)
        self.restraint = restraint(self.moved, TOLERANCE / self.strength)

    def state_dict(self) -> dict[str, Any]:
        return {"moved": self.moved, "restraint": self.restraint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.moved, self.restraint = float(state["moved"]), float(state["restraint"])


def scale_of(features: Tensor) -> Tensor:
    """One over the variance of features `[N, ...]` at the pretrained weights, `[]`."""
    # The mean over features: a constant feature would blow up a variance of its own.
    return 1 / features.var(0).mean().clamp_min(1e-12)


def distances(now: Tensor, before: Tensor, scale: Tensor) -> Tensor:
    """`e = |f - f0|^2 / variance of f0` of each sample, `[N]`.

    Args:
        now, before: features `[N, ...]`.
        scale: see `scale_of`.
    """
    return scale * (now.to(before.dtype) - before).square().flatten(1).mean(1)


def pull(e: Tensor, reduction: str) -> Tensor:
    """The penalty on distances `[N]`, times `TOLERANCE`: `e^2 / 2` up to `STEEPEST`."""
    zero = torch.zeros_like(e)
    return F.huber_loss(e, zero, reduction=reduction, delta=STEEPEST * TOLERANCE)


def restraint(moved: float, tolerance: float = TOLERANCE) -> float:
    """The factor on the learning rate where features have moved by `moved`, at most 1."""
    return max(LEAST, min(1.0, tolerance / max(moved, 1e-12)))


def _check_features(features: Tensor, name: str) -> None:
    """Raise ValueError where features `[N, ...]` of the inputs `name` give nothing to rehearse."""
    if not features.isfinite().all():
        raise ValueError(
            f"{name}: the network gives the inputs features that are not finite (NaN or infinite)"
        )
    # Rehearsal measures by their variance, which must be more than rounding.
    if not features.var(0).mean() > 1e-10 * features.square().mean():
        raise ValueError(
            f"{name}: the network gives all {len(features)} inputs the same features; give inputs "
            "that differ, or set rehearse=0"
        )
