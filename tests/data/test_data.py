"""The order of training batches, and what data may come as."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    TensorDataset,
)

import fast
from fast.adapt.guards.rehearse import Rehearsal
from fast.data.dataset import as_data, split_batch
from fast.data.stream import TrainBatches, first_inputs
from networks import ConvNet, images

X, Y = torch.arange(40.0)[:, None], torch.arange(40) % 3


def order(seed, start=0, count=10):
    stream = TrainBatches(as_data((X, Y), "train"), 8, seed).from_step(start)
    return [next(stream)[2].tolist() for _ in range(count)]


def test_every_seed_has_its_own_order_and_every_epoch_too():
    epochs = [tuple(map(tuple, order(seed)[i : i + 5])) for seed in range(40) for i in (0, 5)]
    assert len(set(epochs)) == len(epochs)


def test_an_epoch_sees_every_sample_once():
    assert sorted(i for batch in order(3, count=5) for i in batch) == list(range(40))


def test_the_order_can_start_anywhere():
    assert order(1)[7:] == order(1, start=7, count=3)


def test_a_data_set_smaller_than_a_batch_is_one_batch():
    batches = TrainBatches(as_data((X[:5], Y[:5]), "train"), 64, 0)
    assert batches.steps_per_epoch == 1
    assert len(next(batches.from_step(0))[1]) == 5


def test_every_batch_is_full_and_no_sample_waits_for_the_next_epoch():
    """19 samples by 8: the third batch takes the end of one epoch and the start of the next."""
    batches = TrainBatches(as_data((X[:19], Y[:19]), "train"), 8, 0)
    assert batches.steps_per_epoch == 3
    assert batches.steps_for(8) == 19
    stream = [next_[2].tolist() for next_, _ in zip(batches.from_step(0), range(19), strict=False)]
    assert {len(rows) for rows in stream} == {8}
    rows = [i for batch in stream for i in batch]
    for start in range(0, 152, 19):
        assert sorted(rows[start : start + 19]) == list(range(19))
    later = batches.from_step(5)
    assert [next(later)[2].tolist() for _ in range(3)] == stream[5:8]
    assert sorted(i for _, _, part in batches.once() for i in part.tolist()) == list(range(19))


def test_a_data_set_whose_epochs_meet_in_a_batch_may_give_a_sample_twice():
    data = as_data(TensorDataset(X[:9], Y[:9]), "train")
    stream = TrainBatches(data, 8, 0).from_step(0)
    for _, (inputs, labels, rows) in zip(range(9), stream, strict=False):
        assert torch.equal(inputs, X[rows])
        assert torch.equal(labels, Y[rows])


def test_batches_in_several_forms():
    a, b, y = torch.ones(4, 2), torch.ones(4, 3), torch.zeros(4)
    assert split_batch((a, y), "train")[0] is a
    assert split_batch([a, b, y], "train")[0] == (a, b)
    assert split_batch({"ids": a, "label": y}, "train")[0] == {"ids": a}
    with pytest.raises(TypeError, match="without labels"):
        split_batch({"ids": a}, "train")
    with pytest.raises(TypeError, match="Tensor of shape"):
        split_batch(a, "train")


def test_an_empty_loader_and_a_stream_without_length():
    with pytest.raises(ValueError, match="no batches"):
        as_data(DataLoader(TensorDataset(X[:3], Y[:3]), batch_size=8, drop_last=True), "train")

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(zip(X, Y, strict=True))

    with pytest.raises(TypeError, match="a stream, Stream, which cannot be read again"):
        as_data(Stream(), "train")


def test_classes_are_counted_or_asked_for():
    assert as_data((X, Y), "train").infer_num_classes() == 3

    class Bare:
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return X[i], Y[i]

    with pytest.raises(ValueError, match=r"train: num_classes is not given and Bare .*pass num_"):
        as_data(Bare(), "train").infer_num_classes()
    named = TensorDataset(X, Y)
    named.classes = ["a", "b", "c", "d"]
    assert as_data(named, "train").infer_num_classes() == 4


def test_the_batches_of_a_loader_are_what_a_step_is_measured_by():
    """Places for source inputs follow them, not batch_size, which is not used and said to be so."""
    kept = images(80, 5, seed=3)[0]

    def sizes(**options):
        loader = DataLoader(TensorDataset(*images(96, 4)), **options)
        adaptation = fast.Adaptation(ConvNet(), loader, num_classes=4, source_inputs=kept, steps=2)
        inputs, _, rows = next(adaptation.batches())
        assert rows is None
        (rehearsal,) = (g for g in adaptation.guards if isinstance(g, Rehearsal))
        return len(inputs), len(rehearsal.source_batch(0).reference)

    assert sizes(batch_size=16) == (16, 2)
    assert sizes(batch_size=48) == (48, 6)
    assert sizes(batch_sampler=BatchSampler(SequentialSampler(range(96)), 24, True)) == (24, 3)
    loader = DataLoader(TensorDataset(*images(32, 4)), batch_size=16)
    with pytest.warns(UserWarning, match=r"batch_size=8 is not used.*batches of 16"):
        fast.finetune(ConvNet(), loader, num_classes=4, steps=1, batch_size=8)


class Noise(Dataset):
    """Draws each sample from the process's generators."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return torch.rand(3) + np.random.rand(), i % 2


def test_looking_at_the_first_inputs_moves_no_generator():
    own = torch.Generator().manual_seed(5)
    loader = DataLoader(Noise(), batch_size=4, shuffle=True, generator=own)
    before = [torch.get_rng_state(), own.get_state(), np.random.get_state()[2]]
    assert first_inputs(replace(as_data(Noise(), "train"), workers=2)).shape == (2, 3)
    assert first_inputs(as_data(loader, "train")).shape == (4, 3)
    after = [torch.get_rng_state(), own.get_state(), np.random.get_state()[2]]
    assert all(torch.equal(a, b) for a, b in zip(before[:2], after[:2], strict=True))
    assert before[2] == after[2]


def test_a_loaders_last_batch_has_a_sample_for_each_process():
    """A loop of one's own got an empty batch in one process, and divided by its size."""
    loader = DataLoader(TensorDataset(X[:9], Y[:9]), batch_size=4)
    batches = TrainBatches(as_data(loader, "train"), 4, 0)
    alone = [len(labels) for _, labels, _ in batches.once()]
    assert alone == [4, 4, 1]
    for rank in range(2):
        share = batches.from_step(1, slice(rank, None, 2))
        assert len(next(share)[1]) == 2
        with pytest.raises(ValueError, match="a batch of 1 samples, and 2 are needed"):
            next(share)
