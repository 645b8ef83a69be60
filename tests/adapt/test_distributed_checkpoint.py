"""A loop of one's own through torch.distributed.checkpoint, in one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F

import fast
from fast.adapt.guards.pace import Pace
from networks import ConvNet, images
from torch_checkpoints import load, states

TRAIN, SOURCE = images(96, 4, seed=1), images(60, 5, seed=3)[0]
STEPS = 6
RUNS = {
    "fast": {},
    "ewc": {"method": "ewc"},
    "vanilla": {"method": "vanilla"},
    "replay": {"method": "replay"},
    "sgd": {"method": "vanilla", "optimizer": "sgd"},
    "a stall, and an optimizer of the user": {"stall": 2, "optimizer": torch.optim.AdamW},
    "a card, and an optimizer of the user": {"method": "ewc", "optimizer": torch.optim.AdamW},
}
# Both are torch's own; the second comes from old versions such as 2.6.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is", "ignore:TypedStorage")


def adapted(**options):
    torch.manual_seed(1)
    model = ConvNet()
    options = {"source_inputs": SOURCE, "steps": STEPS, "batch_size": 32} | options
    return fast.Adaptation(model, TRAIN, **options)


def take(adaptation, steps=STEPS):
    optimizer, scheduler = adaptation.optimizer, adaptation.scheduler()
    adaptation.model.train()
    for (inputs, labels, rows), _ in zip(adaptation.batches(), range(steps), strict=False):
        logits, penalty = adaptation.forward(inputs, rows)
        (F.cross_entropy(logits, labels) + penalty).backward()
        optimizer.step(), scheduler.step(), optimizer.zero_grad()


@pytest.mark.parametrize("name", RUNS)
def test_goes_on_as_if_it_had_never_stopped(name, tmp_path):
    first = adapted(**RUNS[name])
    take(first, 3)
    dcp.save(states(first), checkpoint_id=tmp_path)
    take(first)

    second = adapted(resuming=True, **RUNS[name])
    load(second, tmp_path)
    take(second)
    weights = second.finish().model.state_dict()
    for key, value in first.finish().model.state_dict().items():
        assert torch.equal(weights[key], value), key


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.filterwarnings("error")
def test_reading_a_fresh_state_is_no_step(name):
    adaptation = adapted(**RUNS[name])
    states(adaptation)
    assert adaptation.done == 0
    assert all(guard.pace is None for guard in adaptation.guards if isinstance(guard, Pace))
    take(adaptation)
    assert adaptation.done == STEPS
