"""The layer that is replaced makes the logits alone; else the network is refused, unchanged."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

import fast
from fast.data.labels import check_num_classes
from fast.heads import find_head, task_head

X = torch.randn(16, 8)


class Net(nn.Module):
    """Ten classes; `answer` makes the logits of features `f` in some way."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer
        self.body, self.a, self.b = nn.Linear(8, 10), nn.Linear(10, 10), nn.Linear(10, 10)
        self.prior, self.scale = nn.Parameter(torch.randn(10)), nn.Parameter(torch.tensor(3.0))
        self.register_buffer("counts", torch.randn(10))
        self.down, self.up = nn.Linear(10, 2, bias=False), nn.Linear(2, 10, bias=False)
        nn.init.zeros_(self.up.weight)
        self.norm, self.one = nn.BatchNorm1d(10), nn.Linear(10, 1)

    def forward(self, x):
        return self.answer(self, self.body(x).relu())


ANSWERS = {
    "mean of two": (lambda s, f: (s.a(f) + s.b(f)) / 2, "two heads .*a, b make them together"),
    "residual": (lambda s, f: f + s.a(f), "residual.*body, a make them together"),
    "learned prior": (lambda s, f: s.a(f) + s.prior, "prior adds to a"),
    "fixed prior": (lambda s, f: s.a(f) + s.counts, "do not come from a alone"),
    "adapter at zero": (lambda s, f: s.a(f) + s.up(s.down(f)), "up, a make them together"),
    "normed logits": (lambda s, f: s.norm(s.a(f)), r"norm\.bias adds to a"),
    "a ReLU": (lambda s, f: s.a(f).relu_(), "do not react to a zero head at a: a ReLU"),
    "no gradient": (lambda s, f: s.a(f).detach(), "do not react to a zero head at a"),
    "two answers": (lambda s, f: (s.a(f), s.b(f)), r"2 answers of shape \[2, 10\].*head='a'"),
    "one number": (lambda s, f: s.one(f).squeeze(1), r"answers with shape \[2\]"),
}


@pytest.mark.parametrize("num_classes", [10, 4])
@pytest.mark.parametrize("name", ANSWERS)
def test_what_one_layer_does_not_make_alone_is_refused(name, num_classes):
    answer, message = ANSWERS[name]
    model = Net(answer)
    before = {n: m for n, m in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        fast.replace_head(model, num_classes, sample=X)
    assert {n: m for n, m in model.named_modules()} == before
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    "answer",
    [
        lambda s, f: s.a(f) * s.scale,
        lambda s, f: (s.a(f) / 2).log_softmax(1),
        lambda s, f: torch.stack([s.a(f), s.a(-f)]).mean(0),
        lambda s, f: (s.a(f), f[:, :3]),
    ],
    ids=["temperature", "log-softmax", "called twice", "features beside it"],
)
@pytest.mark.parametrize("num_classes", [10, 4])
def test_what_only_rescales_a_head_may_follow_it(answer, num_classes):
    model = fast.replace_head(Net(answer), num_classes, sample=X)
    logits = fast.heads.forward_logits(model, X)
    assert logits.shape == (16, num_classes)
    assert torch.allclose(logits.softmax(1), torch.full_like(logits, 1 / num_classes))


def test_the_ways_out_exist():
    two = Net(ANSWERS["two answers"][0])
    data = (X, torch.arange(16) % 4)
    assert fast.finetune(two, data, steps=2, head="a").model.a is task_head(two)
    behind_relu = Net(ANSWERS["a ReLU"][0])
    fast.finetune(behind_relu, data, steps=2, max_entropy=False)
    assert task_head(behind_relu).norm is None
    assert behind_relu(X).shape == (16, 4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "has no layer of that name; .* such as a, b, down, up, one"),
        ("norm", "a BatchNorm1d there"),
        ("body", "adds to body|make them together"),
    ],
)
def test_a_named_head_must_be_one(name, message):
    with pytest.raises(ValueError, match=message):
        fast.replace_head(Net(lambda s, f: s.a(f)), 4, sample=X, head=name)


def test_a_head_can_be_named_without_a_sample():
    model = fast.replace_head(Net(lambda s, f: s.a(f)), 4, head="a")
    assert model.a is task_head(model)


def test_a_network_that_ends_in_features_asks_for_a_head():
    class Features(nn.Module):
        num_classes = 0  # as timm has it

        def __init__(self):
            super().__init__()
            self.block = nn.Linear(8, 8)

        def forward(self, x):
            return x + self.block(x)

    with pytest.raises(ValueError, match=r"no head .num_classes=0. .*nn\.Linear\(8, num_classes\)"):
        fast.replace_head(Features(), 4, sample=X)
    model = fast.replace_head(nn.Sequential(Features(), nn.Linear(8, 5)), 4, sample=X)
    assert model(X).shape == (16, 4)


def test_a_network_that_counts_its_classes_is_named():
    with pytest.raises(ValueError, match=r"head of 4 classes at a the network fails .*on its own"):
        fast.replace_head(Net(lambda s, f: s.a(f).view(-1, 10)), 4, sample=X[:3])


def test_layers_for_training_alone_are_remembered():
    class Auxiliary(Net):
        def forward(self, x):
            f = self.body(x).relu()
            return (self.a(f), self.b(f)) if self.training else self.a(f)

    model = Auxiliary(None)
    assert find_head(model, X).auxiliary == ("b", "up")


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel])
def test_a_wrapped_network_is_looked_into(wrap):
    inner = Net(lambda s, f: s.a(f)).eval()
    model = wrap(inner)
    with torch.no_grad():
        before = model(X)
        assert fast.replace_head(model, 4, sample=X) is model
        assert not model(X).any()
        with fast.source_task(model):
            assert torch.equal(model(X), before)


@pytest.mark.parametrize(
    ("number", "error", "message"),
    [
        (1, ValueError, "at least 2; got 1"),
        (2**63, ValueError, "at most 1000000"),
        (2.0, TypeError, r"whole number; got 2\.0"),
        (None, TypeError, "whole number"),
    ],
)
def test_numbers_of_classes(number, error, message):
    with pytest.raises(error, match=message):
        check_num_classes(number)


def test_features_of_which_nothing_can_be_learned_are_named():
    model = Net(lambda s, f: s.a(f))
    for x, message in (
        (torch.ones(16, 8), "all 16 training inputs the same features"),
        (X * 1e30, r"non-finite features on the training inputs .*up to [0-9]e\+30.*scale"),
    ):
        with pytest.raises(ValueError, match=message):
            fast.replace_head(model, 4, sample=x)
    nn.init.constant_(model.body.bias, -math.inf)
    with pytest.raises(ValueError, match="same features"):
        fast.replace_head(model, 4, sample=X)
    assert isinstance(model.a, nn.Linear)


@pytest.mark.parametrize("kind", ["parametrised", "hooked"])
def test_a_weight_normed_head_is_replaced_and_answers_as_before(kind):
    model = Net(lambda s, f: s.a(f))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the hooked one is torch's old way
        norm = nn.utils.parametrizations if kind == "parametrised" else nn.utils
        norm.weight_norm(model.a)
    before = model(X)
    fast.replace_head(model, 4, sample=X)
    with fast.source_task(model):
        assert torch.equal(model(X), before)
    assert type(fast.fold_head(model).a) is nn.Linear
