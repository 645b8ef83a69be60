"""The head start: when there is one, and what it learns from."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import fast
from fast.adapt.network.head_start import HOLD_OUT, head_is_last, start_head
from fast.heads import calibrate_from, find_head, task_head
from networks import IMAGE_NETWORKS, ConvNet, images

TRAIN, VAL = images(300, 4, seed=1), images(100, 4, seed=2)
KNOWN, ASKED = images(300, 5, seed=3), images(200, 5, seed=4)
RUN = {"steps": 60, "lr": 1e-2, "eval_every": 60}


def is_last(model):
    return head_is_last(model, find_head(model, TRAIN[0]).module, TRAIN[0])


@pytest.mark.parametrize("name", IMAGE_NETWORKS)
def test_whether_the_head_makes_the_logits(name):
    model = IMAGE_NETWORKS[name]()
    assert is_last(model) == (name != "conv head")
    assert not find_head(model, TRAIN[0][:2]).module._forward_hooks


def test_the_head_starts_with_what_features_alone_can_tell(pretrained):
    accuracy = {}
    for steps in (0, 200):
        model = copy.deepcopy(pretrained)
        result = fast.finetune(model, TRAIN, VAL, steps=1, head_steps=steps, stall=1)
        accuracy[steps] = result.history[0]["target_accuracy"]
    assert accuracy[0] < 0.5 < 0.8 < accuracy[200]


def new_head(features, classes=3):
    """A head for these features, normalised by them."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(features.shape[1], 4))
    head = task_head(fast.replace_head(model, classes, sample=features[:2]))
    calibrate_from(head.norm, [features])
    return head


def held_out_loss(features, labels, steps):
    head = new_head(features)
    start_head(head, features, labels, loss=F.cross_entropy, steps=steps, seed=0)
    held = slice(HOLD_OUT - 1, None, HOLD_OUT)
    with torch.no_grad():
        return F.cross_entropy(head.eval()(features[held]), labels[held]).item()


def test_the_head_learns_on_normalised_features():
    labels = torch.arange(100) % 3
    features = 50 + 1e-3 * (F.one_hot(labels, 3) + 0.1 * torch.randn(100, 3))
    assert held_out_loss(features, labels, steps=200) < 0.05


def test_a_head_that_learns_by_heart_goes_back_to_where_others_were_answered_best():
    labels = torch.randint(3, (100,))
    features = torch.randn(100, 50)
    losses = [held_out_loss(features, labels, steps) for steps in (20, 40, 60, 200)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == losses[-2]  # two looks without a better one end it


@pytest.mark.parametrize(("steps", "looks"), [(1, 1), (20, 1), (45, 3)])
def test_others_are_asked_every_twenty_steps_and_at_the_end(steps, looks):
    asked = []

    def loss(logits, labels):
        if not torch.is_grad_enabled():
            asked.append(len(labels))
        return F.cross_entropy(logits, labels)

    labels = torch.arange(100) % 3
    features = F.one_hot(labels, 3) + 0.1 * torch.randn(100, 3)
    head = new_head(features)
    start_head(head, features, labels, loss=loss, steps=steps, seed=0)
    assert asked == [20] * looks
    assert head.linear.weight.any()


@pytest.mark.parametrize("samples", [3, 4])
def test_of_few_samples_none_is_held_out(samples):
    features, labels = torch.randn(samples, 8), torch.arange(samples) % 3
    head = new_head(features)
    start_head(head, features, labels, loss=F.cross_entropy, steps=200, seed=0)
    with torch.no_grad():
        assert F.cross_entropy(head.eval()(features), labels) < 0.05


def test_class_weights_hold_for_the_head_start():
    answers = {}
    for weight in (0.0, 1.0):
        config = {"num_classes": 4, "class_weights": (weight, 1.0, 1.0, 1.0)}
        result = fast.finetune(ConvNet(), TRAIN, VAL, steps=1, stall=1, **config)
        with torch.no_grad():
            answers[weight] = (result.model(VAL[0]).argmax(1) == 0).float().mean().item()
    assert answers[0.0] < 0.5 * answers[1.0]


class InPlace(ConvNet):
    """What follows its head works in place, on the tensor that the head has made."""

    def __init__(self, what) -> None:
        super().__init__()
        self.what = what

    def forward(self, x):
        return self.what(super().forward(x))


def test_what_follows_the_head_in_place_is_seen():
    """A head that was taught without it had logits twenty times too large in the first step."""
    assert not is_last(InPlace(lambda z: z.mul_(20)))
    assert is_last(InPlace(lambda z: z))
    with pytest.raises(ValueError, match="returns probabilities"):
        is_last(InPlace(torch.sigmoid_))


def test_the_head_stops_at_the_second_look_that_is_worse_in_a_row():
    """And leaves no gradient for the first step of a loop."""
    told, taken = iter([3.0, 2.0, 2.5, 1.0, 1.5, 1.6, 0.1]), []
    features, labels = torch.randn(100, 8), torch.arange(100) % 3
    head = new_head(features)

    def loss(logits, y):
        if torch.is_grad_enabled():
            return F.cross_entropy(logits, y)
        taken.append(head.linear.weight.detach().clone())
        return torch.tensor(next(told))

    start_head(head, features, labels, loss=loss, steps=400, seed=0)
    assert len(taken) == 6
    assert torch.equal(head.linear.weight, taken[3])
    assert all(p.grad is None for p in head.parameters())


@pytest.mark.parametrize(("taught", "ramp"), [(20, 7), (0, 0)])
def test_a_head_that_was_taught_rises_with_the_backbone(taught, ramp):
    """Adam's first step at the full rate would undo what it has learned."""
    adaptation = fast.Adaptation(ConvNet(), TRAIN, steps=5, ramp=7, head_steps=taught)
    heads = [g for g in adaptation.optimizer.param_groups if g["name"].startswith("head")]
    assert heads
    assert {group["ramp"] for group in heads} == {ramp}
