"""Noise that drowns what distinguishes the inputs: dropout is off during a run and back after it,
and statistics of batches are not taken."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fast
from fast.adapt.network.noise import (
    added_by_batches,
    added_by_dropout,
    dropout_shares,
    set_dropout,
)
from fast.adapt.network.rollback import RollbackOnError
from fast.heads import find_head
from fast.train.config import TrainConfig
from helpers import same_state
from interruption import Stopped, dying_at
from networks import ConvNet, images

TRAIN, VAL = images(120, 4, seed=1), images(60, 4, seed=2)
RUN = {"steps": 4, "batch_size": 32, "progress": False}
OFF = "dropout is off during this run"


class Paths(nn.Module):
    """Drops in ways of its own, as attention and stochastic depth do."""

    def __init__(self):
        super().__init__()
        self.attention_dropout, self.drop_prob, self.dropout_rate = 0.1, 0.2, 0.9
        self.rnn = nn.GRU(4, 4, 2, dropout=0.3)
        self.drop = nn.Dropout2d(0.4)
        self.none = nn.Dropout(0.0)


class StochasticDepth(nn.Module):
    p = 1.0  # of the class, and nobody's share

    def __init__(self):
        super().__init__()
        self.p = 0.5


def network(pretrained, share=0.9):
    """Its head sees features through a dropout."""
    return nn.Sequential(copy.deepcopy(pretrained), nn.Dropout(share), nn.Linear(5, 5))


def test_every_kind_of_dropout_is_switched_off_and_back():
    model = nn.Sequential(Paths(), StochasticDepth())
    shares = dropout_shares(model)
    assert sorted(share for _, _, share in shares) == [0.1, 0.2, 0.3, 0.4, 0.5]
    set_dropout(shares, 0.0)
    assert dropout_shares(model) == []
    assert model[0].rnn.dropout == model[0].drop.p == 0.0
    assert model[0].dropout_rate == 0.9  # not a name that torch, timm or transformers read
    set_dropout(shares, 1.0)
    assert dropout_shares(model) == shares


def test_what_dropout_adds_is_measured_without_a_trace(pretrained):
    """A share p of features f multiplies the rest by 1 / (1 - p): it adds p / (1 - p) f^2."""
    model = network(pretrained, 0.5).train()
    head = find_head(model, TRAIN[0][:2]).module
    generator, before = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    added = added_by_dropout(model, head, TRAIN[0])
    with torch.no_grad():
        features = model[0].eval()(TRAIN[0])
    expected = features.square().mean() / features.var(0).mean()
    assert added == pytest.approx(float(expected), rel=0.15)
    assert added_by_dropout(model, head, TRAIN[0]) == added
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model[1].training
    assert not head._forward_pre_hooks


@pytest.mark.parametrize(
    ("share", "options", "off"),
    [
        (0.9, {}, True),
        (0.9, {"dropout": True}, False),
        (0.9, {"method": "adapter"}, True),
        (0.9, {"method": "vanilla"}, False),
        (0.9, {"method": "vanilla", "dropout": False}, True),
        (0.9, {"max_entropy": False}, False),
        (0.05, {}, False),
        (0.05, {"dropout": False}, True),
    ],
)
def test_dropout_is_off_where_it_drowns_or_is_not_wanted(pretrained, log, share, options, off):
    if options.get("method") == "adapter":
        pytest.importorskip("peft", reason="peft is not installed")
    model = network(pretrained, share)
    adaptation = fast.Adaptation(model, TRAIN, steps=4, batch_size=32, **options)
    assert (model[1].p == 0.0) == off
    assert (OFF in log.text) == (off and "dropout" not in options)
    adaptation.finish()
    assert model[1].p == share


def test_dropout_is_back_after_a_run_and_after_one_that_fails_to_begin(pretrained):
    model = network(pretrained)
    result = fast.finetune(model, TRAIN, VAL, **RUN)
    assert result.model[1].p == 0.9
    other = network(pretrained)

    def fail(model):
        set_dropout(dropout_shares(model), 0.0)
        raise KeyError

    with pytest.raises(KeyError), RollbackOnError(other):
        fail(other)
    assert other[1].p == 0.9


def test_a_run_without_dropout_draws_nothing(pretrained):
    """It is that of a network that has none."""
    without = nn.Sequential(copy.deepcopy(pretrained), nn.Identity(), nn.Linear(5, 5))
    with_dropout = network(pretrained)
    with_dropout[2].load_state_dict(without[2].state_dict())
    models = [fast.finetune(m, TRAIN, VAL, **RUN).model for m in (with_dropout, without)]
    assert torch.equal(*(m.eval()(VAL[0]) for m in models))


def test_a_resumed_run_drops_what_it_dropped_before(tmp_path):
    run = RUN | {"batch_norm": "per_task"}
    start = nn.Sequential(ConvNet(), nn.BatchNorm1d(5), nn.Dropout(0.9), nn.Linear(5, 5))
    whole = fast.finetune(copy.deepcopy(start), TRAIN, VAL, **run).model
    with dying_at(2), pytest.raises(Stopped):
        fast.finetune(copy.deepcopy(start), TRAIN, VAL, output=tmp_path, save_every=1, **run)
    again = fast.finetune(copy.deepcopy(start), TRAIN, VAL, resume=tmp_path, **run).model
    assert same_state(again, whole)
    assert again[2].p == 0.9


@pytest.mark.parametrize("value", [0.1, "off", 1])
def test_dropout_is_on_or_off(value):
    with pytest.raises(ValueError, match=r"dropout must be True or False; got"):
        TrainConfig(dropout=value)


@pytest.mark.parametrize("size", [64, 2000])
def test_what_statistics_of_a_batch_add_is_measured_without_a_trace(size):
    """The mean of 64 normal numbers varies by 1 / 64, their deviation by half of that. A quarter
    of each batch is the same, and the median of a variance of three draws is 0.7 of its mean."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 2)).train()
    x, generator, before = torch.randn(size, 64), torch.get_rng_state(), model.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    added = added_by_batches(model, model[2], x)
    assert added == pytest.approx(0.7 * 0.75 * 1.5 / 64, rel=0.3)
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not model[2]._forward_pre_hooks
    without = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
    assert added_by_batches(without, without[1], x) == 0.0


def test_noisy_statistics_are_not_the_targets_unless_it_is_asked_for(log, monkeypatch):
    def norms(**options):
        settled = fast.Adaptation(ConvNet(), TRAIN, steps=4, batch_size=32, **options).plan
        return settled.tasks, settled.batch_norm

    said = "the statistics of a batch add 0."
    assert norms() == ("switched", "per_task")
    assert said not in log.text
    monkeypatch.setattr(fast.adapt.setup, "added_by_batches", lambda *_: 0.08)  # DenseNet: 0.07
    assert norms() == ("switched", "per_task")
    monkeypatch.setattr(fast.adapt.setup, "added_by_batches", lambda *_: 0.12)  # MobileNetV3: 0.11
    assert norms() == ("together", "frozen")
    assert said in log.text
    log.clear()
    assert norms(batch_norm="per_task") == ("switched", "per_task")
    assert norms(tasks="together") == ("together", "frozen")
    assert norms(method="vanilla") == ("together", "frozen")
    assert said not in log.text
    with pytest.raises(ValueError, match=r"too noisy \(batch_norm='per_task' takes them anyway"):
        norms(method="vanilla", tasks="switched")
