"""What the benchmark of cards times is what a run calls."""

from __future__ import annotations

import fast
from benchmarks.experiments.card_cost import timed
from networks import ConvNet, images


def test_a_card_and_the_checks_of_a_budget_are_timed():
    with timed() as spent:
        fast.finetune(
            ConvNet(),
            images(64, 4),
            source_inputs=images(64, 5, seed=3)[0],
            method="ewc",
            forget_budget=0.1,
            steps=10,
        )
    assert set(spent) == {"card", "checks"}
    assert min(spent.values()) > 0
