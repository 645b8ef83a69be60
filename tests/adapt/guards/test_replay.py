"""The replay baseline: it learns the source's answers beside the target, in any parts."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fast
from fast.adapt.guards.replay import Replay, replay_loss
from fast.data.source_inputs import SourceInputs
from networks import ConvNet, TextNet, images, sentences

TRAIN = images(300, 4, seed=1)
KNOWN, ASKED = images(300, 5, seed=3), images(200, 5, seed=4)


def replayed(model, data, size=50, seed=0):
    samples = SourceInputs.parse(data, 4096)
    return Replay(model=model, samples=samples, batch_size=size, seed=seed)


def lost(pretrained, **options):
    """Rise of the source loss on inputs that were not replayed, in nats."""
    train = (TRAIN[0], (TRAIN[1] + 1) % 4)
    model = copy.deepcopy(pretrained)
    run = {"steps": 60, "lr": 1e-2, "eval_every": 60}
    history = fast.finetune(model, train, source=ASKED, **run, **options).history
    return history[-1]["source_loss"] - history[0]["source_loss"]


@pytest.mark.parametrize("source", [KNOWN, KNOWN[0]], ids=["labelled", "unlabelled"])
def test_replay_forgets_a_fraction_of_what_vanilla_forgets(pretrained, source):
    vanilla = lost(pretrained, method="vanilla")
    assert lost(pretrained, method="replay", source_inputs=source) < 0.2 * vanilla


def test_the_loss_that_a_run_reports_is_the_targets(pretrained):
    adaptation = fast.Adaptation(
        copy.deepcopy(pretrained), TRAIN, method="replay", source_inputs=KNOWN, steps=4
    )
    inputs, _, rows = next(adaptation.batches())
    (part,) = adaptation.parts(inputs, rows, size=64)
    _, reported, beside = adaptation.forward_part(part)
    assert reported == 0
    assert beside > 0
    assert adaptation.forward(inputs, rows)[1] == beside


def test_the_loss_is_least_at_the_answers_themselves(pretrained):
    x, answers = replayed(pretrained, KNOWN[0]).batch(0)
    assert answers.sum(1).allclose(torch.ones(50))
    entropy = -(answers * answers.log()).sum()
    assert replay_loss(pretrained, x, answers).item() == pytest.approx(entropy.item(), rel=1e-4)


def test_labels_are_used_where_there_are_some(pretrained):
    x, answers = replayed(pretrained, KNOWN).batch(0)
    assert answers.dtype == torch.int64
    with torch.no_grad():
        expected = F.cross_entropy(pretrained(x), answers, reduction="sum")
    assert replay_loss(pretrained, x, answers).item() == pytest.approx(expected.item(), rel=1e-5)


def test_batches_depend_on_seed_and_step_alone():
    model = TextNet().eval()
    source = sentences(30, 5, 7)[0]
    first = replayed(model, source, 8, 3)
    batches = [first.batch(step) for step in range(9)]
    assert first.batch(8) is batches[8]
    later = replayed(model, source, 8, 3).batch(8)
    assert torch.equal(batches[8][0]["ids"], later[0]["ids"])
    assert torch.equal(batches[8][1], later[1])
    other = replayed(model, source, 8, 4).batch(8)
    assert not torch.equal(later[0]["ids"], other[0]["ids"])


def test_accumulating_gradients_changes_nothing_but_rounding():
    start = ConvNet().double()
    train, source = (TRAIN[0].double(), TRAIN[1]), KNOWN[0].double()
    runs = []
    for parts in (1, 4):
        model = copy.deepcopy(start)
        options = {"method": "replay", "grad_accum_steps": parts, "source_inputs": source}
        fast.finetune(model, train, steps=6, **options)
        runs.append(nn.utils.parameters_to_vector(model.parameters()))
    assert torch.allclose(*runs, rtol=1e-4, atol=1e-6)


def test_without_source_inputs_it_says_so():
    with pytest.raises(ValueError, match="'replay' trains on source inputs: pass source_inputs="):
        fast.finetune(ConvNet(), TRAIN, method="replay", steps=2)


def test_a_frozen_backbone_leaves_nothing_to_replay(pretrained):
    model = copy.deepcopy(pretrained).requires_grad_(False)
    model.decide.requires_grad_(True)
    with pytest.raises(ValueError, match=r"no parameter of the backbone .* 'replay' to hold"):
        fast.finetune(model, TRAIN, steps=2, method="replay", source_inputs=KNOWN)
