"""Rehearse the features of source inputs inside the batches of the target.

Each batch gives an eighth of its places or more to source inputs x, and the loss gets the penalty

    weight * mean over x of e^2 / (2 * TOLERANCE),  e = |f(x) - f0(x)|^2 / variance of f0

where f is what the head sees, and f0 what it saw at the pretrained weights. This is feature
distillation (FitNets, Romero et al. 2015, arXiv 1412.6550) on replayed inputs, with e squared: the
gradient is `weight * e / TOLERANCE` times that of e itself, so it is gentle where features hardly
move and hard where they run away, and one weight suits robust and fragile networks. It stops
growing at `STEEPEST`, so that a step too far is not answered by an even larger one.

If e exceeds `TOLERANCE` all the same, the learning rate is too high for this network, and is
divided by e / TOLERANCE. Features that are held less may move more, by up to `LOOSEST`. So one rate
suits ResNets, which tolerate 1.5e-3, and MobileNets and transformers, which do not. Where a network
bears far less, features are lost before that tells: `fast.adapt.guards.pace` measures the first
step. A step costs what it cost before, and needs neither labels nor a source head. docs/research.md
reports what else was tried.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast.adapt.defaults import (
    SHUFFLED,
    SOURCE_SHARE,
    TARGET_INPUTS,
    own_beside_shuffled,
    source_share,
)
from fast.adapt.guards.base import Guard, Seen, SourceBatch
from fast.data.dataset import Data
from fast.data.images.patches import are_pictures, shuffled_patches
from fast.data.source_inputs import BYTES, LEAST, SourceInputs, target_inputs
from fast.data.stream import StepRows, TrainBatches
from fast.data.trees import concatenate, leaves, length, move, pick
from fast.heads import by_sample, features_of
from fast.ranks import ALONE, Ranks
from fastkernels.codes import compute_dtype

# The e at which the gradient has the plain weight. At the end of a run e was 0.03-0.05 for
# ResNet-20 on signs, and 0.4 for a MobileNet without norm layers.
TOLERANCE = 0.1
# The most that a weight below 1 multiplies the tolerance by. At 10, as a weight of 0.1 asks for, a
# MobileNet that rehearsed source inputs with 60 pictures of waste lost 20 points, and at 2 it lost
# 1; ResNets learned 0.7 points less at 2.
LOOSEST = 2.0
# The largest gradient, as a multiple of that of e.
STEEPEST = 3.0
# The least factor on the learning rate: features that are lost need some rate to find back.
LEAST_RATE = 0.1
# The most bytes of features to keep: maps of a fully convolutional network are large.
FEATURE_BYTES = 2**28
CHUNK = 128
# Target inputs whose features are kept where there are no source inputs. Of pictures half as many
# have their patches shuffled.
OWN_INPUTS = 512
# Steps over which e is averaged while it falls, and while it rises: features that run away have to
# be caught within the ramp. On five pairs the source kept 0.5 points more than with 10 for both and
# a look at every fifth step, and the target learned the same.
FALL, RISE = 10, 3


def places_for(batch_size: int, share: float) -> int:
    """How many places of a batch source inputs get."""
    return max(1, round(share * batch_size)) if batch_size > 1 else 0


def make_room(data: Data, size: int, seed: int, rehearsed: str) -> tuple[TrainBatches, int, str]:
    """Target batches, how many places beside them rehearse, and what (see `Plan.rehearsed`).

    Target batches shrink by these places, so that a step costs what it did. A user's DataLoader
    keeps its own batches, and the places come on top.

    Args:
        size: samples per step.
        rehearsed: source or target inputs, or `""` for none.

    Raises:
        ValueError: a batch of one sample leaves no place for the source inputs.
    """
    batches = TrainBatches(data, size, seed)
    size = batches.given_size or size
    if rehearsed == TARGET_INPUTS:
        rehearsed = _own_kind(batches) if size > 1 else ""
    if not rehearsed:
        return batches, 0, ""
    if size < 2:
        raise ValueError(
            "batch_size must be at least 2 to rehearse features beside the target; or set "
            "rehearse=0"
        )
    fixed = rehearsed == TARGET_INPUTS or batches.given_size is not None
    places = places_for(size, SOURCE_SHARE if fixed else source_share(data.num_samples))
    return TrainBatches(data, size - places, seed), places, rehearsed


def _own_kind(batches: TrainBatches) -> str:
    """What of the target's inputs is rehearsed: pictures with their patches shuffled; all others as
    they are, if they are tensors, since names, texts and the like cannot be stacked."""
    inputs = next(batches.from_step(0))[0]
    parts = inputs.values() if isinstance(inputs, Mapping) else inputs
    if not (isinstance(inputs, Tensor) or all(isinstance(part, Tensor) for part in parts)):
        return ""
    return SHUFFLED if are_pictures(inputs) else TARGET_INPUTS


def own_inputs(batches: TrainBatches, most: int, shuffles: bool) -> SourceInputs | None:
    """Target inputs to rehearse, at most `OWN_INPUTS`; None where there are too few of one shape
    to say how much features vary.

    Args:
        shuffles: half of them, or more where there are few samples, get their patches shuffled.
    """
    most = min(OWN_INPUTS, most)
    own = target_inputs(batches, most)
    if own.size < LEAST:
        return None
    if not shuffles:
        return own
    generator = torch.Generator().manual_seed(batches.seed)
    fit = BYTES * own.size // sum(x.nbytes for x in leaves(own.inputs))
    count = max(LEAST, min(most, fit) // 2)
    made = shuffled_patches(own.inputs, count, generator)
    as_they_are = own_beside_shuffled(count, batches.data.num_samples)
    inputs = concatenate([made, pick(own.inputs, slice(as_they_are))])
    order = torch.randperm(length(inputs), generator=generator)
    return SourceInputs(inputs=pick(inputs, order))


class Rehearsal(Guard):
    """Source inputs and the features they had at the pretrained weights.

    Args:
        model: the network at its pretrained weights, answering the source task.
        head: the module whose input the features are.
        samples: source inputs.
        name: what these are called in messages.
        size: source inputs per step.
        weight: weight of the penalty, in units of the target loss.
        seed: seed of their order.
        ranks: processes that share the inputs of a step.

    Attributes:
        moved: running average of e.
        restraint: factor on the learning rate, at most 1.

    Raises:
        ValueError: features are not finite, or are the same for all inputs.
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
        self._rows = StepRows(count, size, seed)

    def source_batch(self, step: int) -> SourceBatch | None:
        rows = self._rows.at(step)
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
        """Average in what the step has seen, and decide on the learning rate of the next step.

        On a GPU this waits for the step to end, which costs the time of launching the next one.
        A budget that weakens the penalty raises the tolerance by as much.
        """
        seen, count = self._seen, self._count
        if self._ranks.size > 1:  # so that all of them decide alike
            both = self._ranks.sum_(torch.stack([seen, seen.new_tensor(count)]).double())
            seen, count = both[0], int(both[1])
        if not count:
            return
        e = seen.item() / count
        self._seen.zero_()
        self._count = 0
        if not math.isfinite(e):  # an overflow, whose step a gradient scaler skips
            return
        self.moved += (e - self.moved) / (RISE if e > self.moved else FALL)
        tolerance = TOLERANCE * min(LOOSEST, max(1.0, 1 / self.weight))
        self.restraint = restraint(self.moved, tolerance / self.strength)

    def state_dict(self) -> dict[str, Any]:
        return {"moved": self.moved, "restraint": self.restraint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.moved, self.restraint = float(state["moved"]), float(state["restraint"])


def scale_of(features: Tensor) -> Tensor:
    """One over the variance of features `[N, ...]` at the pretrained weights, `[]`."""
    # The variance is averaged over features: a constant feature alone would divide by zero.
    return 1 / features.var(0).mean().clamp_min(1e-12)


def distances(now: Tensor, before: Tensor, scale: Tensor) -> Tensor:
    """`e = |f - f0|^2 / variance of f0` of each sample, `[N]`.

    Args:
        now, before: features `[N, ...]`.
        scale: see `scale_of`.
    """
    return scale * (now.to(before.dtype) - before).square().flatten(1).mean(1)


def pull(e: Tensor, reduction: str) -> Tensor:
    """The penalty on distances `[N]`, times `TOLERANCE`: `e^2 / 2`, then linear (`STEEPEST`)."""
    zero = torch.zeros_like(e)
    return F.huber_loss(e, zero, reduction=reduction, delta=STEEPEST * TOLERANCE)


def restraint(moved: float, tolerance: float = TOLERANCE) -> float:
    """The factor on the learning rate where features have moved by `moved`, at most 1."""
    return max(LEAST_RATE, min(1.0, tolerance / max(moved, 1e-12)))


def _check_features(features: Tensor, name: str) -> None:
    """Raise ValueError where features `[N, ...]` of the inputs `name` cannot be rehearsed."""
    if not features.isfinite().all():
        raise ValueError(
            f"{name}: the network gives the inputs features that are not finite (NaN or infinite)"
        )
    # Rehearsal divides by their variance, which must be more than rounding.
    if not features.var(0).mean() > 1e-10 * features.square().mean():
        raise ValueError(
            f"{name}: the network gives all {len(features)} inputs the same features; give inputs "
            "that differ, or set rehearse=0"
        )
