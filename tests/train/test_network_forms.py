"""Networks whose head is not simply the last layer of one row per sample."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fast
from fast.heads import by_sample, folds_positions, forward_logits, task_head
from fast.train.saved import load_saved
from networks import ConvHead, images

TRAIN, VAL, KNOWN = images(100, 4, seed=1), images(40, 4, seed=2), images(80, 5, seed=3)


class Positions(nn.Module):
    """Answers the mean over the 8 rows of an image, which go through the head as `fold` says."""

    fold = "positions in a dimension of their own"

    def __init__(self):
        super().__init__()
        self.embed, self.fc = nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, x):
        return self.fc(torch.relu(self.embed(x.squeeze(1)))).mean(1)


class Folded(Positions):
    """The batch of the head is samples times positions."""

    def forward(self, x):
        rows = torch.relu(self.embed(x.squeeze(1))).flatten(0, 1)
        return self.fc(rows).view(len(x), 8, -1).mean(1)


class Mixed(Positions):
    """The first positions of all samples come first."""

    def forward(self, x):
        rows = torch.relu(self.embed(x.squeeze(1))).transpose(0, 1).flatten(0, 1)
        return self.fc(rows).view(8, len(x), -1).mean(0)


class Last(Positions):
    """Counts the samples by its inputs to pick one position of each, as GPT-2 does."""

    def forward(self, x):
        return self.fc(torch.relu(self.embed(x.squeeze(1))))[torch.arange(len(x)), -1]


class Ends(nn.Sequential):
    def __init__(self, *ending, head=None):
        head = head or nn.Linear(16, 5)
        super().__init__(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), head, *ending)


class Padded(nn.Module):
    """Eight outputs, of which the first `kept` count."""

    def __init__(self, kept=5):
        super().__init__()
        self.body, self.fc, self.kept = nn.Linear(64, 16), nn.Linear(16, 8), kept

    def forward(self, x):
        return self.fc(self.body(x.flatten(1)).relu())[:, : self.kept]


def run(kind, **options):
    torch.manual_seed(0)
    return fast.finetune(kind(), **({"train": TRAIN, "val": VAL, "steps": 6, "lr": 1e-2} | options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"source_inputs": KNOWN},
        {"source_inputs": KNOWN[0], "grad_accum_steps": 4},
        {"train": DataLoader(TensorDataset(*TRAIN), 25), "num_classes": 4, "distill": 1.0},
    ],
    ids=["distilling", "rehearsing", "in parts", "without row numbers"],
)
def test_rows_of_a_sample_count_as_one_however_they_are_laid_out(options):
    plain, folded = (run(kind, **options) for kind in (Positions, Folded))
    pairs = zip(plain.model.state_dict().values(), folded.model.state_dict().values(), strict=True)
    assert all(torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-5) for a, b in pairs)
    assert folded.history[-1]["loss"] == pytest.approx(plain.history[-1]["loss"], rel=1e-4)


def test_rows_by_sample():
    rows = torch.arange(12.0).view(6, 2)
    assert by_sample(rows, 6) is rows
    assert torch.equal(by_sample(rows, 3)[1], rows[2:4])
    with pytest.raises(ValueError, match="6 rows of 4 samples"):
        by_sample(rows, 4)


def test_mixed_rows_are_refused_where_they_matter():
    with pytest.raises(ValueError, match=r"rows of several samples mixed.*rehearse=0"):
        run(Mixed)
    assert run(Mixed, distill=0.0, rehearse=0.0).target_accuracy is not None
    model = fast.replace_head(Folded(), 4, sample=TRAIN[0])
    assert folds_positions(model, task_head(model), TRAIN[0])


def test_source_rows_run_apart_where_the_network_counts_its_inputs():
    """In one batch with the target's, they would be cut off before it counts."""
    result = run(Last, source_inputs=KNOWN, steps=40)
    assert result.history[-1]["loss"] < result.history[1]["loss"]


def test_a_log_softmax_may_follow_the_head():
    torch.manual_seed(0)
    plain = Ends()
    logged = Ends(nn.LogSoftmax(1))
    logged.load_state_dict(plain.state_dict())
    options = {"steps": 6, "lr": 1e-2, "stall": 2, "head_steps": 0, "source_inputs": KNOWN}
    ends = [fast.finetune(m, TRAIN, VAL, **options).model for m in (plain, logged)]
    a, b = (forward_logits(m, VAL[0]).log_softmax(1) for m in ends)
    assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("method", ["fast", "vanilla"])
def test_probabilities_are_refused(method):
    with pytest.raises(ValueError, match=r"Ends returns probabilities .a softmax follows its head"):
        fast.finetune(Ends(nn.Softmax(1)), TRAIN, steps=2, method=method)


def test_a_padded_head_is_found_and_a_cut_that_loses_classes_is_said():
    assert run(Padded, steps=40).target_accuracy > 0.5
    start = Padded(kept=3)
    with pytest.raises(ValueError, match=r"head of 4 classes at fc the logits have shape \[2, 3\]"):
        fast.finetune(start, TRAIN, steps=2)
    assert isinstance(start.fc, nn.Linear)


def test_a_head_without_bias_is_saved_with_the_one_it_needs(tmp_path):
    torch.manual_seed(0)
    start = Ends(head=nn.Linear(16, 5, bias=False))
    result = fast.finetune(copy.deepcopy(start), TRAIN, VAL, steps=6, source_inputs=KNOWN)
    result.save(tmp_path)
    assert set(load_file(tmp_path / "source_head.safetensors")) == {"weight"}
    saved = load_saved(tmp_path, copy.deepcopy(start), VAL[0])
    result.model.eval()
    assert torch.allclose(saved.target.eval()(VAL[0]), result.model(VAL[0]), atol=1e-5)
    with fast.source_task(result.model):
        assert torch.allclose(saved.source.eval()(VAL[0]), result.model(VAL[0]), atol=1e-5)


def test_head_steps_are_for_heads_that_come_last():
    with pytest.raises(ValueError, match="head_steps: something follows the head"):
        fast.finetune(ConvHead(), TRAIN, steps=2, head_steps=50)
    torch.manual_seed(0)
    options = {"method": "vanilla", "steps": 1, "stall": 1}
    loss = {n: run(Ends, head_steps=n, **options).history[0]["target_loss"] for n in (0, 200)}
    assert loss[200] < 0.5 * loss[0]
