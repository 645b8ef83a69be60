"""Settle data, batches and plan of an adaptation, before anything is changed."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fast.adapt.config import AdaptConfig, Budget
from fast.adapt.defaults import (
    LEAST_FOR_STATISTICS,
    OWN,
    SHUFFLED,
    TOGETHER,
    rehearsed_by,
    steps_for,
    uses_card,
)
from fast.adapt.guards.rehearse import make_room, own_inputs
from fast.adapt.methods import METHODS
from fast.adapt.network.head_start import head_is_last
from fast.adapt.network.noise import NOISY, added_by_batches
from fast.adapt.plan import Plan, plan_for
from fast.data.dataset import Data, as_data
from fast.data.finite import check_finite_inputs
from fast.data.labels import check_labels, check_num_classes
from fast.data.source_inputs import SourceInputs, parse_source_inputs
from fast.data.stream import TrainBatches, first_inputs
from fast.data.trees import join, leaves, length, move
from fast.errors import warn
from fast.heads import find_head, has_batch_norm, has_layer_norm, source_task
from fast.heads.find import HeadLayer, classes_of
from fast.heads.forward import check_takes, input_errors
from fast.ranks import ALONE, Ranks

log = logging.getLogger("fast")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """An adaptation before its first change to the network.

    Attributes:
        config: the options.
        ranks: the processes that train together.
        plan: what will be done.
        num_classes: C, the outputs of the head.
        batches: batches of target samples.
        batch_size: samples per step, target and rehearsed ones together.
        sample: a batch of target inputs, on the model's device.
        source: source inputs, or None.
        own: what is made of target inputs, and such inputs, whose features are rehearsed; or None.
    """

    config: AdaptConfig
    ranks: Ranks
    plan: Plan
    num_classes: int
    batches: TrainBatches
    batch_size: int
    sample: Any
    source: SourceInputs | None
    own: SourceInputs | None

    @property
    def device(self) -> torch.device:
        return leaves(self.sample)[0].device


def settle(
    config: AdaptConfig,
    model: nn.Module,
    train: Any,
    *,
    num_classes: int | None,
    source_inputs: Any,
    has_card: bool,
    any_labels: bool,
    ranks: Ranks = ALONE,
) -> Setup:
    """Read the data and resolve the plan; the network runs, but does not change.

    Args:
        model: a network that has passed `check_model`.
        train: training data; `Data` was checked by whoever read it.
        has_card: the user gave a card.
        any_labels: the loss is the user's own, so labels need not be class indices.
        ranks: the processes that train together.

    Raises:
        ValueError, TypeError: the data, the network or an option does not fit.
    """
    data = as_data(train, "train", any_labels=any_labels)
    if data is not train:
        data.check_trainable()
    outputs = num_outputs(config, model, data, num_classes, any_labels=any_labels)
    source = None if source_inputs is None else _read_source(model, source_inputs)
    has_source = source is not None
    rehearsed = rehearsed_by(config, has_source)
    batches, source_size, rehearsed = make_room(data, config.batch_size, config.seed, rehearsed)
    batch_size = _batch_size(config, batches)
    steps = steps_for(config, batches)
    sample = move(_first_inputs(batches), next(model.parameters()).device)
    own = None
    if rehearsed in OWN:
        own = own_inputs(batches, steps * source_size, rehearsed == SHUFFLED)
        if own is None:
            rehearsed, source_size = "", 0
    check_takes(model, sample, "train")
    head = find_head(model, sample, config.head_name).module
    plan = plan_for(
        config,
        steps=steps,
        target_size=batches.batch_size,
        source_size=source_size,
        weighted=uses_card(config, has_card, has_source),
        head_is_last=_head_is_last(config, model, head, sample),
        rehearsed=rehearsed,
        batch_norms=has_batch_norm(model),
        layer_norms=has_layer_norm(model),
        noisy_batches=partial(_noisy_batches, config, model, head, batches, sample),
        samples=data.num_samples,
    )
    if source is not None:
        _warn_of_other_sizes(source.inputs, sample)
        if config.source_skill == AdaptConfig.source_skill:
            _note_untrained_head(head)
    _check_needs(config, plan, has_source=has_source)
    _advise(config, plan, has_source=has_source, has_card=has_card)
    return Setup(
        config=config,
        ranks=ranks,
        plan=plan,
        num_classes=outputs,
        batches=batches,
        batch_size=batch_size,
        sample=sample,
        source=source,
        own=own,
    )


def _noisy_batches(
    config: AdaptConfig, model: nn.Module, head: nn.Module, batches: TrainBatches, sample: Any
) -> bool:
    """Whether the statistics of a batch are too noisy for batch norms of the target's own."""
    if batches.batch_size // config.grad_accum_steps < LEAST_FOR_STATISTICS:
        return True
    added = added_by_batches(model, head, sample)
    if added > NOISY:
        log.info(
            "batch norms stay the source's: the statistics of a batch add %.2f times the variance "
            "between inputs to what the head sees (batch_norm='per_task' takes them anyway)",
            added,
        )
    return added > NOISY


def _check_needs(config: AdaptConfig, plan: Plan, *, has_source: bool) -> None:
    """Warn of options that nothing uses.

    Raises:
        ValueError: an option, or the method, needs something that was not given.
    """
    if METHODS[config.method].replay and not has_source:
        raise ValueError(f"method {config.method!r} trains on source inputs: pass source_inputs=")
    if config.budget is not None:
        _check_budget(config.budget, plan, has_source=has_source)
    if config.source_skill != AdaptConfig.source_skill and not has_source:
        warn(f"source_skill={config.source_skill!r} is not used: there are no source_inputs")
    if config.rehearse and not plan.rehearsed:
        warn(
            f"rehearse={config.rehearse:g} is not used: there are no source_inputs, and the "
            "target's own inputs are too few, too many shapes, or no tensors"
        )


def _check_budget(budget: Budget, plan: Plan, *, has_source: bool) -> None:
    """Raise ValueError where there is nothing to check a budget on, or no pull to adjust."""
    if not has_source and (not plan.weighted or budget.points):
        raise ValueError(
            "forget_budget needs source_inputs to check on, or (for nats) a card to forecast by"
        )
    if not plan.anchor_decay:
        raise ValueError(
            f"forget_budget needs a pull to adjust, and this run of {plan.method!r} has none: set "
            "anchor_decay above 0; 'fast', 'ewc' and 'l2-sp' have a pull by default"
        )


def _advise(config: AdaptConfig, plan: Plan, *, has_source: bool, has_card: bool) -> None:
    """Tell the user where the source is given for nothing, or adapters would do without it."""
    if plan.adapter_rank and (has_card or has_source):
        log.info(
            "%s: method %r changes nothing that the source task uses, so there is nothing to hold; "
            "source inputs only report what is lost",
            "source_inputs" if has_source else "card",
            config.method,
        )
    could_be_adapters = (
        config.method == "fast" and config.tasks != TOGETHER and not config.keeps_head
    )
    if could_be_adapters and not (has_source or has_card):
        log.info(
            "no source_inputs: method='adapter' would forget nothing, and mostly learns more, if "
            "you know which task an input is of (docs/regimes.md)"
        )


def _read_source(model: nn.Module, source_inputs: Any) -> SourceInputs:
    """Source inputs that the network takes."""
    source = parse_source_inputs(source_inputs)
    with source_task(model):
        check_takes(model, source.inputs, "source_inputs")
    return source


def _note_untrained_head(head: HeadLayer) -> None:
    """Tell the user where the source head looks as libraries make one that no checkpoint has."""
    if head.bias is not None and not head.bias.any() and bool(head.weight.any()):
        log.info(
            "source_inputs: all biases of the source head are zero, as in a head that was never "
            "trained; such a head answers by chance: source_skill='features' keeps and measures "
            "what the features know"
        )


def _warn_of_other_sizes(source: Any, target: Any) -> None:
    """Warn where pictures of the source are of another size than those of the target."""
    pictures = all(isinstance(x, Tensor) and x.dim() == 4 for x in (source, target))
    if pictures and source.shape[1:] != target.shape[1:]:
        warn(
            f"source_inputs are {list(source.shape[1:])} and the target's inputs "
            f"{list(target.shape[1:])}: what is kept is what the network answers at their size. Of "
            "the target's size they would ride in its pass"
        )


def _batch_size(config: AdaptConfig, batches: TrainBatches) -> int:
    """Samples of a step: a DataLoader's own number, or else the option's."""
    size = batches.given_size or config.batch_size
    if config.batch_size not in (size, AdaptConfig.batch_size):
        warn(
            f"batch_size={config.batch_size} is not used: train is a DataLoader, with batches of "
            f"{size}"
        )
    return size


def _head_is_last(config: AdaptConfig, model: nn.Module, head: nn.Module, sample: Any) -> bool:
    """Whether the head's outputs are the logits.

    Raises:
        ValueError: they are not, and `head_steps` asks for it.
    """
    last = head_is_last(model, head, sample)
    if config.head_steps and not last:
        raise ValueError(
            "head_steps: something follows the head of this network, so that it cannot learn "
            "from its features alone; use stall="
        )
    return last


def num_outputs(
    config: AdaptConfig,
    model: nn.Module,
    data: Data,
    num_classes: int | None,
    *,
    any_labels: bool = False,
) -> int:
    """Outputs of the head that will learn.

    Args:
        num_classes: what the user says.
        any_labels: labels need not be class indices.

    Raises:
        ValueError: the data, the head that is kept and `num_classes` contradict each other, or do
            not say it.
    """
    if config.keeps_head:
        return _kept_outputs(model, data, config.head_name, num_classes)
    if any_labels:
        return _outputs_for_any_labels(data, num_classes)
    return _target_classes(data, num_classes)


def _target_classes(data: Data, num_classes: int | None) -> int:
    """Classes of the target: what the user says, else what the labels say.

    Raises:
        ValueError: one class only; or labels out of range.
    """
    if num_classes is not None:
        number = check_num_classes(num_classes)
    else:
        number = data.infer_num_classes()
        if number < 2:
            raise ValueError(
                "train: all labels are 0, one class; pass num_classes= where there are others"
            )
    if data.labels is not None:
        check_labels(data.labels, number, data.name)
    return number


def _kept_outputs(
    model: nn.Module, data: Data, head_name: str | None, num_classes: int | None
) -> int:
    """Outputs of the head that is kept.

    Raises:
        ValueError: `num_classes` says otherwise.
    """
    sample = move(first_inputs(data), next(model.parameters()).device)
    with input_errors("train", sample, model):
        outputs = classes_of(find_head(model, sample, head_name).module)
    if num_classes not in (None, outputs):
        raise ValueError(
            f"num_classes={num_classes}, and the head that is kept has {outputs} outputs; leave "
            "num_classes out, or set head='new'"
        )
    return outputs


def _outputs_for_any_labels(data: Data, num_classes: int | None) -> int:
    """Outputs of a new head whose labels only the user's loss understands."""
    if num_classes is not None:
        return check_num_classes(num_classes, least=1)
    labels = data.labels
    if labels is not None and labels.dim() == 2:
        return labels.shape[1]
    if labels is not None and labels.dim() == 1 and not labels.is_floating_point():
        return _target_classes(data, None)
    raise ValueError(
        "num_classes is not given, and the labels do not say how many outputs the head needs"
    )


def _first_inputs(batches: TrainBatches) -> Any:
    """Inputs of the first batch, or of the first two where that is a single sample."""
    stream = batches.from_step(0)
    inputs, _, index = next(stream)
    if batches.data.inputs is None:
        check_finite_inputs(inputs, "train", index)
    if length(inputs) > 1:
        return inputs
    both = join(inputs, next(stream)[0])
    return inputs if both is None else both


def check_ranks(setup: Setup) -> None:
    """Raise ValueError where the processes that train together would not do the same."""
    number, plan = setup.ranks.size, setup.plan
    shard = setup.config.shard  # every pass is then one of all processes
    if number == 1:
        if shard:
            warn("shard=True is not used: there is one process; torchrun starts several")
        return
    if plan.target_size < number:
        raise ValueError(
            f"batch_size: a step has {plan.target_size} target samples for {number} "
            "processes; raise it, or start fewer processes"
        )
    parts = plan.grad_accum_steps
    if shard and 0 < plan.source_size < number * parts:
        raise ValueError(
            f"shard: a step has {plan.source_size} source samples for {number} processes"
            f"{f' and {parts} micro-batches' if parts > 1 else ''}, and each needs one; raise "
            "batch_size, or set rehearse=0"
        )
    uneven = setup.batches.given_size is not None or plan.target_size % (number * parts)
    if shard and parts > 1 and uneven:
        raise ValueError(
            f"shard: {number} processes have to take as many micro-batches: give a data set (no "
            f"DataLoader), of which a step has {plan.target_size} target samples, and make that a "
            f"multiple of {number * parts}; or leave out grad_accum_steps"
        )
    facts = (str(plan), setup.num_classes, setup.batches.data.num_samples)
    if len(set(setup.ranks.all(facts))) > 1:
        raise ValueError(
            "the processes were given other data or options than each other: give all of them the "
            "whole data set, of which each takes its share"
        )
