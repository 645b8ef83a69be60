"""How two heads are brought to one scale: on which features, and by which penalty."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fast.merge import join_fit
from fast.merge.join_fit import Side, fit


def sides(features):
    """Two heads of three classes, each right about its own task, on features of both."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(len(features[0])) % 3
    logits = torch.randn(2, 2, len(labels), 3, dtype=torch.float64, generator=generator)
    for i in (0, 1):
        logits[i, i] += 1.5 * F.one_hot(labels, 3)
    return tuple(
        Side(
            source=logits[i, 0],
            target=logits[i, 1],
            features=features[i],
            answers=F.one_hot(labels + 3 * i, 6).double(),
        )
        for i in (0, 1)
    )


def fitted(features):
    classes = torch.arange(6)
    return fit(sides(features), classes, (classes < 3, classes >= 3), labelled=True)


def test_rounding_tells_no_task():
    """A feature that differs between the tasks by its last bits alone gets no weight."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(2, 90, 4, dtype=torch.float64, generator=generator)
    features[:, :, 0] *= 1e-12
    before = fitted(features)[1].mistaken
    features[1, :, 0] += 1e-11
    assert fitted(features)[1].mistaken == pytest.approx(before, abs=0.02)
    features[1, :, 0] += 10  # now it tells them
    assert fitted(features)[1].mistaken < 0.02 < before


def test_the_penalty_is_the_best_of_all_on_held_out_samples(monkeypatch):
    """Few samples of many features that say nothing ask for a large one."""
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(2, 30, 60, dtype=torch.float64, generator=generator)
    best = fitted(features)[1]
    losses = {}
    for ridge in join_fit.RIDGES:
        monkeypatch.setattr(join_fit, "RIDGES", (ridge,))
        losses[ridge] = fitted(features)[1].loss
    assert best.ridge == min(losses, key=losses.get) == max(losses)
    assert best.loss == pytest.approx(losses[best.ridge], rel=1e-3)
