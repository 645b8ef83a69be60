"""The source card of an adaptation: the user's, or one of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from fast.adapt.setup import Setup
from fast.curvature.card import SourceCard
from fast.data.source_inputs import SourceInputs, target_inputs

# A sample of a card costs two training samples, one of its calibration four: this keeps the card of
# a run of a hundred steps below 5 % of it (benchmarks/results/card_cost.md).
CARD_SHARE = 0.01
CARD_SAMPLES = (48, 512)
CALIBRATION_SAMPLES = 16


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
