"""What an adaptation knows about its source before the network changes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fast.adapt.guards.forgetting import ForgettingMeter, hold_back
from fast.adapt.guards.replay import Replay
from fast.adapt.methods import METHODS
from fast.adapt.setup import Setup
from fast.curvature.card import SourceCard
from fast.data.source_inputs import SourceInputs, target_inputs

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


def measure_source(model: nn.Module, setup: Setup, card: SourceCard | None) -> Source:
    """Hold back some source inputs to measure forgetting; make card and replay from the others.

    Args:
        model: the network at its pretrained weights, with its own head.
        card: the user's card, bound to the model; or None.

    Raises:
        ValueError: the source inputs do not fit the network, or there are too few.
    """
    config, ranks = setup.config, setup.ranks
    if setup.plan.adapter_rank:
        card = None  # a card says how to move weights, and with adapters these stay
    samples, meter = setup.source, None
    with ranks.together():
        if samples is not None:
            samples, meter = hold_back(
                model, samples, budget=config.budget, skill=config.source_skill
            )
        if card is None and setup.plan.weighted:
            card = own_card(model, setup, samples)
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


def own_card(model: nn.Module, setup: Setup, source: SourceInputs | None) -> SourceCard:
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
        seed=setup.config.seed,
    )
    return card.without_weights()
