"""What is known of the source, taken at the pretrained weights before the network changes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fast.adapt.config import AdaptConfig
from fast.adapt.guards.forgetting import ForgettingMeter, hold_back
from fast.adapt.guards.replay import Replay
from fast.adapt.methods import METHODS
from fast.adapt.setup import Setup
from fast.curvature.card import SourceCard
from fast.data.source_inputs import SourceInputs, target_inputs
from fast.ranks import Ranks

# A sample of a card costs two training samples, one of its calibration four: this keeps the card of
# a run of a hundred steps below 5 % of it (benchmarks/results/card_cost.md).
CARD_SHARE = 0.01
CARD_SAMPLES = (48, 512)
CALIBRATION_SAMPLES = 16


@dataclass(frozen=True, kw_only=True)
class Source:
    """The source of an adaptation.

    Attributes:
        samples: source inputs that a run may use, or None.
        meter: measures what is lost on those that were held back from it, or None.
        card: what the weights mean for the source, or None.
        replay: the guard that trains on source inputs, where the method has it.
    """

    samples: SourceInputs | None
    meter: ForgettingMeter | None
    card: SourceCard | None
    replay: Replay | None


def measure_source(
    model: nn.Module,
    setup: Setup,
    config: AdaptConfig,
    *,
    card: SourceCard | None,
    resuming: bool,
    ranks: Ranks,
) -> Source:
    """Hold source inputs back for the budget, and take what the method needs of the others.

    Args:
        model: at the pretrained weights, with its own head.
        card: the user's, bound to the model, or None.
        resuming: no card is estimated; its weights are in the state that will be loaded.

    Raises:
        ValueError: the source inputs do not fit the network, or there are too few.
    """
    if setup.plan.adapter_rank:
        card = None  # it says how to move weights, and these stay
    samples, meter = setup.source, None
    with ranks.together():
        if samples is not None:
            samples, meter = hold_back(
                model, samples, budget=config.budget, skill=config.source_skill
            )
        if card is None and setup.plan.weighted and not resuming:
            card = own_card(model, setup, samples, seed=config.seed)
        replay = None
        if METHODS[config.method].replay:
            replay = Replay(
                model=model,
                samples=samples,
                batch_size=setup.batch_size,
                seed=config.seed,
                ranks=ranks,
            )
    return Source(samples=samples, meter=meter, card=ranks.from_first(card), replay=replay)


def bound_card(card: Any, model: nn.Module) -> SourceCard:
    """A card, or the one in a file, for this model; one that is bound to it stays as it is.

    Raises:
        TypeError: something else; ValueError: the card is of another model.
    """
    if not isinstance(card, (SourceCard, str, Path)):
        raise TypeError(f"card must be a SourceCard or its file; got {type(card).__name__}")
    loaded = card if isinstance(card, SourceCard) else SourceCard.load(card)
    return loaded if loaded.is_bound(model) else loaded.bind(model).without_weights()


def own_card(
    model: nn.Module, setup: Setup, source: SourceInputs | None, *, seed: int
) -> SourceCard:
    """A card of a size that suits the run.

    Args:
        model: at the pretrained weights, with its own head.
        source: source inputs; None: those of the target stand for them (`ewc`).

    Raises:
        ValueError: the inputs do not fit.
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
