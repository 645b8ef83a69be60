"""Runs that diverge: said where it happened, and what was saved before stays."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fast
from fast.data.dataset import as_data
from fast.models.saved import list_checkpoints
from fast.train import measure
from fast.train.step import TrainStep
from networks import ConvNet, images

TRAIN, VAL = images(200, 4, seed=1), images(60, 4, seed=2)


def spoiled(monkeypatch, at, weights_too):
    """The loss of step `at` (0-based) is NaN; or the weights are after it, and the loss is not."""
    step = TrainStep.__call__

    def spoiling(self, *batch):
        loss = step(self, *batch)
        now = self.adaptation.done - 1 == at
        if now and weights_too:
            self.adaptation.params[0].data.fill_(math.nan)
        elif now:
            loss = loss * math.nan
        return loss

    monkeypatch.setattr(TrainStep, "__call__", spoiling)


@pytest.mark.parametrize("weights_too", [False, True])
def test_a_diverged_run_leaves_its_last_good_checkpoint(tmp_path, monkeypatch, weights_too):
    spoiled(monkeypatch, 5, weights_too)
    options = {"steps": 20, "eval_every": 10, "save_every": 2, "output": tmp_path / "run"}
    with pytest.raises(FloatingPointError, match=r"lower lr.*checkpoint of step 4 .* left as it"):
        fast.finetune(ConvNet(), TRAIN, VAL, **options)
    (checkpoint,) = list_checkpoints(tmp_path / "run")
    assert checkpoint.name == "checkpoint-00000004"


@pytest.mark.parametrize("output", [False, True])
def test_no_checkpoint_is_spoken_of_where_there_is_none(tmp_path, monkeypatch, output):
    spoiled(monkeypatch, 1, weights_too=False)
    options = {"output": tmp_path / "run", "save_every": 2} if output else {}
    with pytest.raises(FloatingPointError, match="loss is nan") as error_info:
        fast.finetune(ConvNet(), TRAIN, VAL, steps=20, eval_every=10, **options)
    assert "checkpoint" not in str(error_info.value)


def score(model, data):
    return measure.evaluate(model, as_data(data, "val"), 16, torch.device("cpu"))


def test_answers_that_are_not_finite_are_no_class():
    model = ConvNet()
    x, y = VAL
    broken = x.clone()
    broken[3, 0, 0, 0], broken[40] = math.nan, math.inf
    with pytest.raises(ValueError, match=r"val: .* to 2 of 60 samples .* 2 samples hold NaN"):
        score(model, (broken, y))
    next(model.parameters()).data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"val: .* to 60 of 60 samples .* lower lr"):
        score(model, (x, y))


def test_classes_that_are_ruled_out_are_answers():
    class Masked(nn.Module):
        def forward(self, x):
            return torch.stack([x[:, 0], x[:, 1], torch.full_like(x[:, 0], -math.inf)], 1)

    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert score(Masked(), (x, torch.tensor([0, 1]))).accuracy == 1


def test_source_data_are_named():
    x, y = images(50, 5)
    with pytest.raises(ValueError, match=r"source: .* hold NaN or infinite inputs"):
        fast.finetune(ConvNet(), TRAIN, VAL, source=(x * math.nan, y), steps=2)


def test_an_absurd_loss_at_the_end_is_warned_of(recwarn):
    options = {"method": "lp-ft", "steps": 6, "probe_steps": 1, "eval_every": 3}
    fast.finetune(ConvNet(), TRAIN, VAL, lr=1e-2, **options)
    assert not recwarn.list
    with pytest.warns(
        UserWarning, match=r"loss at the end is .* 1000 times .* Lower lr"
    ) as error_info:
        fast.finetune(ConvNet(), TRAIN, VAL, lr=1e3, **options)
    assert error_info[0].filename == __file__
