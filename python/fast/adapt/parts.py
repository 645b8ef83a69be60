"""Make the parts of an adaptation, in the order in which each needs those before it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fast.adapt.config import AdaptConfig
from fast.adapt.guards.base import Guard, Guards
from fast.adapt.guards.budget import ForgettingBudget
from fast.adapt.guards.forgetting import ForgettingMeter, hold_back
from fast.adapt.guards.replay import Replay
from fast.adapt.guards.weight_average import WeightAverage
from fast.adapt.loss import Loss, TargetLoss
from fast.adapt.methods import METHODS
from fast.adapt.network.adapted import AdaptedNetwork
from fast.adapt.network.prepare import prepare_network
from fast.adapt.optimizer import AdaptedOptimizer, MakeOptimizer
from fast.adapt.setup import Setup, check_ranks, settle
from fast.curvature.card import SourceCard
from fast.data.source_inputs import SourceInputs, target_inputs
from fast.ranks import Ranks, tensors_of

# A sample of a card costs as much as two training samples, and one of its calibration as much as
# four. With these numbers a card takes less than 5 % of a run of a hundred steps
# (benchmarks/results/card_cost.md).
CARD_SHARE = 0.01
CARD_SAMPLES = (48, 512)
CALIBRATION_SAMPLES = 16


@dataclass(frozen=True, kw_only=True)
class Source:
    """What an adaptation knows about its source.

    Attributes:
        samples: source inputs that the method may use, or None.
        meter: measures forgetting on the inputs that were held back, or None.
        card: the source card, or None.
        replay: the guard that trains on source inputs, if the method has one.
    """

    samples: SourceInputs | None
    meter: ForgettingMeter | None
    card: SourceCard | None
    replay: Replay | None


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What an adaptation is made of before its first step.

    Attributes:
        setup: data and plan, with the learning rate that the optimizer has.
        network: with its head, which is taught.
        average: the averaged weights, one of the guards; or None.
        budget: what measures, forecasts and limits forgetting, the last of the guards.
    """

    setup: Setup
    source: Source
    network: AdaptedNetwork
    optimizer: AdaptedOptimizer
    average: WeightAverage | None
    budget: ForgettingBudget
    guards: Guards


def make_parts(
    model: nn.Module,
    train: Any,
    config: AdaptConfig,
    *,
    num_classes: int | None,
    source_inputs: Any,
    card: SourceCard | None,
    loss: Loss,
    optimizer: MakeOptimizer | None,
    augmented: bool,
    autocast_dtype: torch.dtype | None,
    resuming: bool,
    ranks: Ranks,
) -> Parts:
    """Settle the plan, measure the source, prepare the network, make optimizer and guards.

    Args:
        model: at its pretrained weights, with its own head; it is changed in place.
        card: the user's card, bound to the model; or None.
        optimizer: makes one of parameter groups; None takes the fused one that the plan names.
        The others are those of `fast.Adaptation`.

    Raises:
        ValueError, TypeError: an option, the data or the model does not fit.
    """
    with ranks.together():
        setup = settle(
            config,
            model,
            train,
            num_classes=num_classes,
            source_inputs=source_inputs,
            has_card=card is not None,
            any_labels=not isinstance(loss, TargetLoss),
        )
    check_ranks(setup, ranks, config.shard)
    # The source is measured at the pretrained weights, before the network changes.
    source = measure_source(model, setup, config, card=card, ranks=ranks)
    autocast = torch.autocast(setup.device.type, autocast_dtype, enabled=autocast_dtype is not None)
    with ranks.together(), autocast:
        network, holding = prepare_network(
            model,
            setup,
            config,
            samples=source.samples,
            loss=loss,
            augmented=augmented,
            resuming=resuming,
            ranks=ranks,
        )
    ranks.copy_from_first(tensors_of(model))
    if config.shard and ranks.size > 1:
        network.shard(setup.sample, ranks)
    adapted = AdaptedOptimizer(
        model=model,
        plan=setup.plan,
        card=source.card,
        optimizer=optimizer,
        sample=setup.sample,
        own_lr=config.lr is not None,
    )
    setup = replace(setup, plan=adapted.plan)  # a user's optimizer has a rate of its own
    network.drift = adapted.drift
    average, budget, guards = _guards(model, setup, source, config, adapted, holding, ranks)
    return Parts(
        setup=setup,
        source=source,
        network=network,
        optimizer=adapted,
        average=average,
        budget=budget,
        guards=guards,
    )


def _guards(
    model: nn.Module,
    setup: Setup,
    source: Source,
    config: AdaptConfig,
    optimizer: AdaptedOptimizer,
    holding: list[Guard],
    ranks: Ranks,
) -> tuple[WeightAverage | None, ForgettingBudget, Guards]:
    """The guards of weights and budget, and all of them together.

    Args:
        holding: the guards that hold the network's function.
    """
    plan, guards = setup.plan, Guards(holding)
    average = WeightAverage(optimizer.params, plan.average, plan.stall) if plan.average else None
    budget = ForgettingBudget(
        model=model,
        plan=plan,
        batch_size=setup.batch_size,
        budget=config.budget,
        meter=source.meter,
        card=source.card,
        weighted=optimizer.weighted,
        stats=optimizer.stats,
        drift=optimizer.drift,
        average=average,
        set_pull=partial(set_pull, optimizer, guards),
        ranks=ranks,
    )
    last = (source.replay, average, budget)
    guards += [guard for guard in last if guard is not None]
    return average, budget, guards


def set_pull(optimizer: AdaptedOptimizer, guards: Guards, factor: float) -> None:
    """Multiply everything that holds the source: the optimizer's pull, and the penalties."""
    optimizer.set_pull(factor)
    guards.set_strength(factor)


def measure_source(
    model: nn.Module,
    setup: Setup,
    config: AdaptConfig,
    *,
    card: SourceCard | None,
    ranks: Ranks,
) -> Source:
    """Hold back some source inputs to measure forgetting; make card and replay from the others.

    Args:
        model: the network at its pretrained weights, with its own head.
        card: the user's card, bound to the model; or None.

    Raises:
        ValueError: the source inputs do not fit the network, or there are too few.
    """
    if setup.plan.adapter_rank:
        card = None  # a card says how to move weights, and with adapters these stay
    samples, meter = setup.source, None
    with ranks.together():
        if samples is not None:
            samples, meter = hold_back(
                model, samples, budget=config.budget, skill=config.source_skill
            )
        if card is None and setup.plan.weighted:
            card = own_card(model, setup, samples, seed=config.seed)
        replay = None
        if METHODS[config.method].replay and samples is not None:
            replay = Replay(
                model=model,
                samples=samples,
                batch_size=setup.batch_size,
                seed=config.seed,
                ranks=ranks,
            )
    return Source(samples=samples, meter=meter, card=ranks.from_first(card), replay=replay)


def bound_card(card: Any, model: nn.Module) -> SourceCard:
    """A card, or the card in a file, bound to this model.

    Raises:
        TypeError: `card` is neither a card nor a path.
        ValueError: the card belongs to another model.
    """
    if not isinstance(card, (SourceCard, str, Path)):
        raise TypeError(f"card must be a SourceCard or its file; got {type(card).__name__}")
    loaded = card if isinstance(card, SourceCard) else SourceCard.load(card)
    return loaded if loaded.is_bound(model) else loaded.bind(model).without_weights()


def own_card(
    model: nn.Module, setup: Setup, source: SourceInputs | None, *, seed: int
) -> SourceCard:
    """Estimate a card from as many samples as suit the length of the run.

    Args:
        model: the network at its pretrained weights, with its own head.
        source: source inputs; with None, target inputs stand in for them (`ewc`).

    Raises:
        ValueError: the inputs do not fit the network.
    """
    low, high = CARD_SAMPLES
    samples = target_inputs(setup.batches, high) if source is None else source
    seen = setup.plan.steps * setup.batch_size
    card = SourceCard.estimate(
        model,
        samples,
        num_samples=min(max(int(CARD_SHARE * seen), low), high),
        calibration_samples=CALIBRATION_SAMPLES,
        coherence=False,
        seed=seed,
    )
    return card.without_weights()
