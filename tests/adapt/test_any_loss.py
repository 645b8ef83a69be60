"""Losses and labels of any kind, and a head that is kept."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fast
from networks import ConvNet, images

X, Y = images(200, 4, seed=1)
SOURCE = images(120, 5, seed=3)


def adapt(model, train, criterion, *, mixed=None, **options):
    """A plain loop; returns the result, and the loss of each step."""
    torch.manual_seed(0)
    adaptation = fast.Adaptation(model, train, **({"steps": 40, "lr": 1e-2} | options))
    scheduler, losses = adaptation.scheduler(), []
    model.train()
    for inputs, y, index in adaptation.batches():
        if mixed is not None:
            inputs, y = mixed(inputs, y)
        logits, penalty = adaptation.forward(inputs, index)
        value = criterion(logits, y)
        (value + penalty).backward()
        adaptation.optimizer.step(), scheduler.step(), adaptation.optimizer.zero_grad()
        losses.append(value.item())
    return adaptation.finish(), losses


def kept(result, pretrained):
    """Share of source inputs that are answered as before."""
    model = result.model.eval()
    with torch.no_grad(), fast.source_task(model):
        return (model(SOURCE[0]).argmax(1) == pretrained(SOURCE[0]).argmax(1)).float().mean()


def test_mixup_with_soft_labels(pretrained):
    def mixup(inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        share, order = torch.rand(()), torch.randperm(len(labels))
        soft = F.one_hot(labels, 4).float()
        return share * inputs + (1 - share) * inputs[order], share * soft + (1 - share) * soft[
            order
        ]

    options = {"source_inputs": SOURCE[0], "augmented": True}
    result, _ = adapt(copy.deepcopy(pretrained), (X, Y), F.cross_entropy, mixed=mixup, **options)
    with torch.no_grad():
        assert (result.model(X).argmax(1) == Y).float().mean() > 0.8
    assert kept(result, pretrained) > 0.9


def test_several_labels_at_once(pretrained):
    labels = torch.stack([Y == 0, Y >= 1, Y % 2 == 1], 1).float()
    bce = F.binary_cross_entropy_with_logits
    options = {"loss": bce, "source_inputs": SOURCE[0]}
    result, _ = adapt(copy.deepcopy(pretrained), (X, labels), bce, **options)
    assert result.plan.head_steps > 0  # the head start has the same loss
    with torch.no_grad():
        assert ((result.model(X) > 0) == (labels > 0)).float().mean() > 0.9
    assert kept(result, pretrained) > 0.9


def test_regression(pretrained):
    target = X.mean((1, 2, 3)) + Y

    def squared(logits: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(logits.squeeze(1), y)

    options = {"num_classes": 1, "loss": squared, "source_inputs": SOURCE[0]}
    result, losses = adapt(copy.deepcopy(pretrained), (X, target), squared, **options)
    assert losses[-1] < 0.3 * target.var()
    assert kept(result, pretrained) > 0.9


class Tokens(nn.Module):
    """Classes of each token, `[B, T, V]`."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.mix = nn.Conv1d(16, 16, 3, padding=1)
        self.norm = nn.LayerNorm(16)
        self.classifier = nn.Linear(16, classes)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = x + self.mix(x.transpose(1, 2)).transpose(1, 2).relu()
        return self.classifier(self.norm(x))


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("options", [{}, {"distill": 0.1}, {"source_inputs": True}])
def test_a_class_for_each_token(options):
    torch.manual_seed(0)
    model, ids = Tokens(), torch.randint(20, (160, 7))
    if "source_inputs" in options:
        options = {"source_inputs": torch.randint(20, (60, 7))}
    labels = ids % 4
    result, losses = adapt(
        model, (ids, labels), token_loss, num_classes=4, loss=token_loss, steps=120, **options
    )
    assert result.model(ids).shape == (160, 7, 4)
    assert losses[-1] < 0.5 * losses[0]


def shifted(x: Tensor) -> Tensor:
    """Pale pictures, of which the network gets a sixth right."""
    return 0.3 * x + 0.8


def test_a_head_that_is_kept_goes_on_with_its_own_task(pretrained):
    """Another look of the same classes: learned, and the first look kept."""
    x, y = SOURCE
    train = (shifted(x), y)
    accuracy = {}
    for name, options in {
        "plain": {"method": "vanilla"},
        "fast": {"source_inputs": images(200, 5, seed=9)[0]},
    }.items():
        result, _ = adapt(
            copy.deepcopy(pretrained),
            train,
            F.cross_entropy,
            head="keep",
            steps=80,
            lr=3e-3,
            **options,
        )
        assert result.plan.head == "keep"
        assert isinstance(result.model.decide, nn.Linear)  # nothing of ours is in it
        with torch.no_grad():
            accuracy[name] = [
                (result.model(inputs).argmax(1) == y).float().mean().item()
                for inputs in (train[0], x)
            ]
    assert accuracy["fast"][0] > 0.95
    assert accuracy["fast"][1] > accuracy["plain"][1] + 0.03


def test_a_head_that_is_kept_is_held_like_the_rest(pretrained):
    adaptation = fast.Adaptation(
        copy.deepcopy(pretrained), SOURCE, head="keep", steps=5, anchor_decay=3.0, stall=2, ramp=4
    )
    groups = adaptation.optimizer.param_groups
    assert [g["name"] for g in groups if "head" in g["name"]]
    assert all(g["name"].startswith("backbone") for g in groups)
    assert {(g["anchor_decay"], g["stall"], g["ramp"]) for g in groups} == {(3.0, 2, 4)}


def test_finetune_keeps_a_head_too(pretrained):
    x, y = SOURCE
    train = (shifted(x), y)
    model = copy.deepcopy(pretrained)
    options = {"head": "keep", "source_inputs": images(200, 5, seed=9)[0]}
    result = fast.finetune(model, train, train, SOURCE, steps=80, lr=3e-3, **options)
    assert result.target_accuracy > 0.95
    assert result.source_accuracy > 0.7
    assert result.history[0]["source_accuracy"] == result.source_accuracy_before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_entropy": True}, "max_entropy is for a new head"),
        ({"head_steps": 9}, "head_steps is for a new head"),
        ({"head_lr_scale": 2.0}, "head_lr_scale is for a new head"),
        ({"method": "lp-ft"}, "method 'lp-ft' trains a new head first"),
        ({"batch_norm": "per_task"}, "batch_norm='per_task' tells two tasks apart"),
        ({"rehearse": 1.0}, "rehearse holds the features of target inputs"),
        ({"num_classes": 4}, "num_classes=4, and the head that is kept has 5 outputs"),
    ],
)
def test_what_a_kept_head_has_no_use_for_is_refused(pretrained, options, message):
    model = copy.deepcopy(pretrained)
    with pytest.raises(ValueError, match=message):
        fast.Adaptation(model, SOURCE, head="keep", steps=5, **options)


def test_labels_that_no_one_can_count(pretrained):
    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(logits.squeeze(1), y)

    with pytest.raises(ValueError, match="labels do not say how many outputs the head needs"):
        fast.Adaptation(copy.deepcopy(pretrained), (X, X.mean((1, 2, 3))), loss=loss, steps=2)
    with pytest.raises(ValueError, match="whole numbers"):
        fast.Adaptation(ConvNet(), (X, X.mean((1, 2, 3))), steps=2)


def test_whole_labels_are_counted_for_a_loss_of_the_users_own(pretrained):
    options = {"loss": F.cross_entropy, "steps": 2}
    adaptation = fast.Adaptation(copy.deepcopy(pretrained), (X, Y), **options)
    assert adaptation.num_classes == 4


@pytest.mark.parametrize(
    ("number", "error", "message"),
    [
        (0, ValueError, "num_classes must be at least 1; got 0"),
        (10**9, ValueError, "num_classes must be at most 1000000"),
        (2.5, TypeError, r"num_classes must be a whole number; got 2\.5"),
    ],
)
def test_a_number_of_outputs_that_no_head_has_is_refused(pretrained, number, error, message):
    options = {"loss": F.cross_entropy, "num_classes": number, "steps": 2}
    with pytest.raises(error, match=message):
        fast.Adaptation(copy.deepcopy(pretrained), (X, Y), **options)


@pytest.mark.parametrize(
    ("loss", "labels", "message"),
    [
        (F.binary_cross_entropy_with_logits, Y[:, None] == torch.arange(4), "loss fails on logits"),
        (
            lambda logits, y: F.cross_entropy(logits, y, reduction="none"),
            Y,
            "the mean over a batch",
        ),
        (
            nn.CrossEntropyLoss(reduction="sum"),
            Y,
            "a sum, which doubles with the samples .reduction='mean'",
        ),
        (lambda logits, y: 1.0, Y, "the mean over a batch, one number; got float"),
        ("bce", Y, "loss must be a function of logits and labels; got 'bce'"),
    ],
)
def test_a_loss_that_does_not_fit_is_told_before_the_first_step(pretrained, loss, labels, message):
    model = copy.deepcopy(pretrained)
    with pytest.raises((TypeError, ValueError), match=message):
        fast.Adaptation(model, (X, labels), loss=loss, num_classes=4, steps=3)
    weights = zip(model.parameters(), pretrained.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


@pytest.mark.parametrize("method", ["fast", "ewc", "replay"])
def test_a_network_that_squeezes_its_one_output_is_told_so(method):
    model = nn.Sequential(nn.Flatten(), nn.Linear(X[0].numel(), 1), nn.Flatten(0))
    with pytest.raises(ValueError, match=r"answers with shape \[\d+\] .* logits \[B, C\]"):
        fast.Adaptation(model, (X, Y), source_inputs=SOURCE[0], method=method, steps=2)
