"""Before the first step: the new head, calibrated and taught, and what the source head says."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fast.adapt.guards.distill import Remembered, digest
from fast.adapt.plan import Plan
from fast.data.finite import check_finite_inputs
from fast.data.stream import TrainBatches
from fast.data.trees import move, pick
from fast.heads import by_sample, calibrate_from, estimate_statistics, features_of
from fast.heads.feature_norm import FeatureNorm

# Features of this many training samples set the normaliser's first statistics: the standard error
# of a mean is then 3 % of a standard deviation, at the cost of a few forward passes.
CALIBRATION_SAMPLES = 1024
# Source outputs at w0 are computed for at most this share of the samples that the run will see: a
# forward pass is a third of a step, so that is 5 % of the run. Calibration samples come anyway.
DISTILL_SHARE = 0.15
DISTILL_BYTES = 2**28


@dataclass(frozen=True, kw_only=True)
class FirstPass:
    """What a pass over training inputs at the pretrained weights gave.

    Attributes:
        features: what the head saw of the first samples, `[N, D]`.
        labels: of these, `[N, ...]`.
        remembered: source outputs for distillation, or None.
    """

    features: Tensor
    labels: Tensor
    remembered: Remembered | None


def first_pass(
    model: nn.Module,
    head: nn.Module,
    source: nn.Module,
    norm: FeatureNorm | None,
    batches: TrainBatches,
    *,
    plan: Plan,
    remembers: bool,
) -> FirstPass:
    """Features of training inputs, which set the statistics of `norm`, and source outputs.

    Args:
        head: the module whose input the features are.
        source: gives the source's logits of them.
        remembers: what the source head says holds for later visits of the same rows.
    """
    device = next(model.parameters()).device
    wanted = CALIBRATION_SAMPLES if plan.max_entropy or plan.head_steps else 0
    if remembers:
        wanted = max(wanted, int(DISTILL_SHARE * plan.steps * batches.batch_size))
    features: list[Tensor] = []
    labels: list[Tensor] = []
    rows: list[Tensor] = []
    outputs: list[Tensor] = []
    digests: list[str] | None = None if batches.data.dataset is None else []
    seen = size = 0
    for inputs, y, index in batches.once():
        if seen >= wanted:
            break
        if batches.data.inputs is None:
            check_finite_inputs(inputs, "train", index)
        x = features_of(model, head, move(inputs, device))
        # A normaliser needs 1024 samples; a head that starts on them takes what there is.
        if seen < CALIBRATION_SAMPLES or plan.head_steps:
            features.append(x)
            labels.append(y)
        if remembers and index is not None and size < DISTILL_BYTES:
            with torch.no_grad():
                outputs.append(by_sample(source(x), len(y)))
            rows.append(index)
            if digests is not None:
                digests += [digest(pick(inputs, i)) for i in range(len(y))]
            size += outputs[-1].nbytes
        seen += len(y)
    if norm is not None:
        calibrate_from(norm, features)
    remembered = None
    if outputs:
        remembered = Remembered(
            rows=torch.cat(rows),
            outputs=torch.cat(outputs),
            num_samples=batches.data.num_samples or 0,
            digests=digests,
        )
    return FirstPass(
        features=torch.cat(features) if features else torch.empty(0, device=device),
        labels=torch.cat(labels) if labels else torch.empty(0, dtype=torch.int64),
        remembered=remembered,
    )


def calibrate_batch_norm(model: nn.Module, batches: TrainBatches) -> None:
    """Give per-task batch norms the statistics of the target.

    Normaliser and head then start on the features that the target will have.
    """
    device = next(model.parameters()).device

    def inputs() -> Iterator[object]:
        seen = 0
        for x, labels, _ in batches.once():
            yield move(x, device)
            seen += len(labels)
            if seen >= CALIBRATION_SAMPLES:
                return

    estimate_statistics(model, inputs())


def same_at_each_visit(batches: TrainBatches) -> bool:
    """Whether a row of the training data has the same inputs whenever it is read, by its number.

    The first batch of a data set tells, read twice: one that augments shows other views.
    """
    if batches.data.dataset is None:
        return batches.data.loader is None
    inputs, _, index = next(batches.from_step(0))
    assert index is not None
    return digest(inputs) == digest(batches.data.batch_at(index)[0])


def check_backbone(model: nn.Module, own: list[nn.Parameter], replays: bool, method: str) -> None:
    """Say that only the head can learn; and refuse to hold what does not move.

    Args:
        own: parameters of the head.
        replays: the method trains on source inputs.
    """
    ids = {id(p) for p in own}
    if any(p.requires_grad and id(p) not in ids for p in model.parameters()):
        return
    told = "no parameter of the backbone is trainable (requires_grad)"
    if replays:
        raise ValueError(
            f"{told}: there is nothing for method {method!r} to hold. Unfreeze some, or use "
            "'vanilla'"
        )
    warnings.warn(f"{told}: only the head is trained", stacklevel=6)


Loss = Callable[[Tensor, Tensor], Tensor]
