"""Before the first step: calibrate and teach the new head, and record what the source head says."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fast.adapt.guards.base import Guard
from fast.adapt.guards.distill import Distillation, Remembered, SourceOutputs, digest
from fast.adapt.guards.pace import MEASURED, Pace, farthest
from fast.adapt.guards.rehearse import Rehearsal, scale_of
from fast.adapt.loss import Loss, TargetLoss
from fast.adapt.methods import METHODS
from fast.adapt.network.adapted import AdaptedNetwork
from fast.adapt.network.head_start import check_loss, start_head
from fast.adapt.network.noise import DROWNED, added_by_dropout, dropout_shares
from fast.adapt.network.shared_forward import cuts_at_head, depends_on_mode
from fast.adapt.setup import Setup
from fast.data.finite import check_finite_inputs
from fast.data.labels import check_labels
from fast.data.source_inputs import SourceInputs
from fast.data.stream import TrainBatches
from fast.data.trees import length, move, pick
from fast.errors import warn
from fast.heads import (
    add_adapters,
    by_sample,
    calibrate_from,
    check_rows,
    classes_of,
    estimate_statistics,
    features_of,
    has_batch_norm,
    own_parameters,
    set_batch_norm,
    source_task,
    task_head,
)
from fastkernels.codes import compute_dtype

log = logging.getLogger("fast")
steps_log = logging.getLogger("fast.steps")

# This many training samples set the normaliser's first statistics: the standard error of a mean is
# then 3 % of a standard deviation, at the cost of a few forward passes.
CALIBRATION_SAMPLES = 1024
# Source outputs at w0 are computed for at most this share of the samples that the run will see. A
# forward pass is a third of a step, so this takes 5 % of the run; calibration samples are free.
DISTILL_SHARE = 0.15


@dataclass(frozen=True, kw_only=True)
class FirstPass:
    """What a pass over training inputs at the pretrained weights gave.

    Attributes:
        features: what the head saw of the first samples, `[N, D]`.
        labels: the labels of these samples, `[N, ...]`.
        remembered: source outputs for distillation, or None.
    """

    features: Tensor
    labels: Tensor
    remembered: Remembered | None


def first_pass(
    network: AdaptedNetwork, setup: Setup, *, remembers: bool, calibrates: bool
) -> FirstPass:
    """Run training inputs once: their features set the statistics of the normaliser.

    Args:
        remembers: keep the source outputs, which hold for later visits of the same rows.
        calibrates: set the statistics.
    """
    model, device, plan, batches = network.model, network.device, setup.plan, setup.batches
    wanted = CALIBRATION_SAMPLES if plan.max_entropy or plan.head_steps else 0
    if remembers:
        wanted = max(wanted, int(DISTILL_SHARE * plan.steps * batches.batch_size))
    features: list[Tensor] = []
    labels: list[Tensor] = []
    outputs = SourceOutputs(network.source, batches.data)
    seen = 0
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
        if remembers and index is not None:
            outputs.add(x, inputs, index)
        seen += len(y)
    if network.norm is not None and calibrates:
        calibrate_from(network.norm, features)
    return FirstPass(
        features=torch.cat(features) if features else torch.empty(0, device=device),
        labels=torch.cat(labels) if labels else torch.empty(0, dtype=torch.int64),
        remembered=outputs.remembered(),
    )


def calibrate_batch_norm(model: nn.Module, batches: TrainBatches) -> None:
    """Give per-task batch norms the statistics of the target, whose features the head starts on."""
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
    """Whether a row of the training data has the same inputs whenever it is read by its number.

    A data set shows this by its first batch, read twice: one that augments gives other views.
    """
    if batches.data.has_views:
        return False
    if batches.data.dataset is None:
        return batches.data.loader is None
    inputs, _, index = next(batches.from_step(0))
    assert index is not None
    return digest(inputs) == digest(batches.data.batch_at(index)[0])


def check_backbone(network: AdaptedNetwork, method: str) -> None:
    """Warn where only the head can learn.

    Raises:
        ValueError: and the method replays source inputs, which hold what then does not move.
    """
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
    warn(f"{message}: only the head is trained")


def distillation(
    network: AdaptedNetwork, setup: Setup, first: FirstPass | None, *, alone: bool
) -> Distillation:
    """The guard that keeps what the source head says of target inputs.

    Args:
        first: has the outputs that are remembered; without any they come from a frozen copy.
        alone: no other guard holds the network's function.
    """
    if alone and classes_of(network.source) == 1:
        warn(
            "distill: the source head has one output, of which a softmax is always sure, so that "
            "nothing holds the source: rehearse= keeps the features"
        )
    return Distillation(
        source=network.source,
        weight=setup.plan.distill,
        remembered=None if first is None else first.remembered,
        pretrained_copy=network.pretrained_copy,
    )


def rehearsal(network: AdaptedNetwork, setup: Setup, samples: SourceInputs) -> list[Guard]:
    """The guards that keep the features which these inputs have at the pretrained weights."""
    plan = setup.plan
    with source_task(network.model):
        guard = Rehearsal(
            model=network.model,
            head=network.head,
            samples=samples,
            name="train" if setup.own is not None else "source_inputs",
            size=plan.source_size,
            weight=plan.rehearse,
            seed=setup.config.seed,
            ranks=setup.ranks,
        )
    pace = Pace(
        model=network.model,
        head=network.head,
        inputs=move(pick(guard.inputs, slice(MEASURED)), network.device),
        scale=guard.scale,
        task=source_task,
        farthest=farthest(network.model, "weights"),
        ranks=setup.ranks,
        ramp=plan.ramp_factor,
    )
    return [guard, pace]


def pace_of_adapters(network: AdaptedNetwork, setup: Setup) -> Pace:
    """The guard that measures the first step of adapters by features of target inputs."""
    model, head, sample = network.model, network.head, setup.sample
    features = by_sample(features_of(model, head, sample), length(sample))
    features = features.to(compute_dtype(features))
    return Pace(
        model=model,
        head=head,
        inputs=pick(sample, slice(MEASURED)),
        scale=scale_of(features),
        task=nullcontext,
        farthest=farthest(model, "adapters"),
        ranks=setup.ranks,
        ramp=setup.plan.ramp_factor,
    )


def runs_apart(network: AdaptedNetwork, setup: Setup, samples: SourceInputs) -> bool:
    """Whether rehearsed inputs need a forward pass of their own."""
    model, head = network.model, network.head
    few = move(samples.part(0, 8).inputs, network.device)
    return (
        (setup.plan.batch_norm == "per_task" and has_batch_norm(model))
        or depends_on_mode(model, head, few)
        or not cuts_at_head(model, head, setup.sample, few)
    )


def settle_dropout(network: AdaptedNetwork, setup: Setup) -> None:
    """Switch dropout off if the user says so, or if nothing is said and it drowns the features."""
    model, sample, wanted = network.model, setup.sample, setup.config.dropout
    if wanted or not dropout_shares(model):
        return
    if wanted is None:
        # Without a normaliser nothing is scaled up; `track` has other statistics in training.
        if network.norm is None or setup.plan.batch_norm == "track" or length(sample) < 2:
            return
        added = added_by_dropout(model, network.head, sample)
        if added <= DROWNED:
            return
        log.info(
            "dropout is off during this run: it adds %.1f times the variance between training "
            "inputs to what the head sees; dropout=True keeps it",
            added,
        )
    network.switch_dropout_off()


def set_norms_and_adapters(network: AdaptedNetwork, setup: Setup, *, resuming: bool) -> None:
    """Give the backbone the batch norms and adapters of the plan."""
    plan, model = setup.plan, network.model
    set_batch_norm(model, plan.batch_norm)
    if plan.batch_norm == "per_task" and not resuming:
        calibrate_batch_norm(model, setup.batches)
    if plan.adapter_rank:
        add_adapters(model, network.head, plan.adapter_rank, setup.sample)


def teach_head(network: AdaptedNetwork, setup: Setup, first: FirstPass, loss: Loss) -> None:
    """Take the head's own steps, where the plan has any."""
    head, steps, seed = task_head(network.model), setup.plan.head_steps, setup.config.seed
    if not steps or head is None:
        return
    labels = first.labels
    if isinstance(loss, TargetLoss):
        labels = check_labels(labels, setup.num_classes, "train").to(network.device)
    else:
        labels = labels.to(network.device)
        check_loss(loss, head, first.features[:2], labels[:2])
    start_head(head, first.features, labels, loss=loss, steps=steps, seed=seed)


def prepare_network(
    model: nn.Module,
    setup: Setup,
    samples: SourceInputs | None,
    *,
    loss: Loss,
    augmented: bool,
    resuming: bool,
) -> tuple[AdaptedNetwork, list[Guard]]:
    """Give the network its head, calibrate and teach it; remember what the network computes.

    One pass over training inputs gives the normaliser's statistics, the source outputs, and the
    features that the head starts on.

    Args:
        model: pretrained; it is changed in place.
        samples: source inputs to rehearse, or None.
        loss: teaches the head.
        augmented, resuming: see `fast.Adaptation`.

    Returns:
        the network, and the guards that hold its function.
    """
    plan, config = setup.plan, setup.config
    network = AdaptedNetwork(
        model,
        None if config.keeps_head else setup.num_classes,
        sample=setup.sample,
        max_entropy=plan.max_entropy,
        head_name=config.head_name,
    )
    check_backbone(network, plan.method)
    rehearsed = None
    if plan.source_size:
        rehearsed = samples if setup.own is None else setup.own
    # A run that resumes skips some of the passes below, and a network that draws noise by itself
    # would give other features after them.
    holding = [] if rehearsed is None else rehearsal(network, setup, rehearsed)
    set_norms_and_adapters(network, setup, resuming=resuming)
    settle_dropout(network, setup)
    if plan.distill or rehearsed is not None:
        check_rows(model, network.head, setup.sample)
    remembers = bool(plan.distill) and not augmented and same_at_each_visit(setup.batches)
    first = None
    if plan.head_steps and not resuming:
        steps_log.info("head start: the features of training samples, and a head on them")
    if remembers or not resuming:
        first = first_pass(network, setup, remembers=remembers, calibrates=not resuming)
    if network.norm is not None:
        network.norm.defer()
        if plan.head_decay > plan.weight_decay:
            # Tracked statistics would take back the growth of features that the decay asks for.
            network.norm.freeze()
    if first is not None and not resuming:
        teach_head(network, setup, first, loss)
    guards: list[Guard] = []
    if plan.distill:
        guards.append(distillation(network, setup, first, alone=rehearsed is None))
    guards += holding
    if guards:
        network.watch(rehearsed is not None and runs_apart(network, setup, rehearsed))
    if plan.adapter_rank:
        guards.append(pace_of_adapters(network, setup))
    return network, guards
