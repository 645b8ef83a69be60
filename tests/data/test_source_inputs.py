"""Source inputs that cannot be used are refused by name, before anything is changed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import fast
from networks import ConvNet, images

TRAIN, (X, Y) = images(60, 4, seed=1), images(40, 5, seed=3)
HOLED = X.clone()
HOLED[-3] = float("nan")


@pytest.mark.parametrize("method", ["fast", "ewc", "replay"])
@pytest.mark.parametrize(
    ("known", "message"),
    [
        (HOLED, "1 samples are not finite (NaN or infinite), the first is number 37; drop"),
        (X[:, :, :, 0], "the network does not take these inputs ([40, 1, 8] torch.float32)"),
        (X.to(torch.uint8), "does not take these inputs"),
        (X[:0], "0 samples; give inputs, (inputs, labels)"),
        (X[:3], "3 samples; give at least 4"),
        ([], "0 samples; give"),
        (TensorDataset(X[:0]), "0 samples; give"),
        (torch.tensor(3.0), "0-dim tensor; give"),
        ((X, Y - 1), "labels must be 0 or more; got -1..3"),
        ((X, Y + 0.5), "labels must be whole numbers"),
        ((X, torch.full((40,), float("nan"))), "40 labels are NaN"),
        (TensorDataset(X, Y + 0.5), "labels must be whole numbers (class indices), not"),
        (TensorDataset(X, Y * float("nan")), "40 labels are NaN, the first in row 0"),
        ((X, Y[:-1]), "40 inputs but 39 labels"),
        (
            (X, Y[:, None]),
            "does not take these inputs ([40, 1, 8, 8] torch.float32, [40, 1] torch.in",
        ),
    ],
)
def test_what_is_wrong_is_said(method, known, message):
    with pytest.raises(ValueError) as caught:
        fast.finetune(ConvNet(), TRAIN, method=method, steps=2, source_inputs=known)
    assert str(caught.value).startswith("source_inputs: ")
    assert message in str(caught.value)


def test_what_is_no_data_is_refused():
    with pytest.raises(TypeError, match="source_inputs: a batch is a str"):
        fast.finetune(ConvNet(), TRAIN, steps=2, source_inputs="folder")


def test_labels_that_are_replayed_must_be_the_source_heads():
    with pytest.raises(ValueError, match=r"source_inputs: labels must be 0\.\.4; got 2\.\.6"):
        fast.finetune(ConvNet(), TRAIN, method="replay", steps=2, source_inputs=(X, Y + 2))


def test_the_same_sample_over_and_over_gives_nothing_to_rehearse():
    same = torch.ones_like(X)
    with pytest.raises(ValueError, match="source_inputs: the network gives all 20 inputs the same"):
        fast.finetune(ConvNet(), TRAIN, steps=2, source_inputs=same)
    result = fast.finetune(ConvNet(), TRAIN, steps=2, source_inputs=same, rehearse=0)
    assert result.history[-1]["loss"] < 10


def test_answers_that_overflow_are_refused():
    with pytest.raises(ValueError, match="source_inputs: the network's answers to them are not"):
        fast.finetune(ConvNet(), TRAIN, steps=2, source_inputs=X.sign() * 3e38)


def test_arrays_are_as_good_as_tensors():
    losses = [
        fast.finetune(seeded(), TRAIN, steps=3, source_inputs=known).history[-1]["loss"]
        for known in ((X, Y), (X.double().numpy(), np.asarray(Y)))
    ]
    assert losses[0] == losses[1]


def seeded():
    torch.manual_seed(0)
    return ConvNet()


def test_batches_of_one():
    result = fast.finetune(ConvNet(), TRAIN, steps=3, batch_size=1)
    assert result.history[-1]["loss"] < 10
    with pytest.raises(ValueError, match="batch_size must be at least 2 to rehearse"):
        fast.finetune(ConvNet(), TRAIN, steps=3, batch_size=1, source_inputs=X)
