"""Distillation: what is remembered of one view of a sample holds for no other."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fast
from fast.adapt.guards.base import MicroBatch, Seen, SourceBatch
from fast.adapt.guards.distill import Distillation, Remembered, digest
from fast.adapt.guards.rehearse import LOOSEST, TOLERANCE, Rehearsal
from fast.data.source_inputs import SourceInputs
from fast.heads import task_head
from networks import images

TRAIN, VAL = images(300, 4, seed=1), images(100, 4, seed=2)
KNOWN, ASKED = images(300, 5, seed=3), images(200, 5, seed=4)
RUN = {"steps": 60, "lr": 1e-2, "eval_every": 60}


@pytest.mark.parametrize("parts", [1, 2])
def test_how_far_features_are_is_a_mean_over_samples_and_steps(pretrained, parts):
    model = fast.replace_head(copy.deepcopy(pretrained), 4, sample=TRAIN[0])
    samples = SourceInputs.parse(KNOWN[0], 300)
    head = task_head(model)
    rehearsal = Rehearsal(
        model=model, head=head, samples=samples, name="", size=8, weight=1.0, seed=0
    )
    before = rehearsal.features[:8]

    def penalty(reference, features):
        source = SourceBatch(inputs=None, reference=reference, total=1)
        batch = MicroBatch(inputs=None, places=torch.empty(0), remembered=0, source=source)
        return rehearsal.penalty(
            Seen(
                model=model,
                step=0,
                batch=batch,
                inputs=None,
                features=None,
                source_features=features,
            )
        )

    step = torch.full_like(before, (0.4 / rehearsal.scale) ** 0.5)
    step[4:] *= 0.5
    for _ in range(100):
        for part in torch.arange(8).chunk(parts):
            penalty(before[part], (before + step)[part])
        rehearsal.after_step(1)
    assert rehearsal.moved == pytest.approx(0.25, rel=1e-3)
    assert rehearsal.restraint == pytest.approx(TOLERANCE / 0.25, rel=1e-3)
    rehearsal.after_step(2)  # a step without source inputs
    assert rehearsal.moved == pytest.approx(0.25, rel=1e-3)
    for weight, more in ((0.8, 1.25), (0.5, 2.0), (0.01, LOOSEST), (10.0, 1.0)):
        rehearsal.weight = weight  # what is held less may move more, within limits
        penalty(before, before + step)
        rehearsal.after_step(3)
        assert rehearsal.restraint == pytest.approx(more * TOLERANCE / 0.25, rel=1e-3)
    rehearsal.weight = 1.0
    # A pull that no longer grows: three times that of plain feature distillation.
    far = (before + 10 * step).requires_grad_()
    penalty(before, far).backward()
    plain = before.clone().add_(10 * step).requires_grad_()
    (rehearsal.scale * (plain - before).square().mean(1)).sum().backward()
    assert torch.allclose(far.grad, 3 * plain.grad, rtol=1e-4)


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
