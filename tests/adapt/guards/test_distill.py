"""Distillation: what is remembered of one view of a sample holds for no other."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fast
from fast.adapt.guards.base import MicroBatch, Seen
from fast.adapt.guards.distill import Distillation, Remembered, SourceOutputs, digest
from fast.data.dataset import as_data
from networks import images

TRAIN, VAL = images(300, 4, seed=1), images(100, 4, seed=2)
KNOWN, ASKED = images(300, 5, seed=3), images(200, 5, seed=4)
RUN = {"steps": 60, "lr": 1e-2, "eval_every": 60}


class Views(Dataset):
    """Mirrors the samples whose number `mirrors` answers, at every second reading."""

    def __init__(self, mirrors):
        self.mirrors, self.read = mirrors, Counter()

    def __len__(self):
        return len(TRAIN[1])

    def __getitem__(self, i):
        self.read[i] += 1
        x = TRAIN[0][i]
        return x.flip(-1) if self.mirrors(i) and self.read[i] % 2 else x, int(TRAIN[1][i])


def flipped(x):
    return torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x)


@pytest.mark.parametrize(
    ("data", "options", "live"),
    [
        (lambda: TRAIN, {}, False),
        (lambda: TRAIN, {"transform": flipped}, True),
        (lambda: Views(lambda i: False), {}, False),
        (lambda: Views(lambda i: True), {}, True),
        (lambda: Views(lambda i: i == LATE), {}, False),
        (lambda: DataLoader(Views(lambda i: True), 60), {}, True),
    ],
    ids=["tensors", "transform", "Dataset", "it augments", "it augments one", "loader"],
)
def test_what_is_remembered_of_one_view_is_not_held_against_another(
    pretrained, monkeypatch, data, options, live
):
    """Before anything has moved, staying what it was costs nothing, whatever the view."""
    lives = []
    start = Distillation.__init__

    def watched(self, **options):
        start(self, **options)
        lives.append(self.live)

    monkeypatch.setattr(Distillation, "__init__", watched)
    still = {"steps": 9, "eval_every": 9, "stall": 99, "head_steps": 0, "average": 0, "lr": 1e-9}
    still |= {"num_classes": 4, "batch_size": 60, "ramp": 0, "batch_norm": "frozen"}
    loss = [
        fast.finetune(copy.deepcopy(pretrained), data(), distill=d, **still, **options).history[-1]
        for d in (0.0, 100.0)
    ]
    assert loss[1]["loss"] == pytest.approx(loss[0]["loss"], abs=1e-5)
    assert lives == [live]


def test_a_source_of_one_output_is_not_held_by_its_answers(pretrained):
    model = copy.deepcopy(pretrained)
    head = model.decide
    model.decide = nn.Linear(head.in_features, 1)
    options = {"distill": 1.0, "steps": 2, "batch_norm": "frozen"}
    with pytest.warns(UserWarning, match="distill: the source head has one output.*rehearse="):
        fast.finetune(model, TRAIN, rehearse=0.0, **options)


# Not in the first batch, by which augmentation is recognised.
LATE = int(torch.randperm(300, generator=torch.Generator().manual_seed(0))[-1])


def test_a_view_that_is_not_remembered_is_left_out():
    x = TRAIN[0][:3]
    remembered = Remembered(
        rows=torch.tensor([4, 2, 7]),
        outputs=torch.zeros(3, 5),
        num_samples=9,
        digests=[digest(row) for row in x],
    )
    distillation = Distillation(
        source=nn.Linear(2, 5), weight=1.0, remembered=remembered, pretrained_copy=None
    )
    places = distillation.places(torch.tensor([2, 4, 0, 7]), x[[1, 1, 0, 2]])
    assert places.tolist() == [1, -1, -1, 2]
    assert not distillation.live


def test_a_loop_that_shows_other_views_than_the_data_set_is_told(log):
    """It gave their rows, and nothing of the source's answers was held, in silence."""
    copied = []
    remembered = Remembered(
        rows=torch.tensor([4, 2, 7]),
        outputs=torch.zeros(3, 5),
        num_samples=9,
        digests=[digest(row) for row in TRAIN[0][:3]],
    )
    distillation = Distillation(
        source=nn.Linear(2, 5),
        weight=1.0,
        remembered=remembered,
        pretrained_copy=lambda: copied.append("copy"),
    )
    alone, rows = torch.tensor([4, 0]), torch.tensor([4, 0, 2])
    assert distillation.places(alone, TRAIN[0][5:7]).tolist() == [-1, -1]
    assert not distillation.live
    assert distillation.places(rows, TRAIN[0][5:8]).tolist() == [0, 1, 2]
    assert distillation.live
    assert copied == ["copy"]
    assert "source answers come from a frozen copy" in log.text


def remembering(*positions):
    """Distillation that remembers the answers to samples 4, 2 and 5 of six."""
    torch.manual_seed(0)
    remembered = Remembered(
        rows=torch.tensor([4, 2, 5]),
        outputs=torch.randn(3, *positions, 5),
        num_samples=6,
        inputs=TRAIN[0][:6],
    )
    return Distillation(
        source=nn.Linear(2, 5), weight=0.7, remembered=remembered, pretrained_copy=lambda: None
    )


def seen(places, remembered, features):
    batch = MicroBatch(inputs=None, places=torch.tensor(places), remembered=remembered, source=None)
    inputs = TRAIN[0][: len(places)]
    facts = {"model": None, "step": 0, "inputs": inputs, "source_features": None}
    return Seen(batch=batch, features=features, **facts)


@pytest.mark.parametrize(
    ("positions", "folded"), [((), False), ((1,), False), ((3,), False), ((3,), True)]
)
def test_the_penalty_is_the_mean_divergence_of_what_is_remembered(positions, folded):
    """Four samples are remembered in the whole step, two of them in this micro-batch. A head may
    see the positions of a sample as rows of their own."""
    distillation, features = remembering(*positions), torch.randn(3, *positions, 2)
    before, now = distillation.remembered.outputs[[2, 0]], distillation.source(features[[0, 2]])
    p, q = (x.double().div(2).softmax(-1) for x in (before, now))
    divergence = 4 * (p * (p / q).log()).sum(-1)
    expected = 0.7 * divergence.flatten(1).mean(1).sum() if positions else 0.7 * divergence.sum()
    rows = features.flatten(0, -2) if folded else features
    penalty = distillation.penalty(seen([2, -1, 0], 4.0, rows))
    assert penalty.item() == pytest.approx(expected.item() / 4, rel=1e-5)


@pytest.mark.parametrize("live", [False, True])
def test_a_state_says_whether_answers_come_from_a_copy(live):
    before, after = remembering(), remembering()
    if live:
        before.go_live()
    after.load_state_dict(before.state_dict())
    assert after.live == live


def test_without_anything_remembered_or_seen_there_is_no_penalty():
    assert remembering().penalty(seen([-1, -1], 0.0, torch.randn(2, 2))) is None
    assert remembering().penalty(seen([0, 1], 2.0, None)) is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [([6], r"rows must be in 0\.\.5, .* got 6\.\.6"), ([3, -1], r"0\.\.5, .* got -1\.\.3")],
)
def test_rows_that_the_training_data_do_not_have_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        remembering().check(torch.tensor(rows), TRAIN[0][: len(rows)])


@pytest.mark.parametrize("rows", [[0], [5], [4, 2, 5], []])
def test_inputs_of_the_training_data_are_answered_from_memory(rows):
    distillation, rows = remembering(), torch.tensor(rows, dtype=torch.int64)
    distillation.check(rows, TRAIN[0][rows])
    assert not distillation.live
    assert distillation.places(rows, TRAIN[0][rows]).tolist() == [
        {4: 0, 2: 1, 5: 2}.get(row, -1) for row in rows.tolist()
    ]


def test_one_other_input_makes_the_answers_live():
    distillation, rows = remembering(), torch.tensor([4, 2])
    distillation.check(rows, TRAIN[0][[4, 3]])
    assert distillation.live
    distillation.check(torch.tensor([99]), TRAIN[0][:1])  # whatever the rows
    assert distillation.places(rows, TRAIN[0][[4, 3]]).tolist() == [0, 1]


def test_inputs_of_other_shapes_make_the_answers_live():
    distillation = remembering()
    distillation.check(torch.tensor([4]), TRAIN[0][4:5, :, :4])
    assert distillation.live


@pytest.mark.parametrize(("most", "rows"), [(1, [4, 2]), (40, [4, 2]), (41, [4, 2, 5]), (0, None)])
def test_answers_are_remembered_up_to_their_bytes(monkeypatch, most, rows):
    """Five numbers of four bytes for each sample, added by two and one."""
    monkeypatch.setattr("fast.adapt.guards.distill.MOST_BYTES", most)
    outputs = SourceOutputs(nn.Linear(2, 5), as_data(TRAIN, "train"))
    for index in ([4, 2], [5]):
        outputs.add(torch.zeros(len(index), 2), TRAIN[0][index], torch.tensor(index))
    remembered = outputs.remembered()
    assert (None if remembered is None else remembered.rows.tolist()) == rows


class Mixed(nn.Module):
    """A network that runs under autocast, as Accelerate prepares one."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.network(x).float()


@pytest.mark.parametrize("augmented", [False, True])
def test_the_loop_around_a_network_under_autocast_need_not_be(pretrained, augmented):
    """A Trainer's compute_loss is outside of it, and the source's head was given 16 bits there."""
    model = copy.deepcopy(pretrained)
    adaptation = fast.Adaptation(model, TRAIN, steps=2, distill=1.0, augmented=augmented)
    inputs, _, rows = next(adaptation.batches())
    rows = None if augmented else rows
    logits, penalty = adaptation.forward(inputs, rows, model=Mixed(model))
    assert logits.dtype == penalty.dtype == torch.float32
    _, exact = adaptation.forward(inputs, rows)
    assert abs(penalty - exact) < 1e-2
