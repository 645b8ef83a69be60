"""Source inputs that cannot be used are refused by name, before anything is changed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import fast
from fast.data.source_inputs import SourceInputs, parse_source_inputs
from networks import ConvNet, images

TRAIN, (X, Y) = images(60, 4, seed=1), images(40, 5, seed=3)
HOLED = X.clone()
HOLED[-3] = float("nan")


@pytest.mark.parametrize("method", ["fast", "ewc", "replay"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (HOLED, "1 sample is not finite (NaN or infinite), the first is number 37; drop"),
        (X[:, :, :, 0], "the network does not take these inputs ([40, 1, 8] torch.float32)"),
        (X.to(torch.uint8), "does not take these inputs"),
        (X[:0], "0 samples; give inputs, (inputs, labels)"),
        (X[:3], "3 samples; give at least 4"),
        ([], "0 samples; give"),
        (TensorDataset(X[:0]), "0 samples; give"),
        ((X, Y - 1), "labels must be 0 or more; got -1..3"),
        ((X, Y + 0.5), "labels must be whole numbers"),
        ((X, torch.full((40,), float("nan"))), "40 labels are NaN"),
        (TensorDataset(X, Y + 0.5), "labels must be whole numbers (class indices)"),
        (TensorDataset(X, Y * float("nan")), "40 labels are NaN, the first in row 0"),
        ((X, Y[:-1]), "40 inputs but 39 labels"),
        (
            (X, Y[:, None]),
            "does not take these inputs ([40, 1, 8, 8] torch.float32, [40, 1] torch.in",
        ),
    ],
)
def test_what_is_wrong_is_said(method, data, message):
    with pytest.raises(ValueError) as caught:
        fast.finetune(ConvNet(), TRAIN, method=method, steps=2, source_inputs=data)
    assert str(caught.value).startswith("source_inputs: ")
    assert message in str(caught.value)


def test_what_is_no_data_is_refused():
    with pytest.raises(TypeError, match="source_inputs: a batch is a str"):
        fast.finetune(ConvNet(), TRAIN, steps=2, source_inputs="folder")
    with pytest.raises(TypeError, match=r"source_inputs: .* 0-d tensor; give inputs"):
        fast.finetune(ConvNet(), TRAIN, steps=2, source_inputs=torch.tensor(3.0))


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
        fast.finetune(seeded(), TRAIN, steps=3, source_inputs=data).history[-1]["loss"]
        for data in ((X, Y), (X.double().numpy(), np.asarray(Y)))
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


class Batches:
    """An iterable of batches that is no DataLoader."""

    def __iter__(self):
        return ((X[i : i + 7], Y[i : i + 7]) for i in range(0, 40, 7))


FORMS = [
    (X, False),
    ((X, Y), True),
    (X.numpy(), False),
    ((X.numpy(), Y.numpy()), True),
    (TensorDataset(X), False),
    (TensorDataset(X, Y), True),
]
BATCHES = [
    ([X[:20], X[20:]], False),
    (DataLoader(TensorDataset(X, Y), batch_size=9), True),
    (Batches(), True),
]


@pytest.mark.parametrize(
    ("data", "labelled", "limit"),
    [(*form, 40) for form in FORMS] + [(*form, 25) for form in BATCHES],
)
def test_all_forms_of_source_data_give_their_samples_in_order(data, labelled, limit):
    samples = SourceInputs.parse(data, limit)
    assert samples.size == limit
    assert torch.equal(samples.inputs, X[:limit])
    assert (samples.labels is not None) == labelled
    if labelled:
        assert torch.equal(samples.labels, Y[:limit])
    parts = list(samples.batches(10))
    assert torch.equal(torch.cat([x for x, _ in parts]), X[:limit])


@pytest.mark.parametrize(("data", "labelled"), FORMS)
def test_a_few_of_many_are_drawn_at_random(data, labelled):
    """Those that are sorted by class and have no labels gave the first few classes alone."""
    samples = SourceInputs.parse(data, 25)
    rows = [int((one == X).flatten(1).all(1).nonzero()) for one in samples.inputs]
    assert len(set(rows)) == 25
    assert rows != sorted(rows)
    assert max(rows) > 30
    if labelled:
        assert torch.equal(samples.labels, Y[rows])


@pytest.mark.parametrize(
    "data",
    [
        {"a": X, "b": X + 1, "y": Y},
        ({"a": X, "b": X + 1}, Y),
        DataLoader([{"a": x, "b": x + 1, "y": y} for x, y in zip(X, Y, strict=True)]),
    ],
)
def test_several_inputs_stay_together(data):
    samples = SourceInputs.parse(data, 25).part(3, 5)
    rows = [int((one == X).flatten(1).all(1).nonzero()) for one in samples.inputs["a"]]
    assert torch.equal(samples.inputs["b"], X[rows] + 1)
    assert torch.equal(samples.labels, Y[rows])


def test_errors_name_the_data():
    with pytest.raises(ValueError, match=r"^kept: 7 inputs but 6 labels; give inputs"):
        SourceInputs.parse([(X[:7], Y[:6])], 25, "kept")
    with pytest.raises(ValueError, match=r"^kept: 1 sample; give at least 2"):
        SourceInputs.parse(X[:1], 25, "kept")
    with pytest.raises(TypeError, match=r"^kept: inputs must be numbers"):
        SourceInputs.parse(np.array(["a", "b"]), 25, "kept")


def test_sorted_source_inputs_are_mixed():
    """Half of the classes were rehearsed, and the budget was measured on the others."""
    order = Y.argsort(stable=True)
    x, y = X[order], Y[order]
    mixed = parse_source_inputs((x, y))
    assert set(mixed.labels[:20].tolist()) == set(mixed.labels[20:].tolist()) == set(range(5))
    rows = [int((one == X).flatten(1).all(1).nonzero()) for one in mixed.inputs]
    assert sorted(rows) == list(range(40))
    assert torch.equal(mixed.labels, Y[rows])
    assert torch.equal(parse_source_inputs((X, Y)).inputs, X)
    assert torch.equal(parse_source_inputs((X, 0 * Y)).inputs, X)


def test_sorted_batches_of_which_the_first_are_read_are_named():
    """A card, or a joined network, was made from the first few classes alone."""
    order = Y.argsort(stable=True)
    loader = DataLoader(TensorDataset(X[order], Y[order]), batch_size=20)
    with pytest.warns(UserWarning, match="kept: sorted by class, and the first 20 are read, up"):
        SourceInputs.parse(loader, 20, "kept")
    assert SourceInputs.parse(loader, 64).size == 40
    assert SourceInputs.parse(loader, 40).size == 40  # all of them
    assert SourceInputs.parse(loader, 8, "kept").size == 8  # by chance, perhaps
