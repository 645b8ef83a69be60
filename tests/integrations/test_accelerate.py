"""Accelerate: `prepare` wraps the network and the optimizer of an adaptation as they are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fast
from networks import ConvNet, images

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

TRAIN, SOURCE = images(200, 4, seed=1), images(120, 5, seed=3)
STEPS, BATCH = 12, 32


@pytest.fixture(autouse=True)
def _fresh_state():
    """Accelerate keeps its state for the whole process, precision included."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def network(dropout=0.2):
    torch.manual_seed(1)
    model = nn.Sequential(ConvNet(), nn.Dropout(dropout), nn.ReLU(), nn.Linear(5, 5))
    torch.manual_seed(0)
    return model


class MicroBatches(torch.utils.data.IterableDataset):
    """The batches of an adaptation, each in some parts."""

    def __init__(self, adaptation, parts):
        self.adaptation, self.parts = adaptation, parts

    def __iter__(self):
        for inputs, labels, rows in self.adaptation.batches():
            for part in torch.arange(len(labels)).chunk(self.parts):
                yield inputs[part], labels[part], rows[part]


def loader_of(adaptation, parts=1):
    return torch.utils.data.DataLoader(MicroBatches(adaptation, parts), batch_size=None)


class Run:
    def __init__(self, model, **options):
        self.model, self.accelerator = model, accelerate.Accelerator(cpu=True, **options)
        parts = self.accelerator.gradient_accumulation_steps
        self.adaptation = fast.Adaptation(
            model,
            TRAIN,
            source_inputs=SOURCE[0],
            steps=STEPS,
            batch_size=BATCH,
            grad_accum_steps=parts,
            batch_norm="frozen",
            dropout=True,
        )
        self.prepared, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            model,
            self.adaptation.optimizer,
            loader_of(self.adaptation, parts),
            self.adaptation.scheduler(),
        )
        self.accelerator.register_for_checkpointing(self.adaptation)

    def take(self, batches, steps=STEPS):
        accelerator = self.accelerator
        self.model.train()
        for inputs, labels, rows in batches:
            with accelerator.accumulate(self.prepared), accelerator.autocast():
                logits, penalty = self.adaptation.forward(inputs, rows, model=self.prepared)
                accelerator.backward(F.cross_entropy(logits, labels) + penalty)
                self.optimizer.step(), self.scheduler.step(), self.optimizer.zero_grad()
            if self.adaptation.done == steps:
                return self
        raise AssertionError("the loader is too short")


def plain_loop(model):
    options = {"steps": STEPS, "batch_size": BATCH, "batch_norm": "frozen", "dropout": True}
    adaptation = fast.Adaptation(model, TRAIN, source_inputs=SOURCE[0], **options)
    scheduler = adaptation.scheduler()
    model.train()
    for inputs, labels, rows in loader_of(adaptation):
        logits, penalty = adaptation.forward(inputs, rows)
        (F.cross_entropy(logits, labels) + penalty).backward()
        adaptation.optimizer.step(), scheduler.step(), adaptation.optimizer.zero_grad()
    adaptation.finish()
    return model


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def test_a_prepared_loop_is_a_plain_loop():
    run = Run(network())
    run.take(run.loader).adaptation.finish()
    assert same(run.model, plain_loop(network()))
    assert run.optimizer.optimizer.stats()["drift"] > 0


def test_its_checkpoints_go_on_to_the_bit(tmp_path):
    """`save_state` has the random generators, too. Accelerate's loader draws a number of its own
    when it begins again, so that batches of the adaptation take its place here."""
    whole = Run(network())
    whole.take(whole.adaptation.batches())
    half = Run(network())
    half.take(half.adaptation.batches(), 5)
    half.accelerator.save_state(tmp_path)
    resumed = Run(network())
    torch.manual_seed(99)
    resumed.accelerator.load_state(tmp_path)
    assert resumed.adaptation.done == 5
    resumed.take(resumed.adaptation.batches())
    assert same(resumed.model, whole.model)


def test_accumulated_gradients_are_those_of_one_batch():
    run = Run(network(dropout=0.0), gradient_accumulation_steps=2)
    run.take(run.loader).adaptation.finish()
    other = plain_loop(network(dropout=0.0))
    for a, b in zip(run.model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_under_bf16_it_is_nearly_the_same_run():
    run = Run(network(dropout=0.0), mixed_precision="bf16")
    run.take(run.loader).adaptation.finish()
    other, start = plain_loop(network(dropout=0.0)), network(dropout=0.0)
    weights = [m[0].project.weight.detach() for m in (run.model, other, start)]
    assert (weights[0] - weights[1]).norm() < 0.5 * (weights[1] - weights[2]).norm()
