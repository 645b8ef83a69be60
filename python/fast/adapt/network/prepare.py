"""Before the first step: the new head, calibrated and taught, and what the source head says."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fast.adapt.guards.distill import Distillation, Remembered, digest
from fast.adapt.guards.rehearse import Rehearsal
from fast.adapt.loss import Loss
from fast.adapt.methods import METHODS
from fast.adapt.network.adapted import AdaptedNetwork
from fast.adapt.network.head_start import start_head
from fast.adapt.network.shared_forward import cuts_at_head, depends_on_mode
from fast.adapt.plan import Plan
from fast.adapt.setup import Setup
from fast.data.finite import check_finite_inputs
from fast.data.labels import check_labels
from fast.data.source_inputs import SourceInputs
from fast.data.stream import TrainBatches
from fast.data.trees import move, pick
from fast.heads import (
    add_adapters,
    by_sample,
    calibrate_from,
    estimate_statistics,
    features_of,
    folds_positions,
    has_batch_norm,
    own_parameters,
    set_batch_norm,
    source_task,
    task_head,
)
from fast.ranks import Ranks

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
    network: AdaptedNetwork,
    batches: TrainBatches,
    *,
    plan: Plan,
    remembers: bool,
    calibrates: bool,
) -> FirstPass:
    """Features of training inputs, which set the statistics of the normaliser; source outputs.

    Args:
        remembers: what the source head says holds for later visits of the same rows.
        calibrates: set the statistics.
    """
    model, device = network.model, network.device
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
        x = features_of(model, network.head, move(inputs, device))
        # A normaliser needs 1024 samples; a head that starts on them takes what there is.
        if seen < CALIBRATION_SAMPLES or plan.head_steps:
            features.append(x)
            labels.append(y)
        if remembers and index is not None and size < DISTILL_BYTES:
            with torch.no_grad():
                outputs.append(by_sample(network.source(x), len(y)))
            rows.append(index)
            if digests is not None:
                digests += [digest(pick(inputs, i)) for i in range(len(y))]
            size += outputs[-1].nbytes
        seen += len(y)
    if network.norm is not None and calibrates:
        calibrate_from(network.norm, features)
    remembered = None
    if outputs:
        remembered = Remembered(
            rows=torch.cat(rows),
            outputs=torch.cat(outputs),
            num_samples=batches.data.num_samples or 0,
            digests=digests,
            inputs=batches.data.inputs,
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
    if batches.data.has_views:
        return False
    if batches.data.dataset is None:
        return batches.data.loader is None
    inputs, _, index = next(batches.from_step(0))
    assert index is not None
    return digest(inputs) == digest(batches.data.batch_at(index)[0])


def check_backbone(network: AdaptedNetwork, method: str) -> None:
    """Say that only the head can learn; and refuse to replay where nothing else moves."""
    model = network.model
    own = {id(p) for p in own_parameters(model, network.learns)}
    if any(p.requires_grad and id(p) not in own for p in model.parameters()):
        return
    message = "no parameter of the backbone is trainable (requires_grad)"
    if METHODS[method].replay:
        raise ValueError(
            f"{message}: there is nothing for method {method!r} to hold. Unfreeze some, or use "
            "'vanilla'"
        )
    warnings.warn(f"{message}: only the head is trained", stacklevel=6)


def rehearsal(
    network: AdaptedNetwork, setup: Setup, samples: SourceInputs, seed: int, ranks: Ranks
) -> Rehearsal:
    """The guard that keeps the features of these inputs, at the pretrained weights."""
    with source_task(network.model):
        return Rehearsal(
            model=network.model,
            head=network.head,
            samples=samples,
            name="train" if setup.own is not None else "source_inputs",
            size=setup.plan.source_size,
            weight=setup.plan.rehearse,
            seed=seed,
            ranks=ranks,
        )


def runs_apart(network: AdaptedNetwork, setup: Setup, samples: SourceInputs, folded: bool) -> bool:
    """Whether rehearsed inputs need a forward pass of their own.

    Args:
        folded: the head sees several rows of a sample.
    """
    model, head = network.model, network.head
    few = move(samples.part(0, 8).inputs, network.device)
    return (
        (setup.plan.batch_norm == "per_task" and has_batch_norm(model))
        or folded
        or depends_on_mode(model, head, few)
        or not cuts_at_head(model, head, setup.sample, few)
    )


def prepare(
    network: AdaptedNetwork,
    setup: Setup,
    *,
    samples: SourceInputs | None,
    loss: Callable[[Tensor, Tensor], Tensor],
    augmented: bool,
    resuming: bool,
    seed: int,
    ranks: Ranks,
) -> tuple[Distillation | None, Rehearsal | None]:
    """Calibrate the head and teach it; remember what the network computes.

    One pass over training inputs gives the normaliser's statistics, the source outputs, and the
    features that the head starts on.

    Args:
        samples: source inputs to rehearse, or None.
        loss: that teaches the head.
        augmented, resuming, seed, ranks: see `fast.Adaptation`.

    Returns:
        the guards that hold the function.
    """
    plan, model, batches = setup.plan, network.model, setup.batches
    check_backbone(network, plan.method)
    set_batch_norm(model, plan.batch_norm)
    if plan.batch_norm == "per_task" and not resuming:
        calibrate_batch_norm(model, batches)
    if plan.adapter_rank:
        add_adapters(model, network.head, plan.adapter_rank, setup.sample)
    rehearsed = setup.own if setup.own is not None else samples
    if not plan.source_size:
        rehearsed = None
    holds = bool(plan.distill) or rehearsed is not None
    folded = holds and folds_positions(model, network.head, setup.sample)
    remembers = bool(plan.distill) and not augmented and same_at_each_visit(batches)
    first: FirstPass | None = None
    if remembers or not resuming:
        first = first_pass(
            network, batches, plan=plan, remembers=remembers, calibrates=not resuming
        )
    if network.norm is not None:
        network.norm.deferred = True
    head = task_head(model)
    if plan.head_steps and head is not None and first is not None and not resuming:
        labels = first.labels
        if isinstance(loss, Loss):
            labels = check_labels(labels, setup.num_classes, "train")
        labels = labels.to(network.device)
        start_head(head, first.features, labels, loss=loss, steps=plan.head_steps, seed=seed)
    keeps = None if rehearsed is None else rehearsal(network, setup, rehearsed, seed, ranks)
    apart = rehearsed is not None and runs_apart(network, setup, rehearsed, folded)
    distillation = None
    if plan.distill:
        distillation = Distillation(
            source=network.source,
            weight=plan.distill,
            remembered=first.remembered if first is not None else None,
            pretrained_copy=network.pretrained_copy,
        )
    if distillation is not None or keeps is not None:
        network.watch(apart)
    return distillation, keeps
