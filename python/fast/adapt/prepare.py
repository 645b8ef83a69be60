"""Before the first step: the new head, calibrated; what the source head says; the optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fast.adapt.config import TrainConfig
from fast.adapt.guards.distill import CachedDistillation, Distillation, LiveDistillation, digest
from fast.adapt.guards.rehearse import Rehearsal, depends_on_mode, places_for
from fast.adapt.head_start import start_head
from fast.adapt.job import Job
from fast.adapt.methods import METHODS, Plan
from fast.adapt.shared_forward import FunctionPull, cuts_at_head
from fast.curvature.card import SourceCard
from fast.data.finite import check_finite_inputs
from fast.data.labels import check_labels
from fast.data.stream import TrainBatches
from fast.data.trees import move, pick
from fast.heads import (
    TaskHead,
    by_sample,
    calibrate_from,
    estimate_statistics,
    features_of,
    folds_positions,
    has_batch_norm,
    replace_head,
    set_batch_norm,
    source_task,
    task_head,
)
from fast.optim import SGD, AdamW
from fast.optim.param_groups import param_groups

# Features of this many training samples set the normaliser's first statistics: the standard error
# of a mean is then 3 % of a standard deviation, at the cost of a few forward passes.
CALIBRATION_SAMPLES = 1024
# Source outputs at w0 are computed for at most this share of the samples that the run will see: a
# forward pass is a third of a step, so that is 5 % of the run. Calibration samples come anyway.
DISTILL_SHARE = 0.15
DISTILL_BYTES = 2**28


def prepare_model(job: Job) -> FunctionPull | None:
    """Replace the head and calibrate it on target inputs, in place (`fast.adapt.undo` undoes it).

    One pass over training inputs gives the normaliser's statistics, the source outputs, and the
    features that the head starts on.

    Returns:
        the penalty of leaving what the network computes, or None where the plan has none.

    Raises:
        ValueError: the network or the inputs do not fit what was asked for.
    """
    config, plan, model, batches = job.config, job.plan, job.model, job.batches
    replace_head(
        model,
        job.num_classes,
        sample=job.sample,
        max_entropy=plan.max_entropy,
        head=config.head,
    )
    head = task_head(model)
    assert head is not None
    _check_backbone(model, head, config.method)
    set_batch_norm(model, plan.batch_norm)
    if plan.batch_norm == "per_task":
        # Normaliser and head start on the features that the target will have.
        estimate_statistics(model, _first_inputs(batches, next(model.parameters()).device))
    asked = plan.distill or job.rehearsed is not None
    folded = bool(asked) and folds_positions(model, head, job.sample)
    remembers = bool(plan.distill) and not job.transforms and _same_at_each_visit(batches)
    pass_ = _calibrated(model, head, batches, plan, job.steps, remembers)
    if plan.head_steps:
        labels = check_labels(pass_.labels, job.num_classes, "train").to(pass_.features.device)
        start_head(head, pass_.features, labels, job.loss, plan.head_steps, config.seed)
    rehearsal = _rehearsal(job, head, folded)
    distillation = _distillation(model, head, batches, plan, pass_)
    if distillation is None and rehearsal is None:
        return None
    return FunctionPull(head, distillation, rehearsal)


def _check_backbone(model: nn.Module, head: TaskHead, method: str) -> None:
    """Say that only the head can learn; and refuse to hold what does not move."""
    own = {id(p) for p in head.linear.parameters()}
    if any(p.requires_grad and id(p) not in own for p in model.parameters()):
        return
    told = "no parameter of the backbone is trainable (requires_grad)"
    if METHODS[method].replay:
        raise ValueError(
            f"{told}: there is nothing for method {method!r} to hold. Unfreeze some, or use "
            "'vanilla'"
        )
    warnings.warn(f"{told}: only the head is trained", stacklevel=6)


def _rehearsal(job: Job, head: TaskHead, folded: bool) -> Rehearsal | None:
    """None without source inputs. `folded`: the head sees several rows of a sample."""
    model, samples = job.model, job.rehearsed
    if samples is None:
        return None
    size = places_for(job.batch_size)
    with source_task(model):
        made = Rehearsal(model, head, samples, size, job.plan.rehearse, job.config.seed)
    _check_features(
        made.features, "train" if job.plan.rehearsed == "target inputs" else "source_inputs"
    )
    few = move(samples.part(0, 8).inputs, next(model.parameters()).device)
    made.apart = (
        (job.plan.batch_norm == "per_task" and has_batch_norm(model))
        or folded
        or depends_on_mode(model, few)
        or not cuts_at_head(model, head, job.sample, few)
    )
    return made


@dataclass(frozen=True)
class Pass:
    """What a pass over training inputs at w0 gave, sample by sample.

    Attributes:
        features: what the head sees, of the first ones.
        labels: of these, `[N]`.
        index, outputs: rows of the training data and what the source head says about them.
        digests: of the inputs of these rows, where they may be others at the next visit.
    """

    features: Tensor
    labels: Tensor
    index: Tensor | None
    outputs: Tensor | None
    digests: list[str] | None


def _first_inputs(batches: TrainBatches, device: torch.device) -> Iterator[Any]:
    """Batches of about `CALIBRATION_SAMPLES` training inputs, on the device."""
    seen = 0
    for inputs, labels, _ in batches.once():
        yield move(inputs, device)
        seen += len(labels)
        if seen >= CALIBRATION_SAMPLES:
            return


def _same_at_each_visit(batches: TrainBatches) -> bool:
    """Whether a row of the training data has the same inputs whenever it is read, by its number.

    Of a data set, the first batch tells, read twice: one that augments shows other views.
    """
    if batches.data.dataset is None:
        return batches.data.loader is None
    inputs, _, index = next(batches.from_step(0))
    assert index is not None
    return digest(inputs) == digest(batches.data.batch_at(index)[0])


def _calibrated(
    model: nn.Module,
    head: TaskHead,
    batches: TrainBatches,
    plan: Plan,
    steps: int,
    remembers: bool,
) -> Pass:
    """`remembers`: what the source head says holds for later visits of the same rows."""
    device = next(model.parameters()).device
    wanted = CALIBRATION_SAMPLES if plan.max_entropy or plan.head_steps else 0
    if remembers:
        wanted = max(wanted, int(DISTILL_SHARE * steps * batches.batch_size))
    features: list[Tensor] = []
    known: list[Tensor] = []
    rows: list[Tensor] = []
    outputs: list[Tensor] = []
    digests: list[str] | None = None if batches.data.dataset is None else []
    seen = size = 0
    for inputs, labels, index in batches.once():
        if seen >= wanted:
            break
        if batches.data.inputs is None:
            check_finite_inputs(inputs, "train", index)
        x = features_of(model, head, move(inputs, device))
        # A normaliser needs 1024 samples; a head that starts on them takes what there is.
        if seen < CALIBRATION_SAMPLES or plan.head_steps:
            features.append(x)
            known.append(labels)
        if remembers and index is not None and size < DISTILL_BYTES:
            with torch.no_grad():
                outputs.append(by_sample(head.source(x), len(labels)))
            rows.append(index)
            if digests is not None:
                digests += [digest(pick(inputs, i)) for i in range(len(labels))]
            size += outputs[-1].nbytes
        seen += len(labels)
    if head.norm is not None:
        calibrate_from(head.norm, features)
        head.norm.deferred = True
    return Pass(
        torch.cat(features) if features else torch.empty(0, device=device),
        torch.cat(known) if known else torch.empty(0, dtype=torch.int64),
        torch.cat(rows) if rows else None,
        torch.cat(outputs) if outputs else None,
        digests,
    )


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


def _distillation(
    model: nn.Module, head: TaskHead, batches: TrainBatches, plan: Plan, pass_: Pass
) -> Distillation | None:
    if not plan.distill:
        return None
    if pass_.index is None or pass_.outputs is None:
        return LiveDistillation(head, plan.distill, model)
    n = batches.data.num_samples or 0
    return CachedDistillation(head, plan.distill, pass_.index, pass_.outputs, n, pass_.digests)


def make_optimizer(
    model: nn.Module, config: TrainConfig, plan: Plan, curvature: SourceCard | None = None
) -> AdamW | SGD:
    """The fused optimizer over backbone and head, anchored at the weights as they are now.

    The pull is weighted by `curvature`, where it is given.
    """
    groups = param_groups(
        model,
        lr=plan.lr,
        head_lr_scale=plan.head_lr_scale,
        anchor_decay=plan.anchor_decay,
        stall=plan.stall,
        ramp=plan.ramp,
        weight_decay=config.weight_decay,
    )
    for group in groups:
        group["initial_lr"] = group["lr"]
        if plan.head_steps and group["name"].startswith("head"):
            group["ramp"] = plan.ramp  # it has learned: Adam's first step would undo that, too
        if curvature is not None and group["name"].startswith("backbone"):
            group["curvature"] = curvature.curvature_for(group["params"])
    if config.optimizer == "sgd":
        return SGD(groups, momentum=0.9, max_grad_norm=config.max_grad_norm)
    return AdamW(groups, max_grad_norm=config.max_grad_norm)


class Drift:
    """How far the backbone has moved from where it was when this was made.

    Uses the optimizer's anchors where it keeps them, and a copy where it does not.
    """

    def __init__(self, optimizer: AdamW | SGD) -> None:
        self.params: list[Tensor] = [
            p
            for group in optimizer.param_groups
            if group["name"].startswith("backbone")
            for p in group["params"]
        ]
        state = optimizer.state
        self.anchors: list[Tensor] = [
            state[p]["anchor"] if p in state and "anchor" in state[p] else p.detach().clone()
            for p in self.params
        ]

    @torch.no_grad()
    def __call__(self) -> float:
        """`||w - w0||`, summed in float64."""
        pairs = zip(self.params, self.anchors, strict=True)
        total = sum(((p.double() - a.double()).square().sum() for p, a in pairs), torch.zeros(()))
        return float(total.sqrt())
