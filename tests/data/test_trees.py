"""Batches of any form: tensors, tuples, lists and mappings of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fast
from fast.data.dataset import split_batch
from fast.data.source_inputs import SourceInputs
from fast.data.trees import LABEL_KEYS, concatenate, join, leaves, length, move, pick

X = torch.arange(12.0).reshape(6, 2)
FORMS = [X, (X, X + 1), [X, X + 1], {"a": X, "b": X + 1}, {"a": (X, {"c": X})}]


@pytest.mark.parametrize("inputs", FORMS)
def test_parts_of_a_batch_make_the_batch_again(inputs):
    assert length(inputs) == 6
    parts = [pick(inputs, slice(2)), pick(inputs, torch.tensor([2, 3, 4])), pick(inputs, [5])]
    torch.testing.assert_close(concatenate(parts), pick(inputs, slice(None)), rtol=0, atol=0)
    torch.testing.assert_close(join(*parts[:2]), pick(inputs, slice(5)), rtol=0, atol=0)


@pytest.mark.parametrize("inputs", FORMS)
def test_every_tensor_of_a_batch_is_moved(inputs):
    moved = leaves(move(inputs, torch.device("meta")))
    assert len(moved) == len(leaves(inputs))
    assert all(x.is_meta for x in moved)


def test_texts_are_one_input():
    texts = ["one", "two", "three"]
    assert length(texts) == 3
    assert pick({"text": texts}, slice(2)) == {"text": ["one", "two"]}
    assert pick(texts, np.array([2, 0])) == ["three", "one"]
    assert join(texts, texts) is None


@pytest.mark.parametrize(
    "other", [X.double(), X[:, :1], X[:, 0], (X,), {"a": X}, torch.tensor(1.0)]
)
def test_what_does_not_fit_is_not_joined(other):
    assert join(X, other) is None
    assert join({"b": X, "c": other}, {"b": X, "c": X}) is None


class TakesAnything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, **ignored: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).tanh())


def curvature(model: nn.Module, batch: object) -> float:
    ones = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    return float(fast.Hessian(model, F.cross_entropy, batch).quad(ones))


def test_a_batch_with_several_keys_of_labels_has_the_same_labels_everywhere():
    torch.manual_seed(0)
    model, first, second = TakesAnything(), torch.arange(6) % 3, torch.arange(6) // 2
    for i, key in enumerate(LABEL_KEYS):
        for other in LABEL_KEYS[i + 1 :]:
            both = {"x": X, other: second, key: first}
            assert torch.equal(SourceInputs.parse(both, 6).labels, first)
            assert torch.equal(split_batch(both, "train")[1], first)
            assert curvature(model, both) == curvature(model, (X, first))
    assert curvature(model, (X, first)) != curvature(model, (X, second))
    card, plain = (
        fast.SourceCard.estimate(model, data, labels="data")
        for data in ({"x": X, "target": second, "y": first}, {"x": X, "y": first})
    )
    assert card.source_loss == plain.source_loss
