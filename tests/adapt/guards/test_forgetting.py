"""What a forgetting budget counts: answers and features on held-back source inputs."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fast
from fast.adapt.config import Budget
from fast.adapt.guards.forgetting import TEMPERATURE, ForgettingMeter, by_neighbours, hold_back
from fast.curvature.card.answers import divergence, expected_rise
from fast.data.source_inputs import SourceInputs
from networks import ConvNet, images

X, Y = images(60, 5, seed=4)


@pytest.fixture
def networks():
    """One, and the same after a step; the second also answers another task by now."""
    torch.manual_seed(0)
    before = ConvNet().eval()
    now = copy.deepcopy(before)
    fast.replace_head(now, 3, sample=X[:2])
    with torch.no_grad():
        now.project.weight += 0.3 * torch.randn_like(now.project.weight)
    return before, now.eval()


def answers(networks):
    before, now = networks
    with torch.no_grad(), fast.source_task(now):
        return before(X), now(X)


def test_without_labels_the_meter_doubts_the_answers(networks):
    """Twice the divergence at temperature 2."""
    meter = ForgettingMeter(networks[0], SourceInputs.parse(X, 60), points=False)
    p, q = ((z.double() / 2).log_softmax(1) for z in answers(networks))
    assert meter(networks[1]) == pytest.approx(2 * (p.exp() * (p - q)).sum(1).mean().item())
    part = 2 * (p.exp() * (p - q)).sum(1)[:20].mean().item()
    assert meter(networks[1], 20) == pytest.approx(part)
    assert meter(networks[0]) == 0


def test_with_labels_it_is_the_rise_of_the_loss(networks):
    meter = ForgettingMeter(networks[0], SourceInputs.parse((X, Y), 60), points=False)
    z0, z = answers(networks)
    expected = F.cross_entropy(z, Y) - F.cross_entropy(z0, Y)
    assert meter(networks[1]) == pytest.approx(expected.item(), rel=1e-5)
    assert meter(networks[0]) == 0


@pytest.mark.parametrize("size", [0.01, 30.0])
def test_doubt_matters_for_small_losses_only(size):
    """The answers are sure, and the margin of each is lost by `size`."""
    z0 = torch.zeros(4, 2)
    z0[:, 0] = 8.0
    z = z0.clone()
    z[:, 1] += size
    plain, doubted = divergence(z0, z).item(), expected_rise(z0, z).item()
    if size > 1:
        assert doubted == pytest.approx(plain, rel=0.05)
    else:
        assert doubted > 20 * plain


def test_points_are_the_accuracy_lost(networks):
    z0, z = answers(networks)
    labelled = ForgettingMeter(networks[0], SourceInputs.parse((X, Y), 60), points=True)
    right = [(a.argmax(1) == Y).double().mean().item() for a in (z0, z)]
    assert labelled(networks[1]) == pytest.approx(right[0] - right[1])
    bare = ForgettingMeter(networks[0], SourceInputs.parse(X, 60), points=True)
    p = z0.double().softmax(1)
    rows = range(60)
    expected = (p.amax(1) - p[rows, z.argmax(1)]).mean().item()
    assert expected > 0
    assert bare(networks[1]) == pytest.approx(expected)


def test_neighbours_leave_the_sample_itself_out():
    features = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.8, 0.6]]), dim=1)
    labels = torch.tensor([0, 1, 1, 0])
    z = TEMPERATURE * by_neighbours(features, labels)
    # The first sample: its class but for itself is the fourth; the mean of the other class.
    assert z[0, 0].item() == pytest.approx(0.8)
    mean = F.normalize(torch.tensor([0.6, 1.8]), dim=0)
    assert z[0, 1].item() == pytest.approx(mean[0].item())
    alone = by_neighbours(features, None).softmax(1)
    assert alone.diagonal().max() == 0
    assert alone[0].argmax() == 3


@pytest.mark.parametrize("labels", [Y % 3, None])
def test_features_of_a_network_whose_head_does_not_count(networks, labels):
    """A head of noise: what is lost by neighbourhood does not depend on it."""
    before, now = networks
    data = X if labels is None else (X, labels)
    meter = ForgettingMeter(before, SourceInputs.parse(data, 60), points=False, skill="features")
    lost = meter(now)
    assert lost != 0
    assert meter(now, 20) == lost  # each is compared with all others
    with torch.no_grad():
        now.decide.source.weight.normal_()
        now.decide.linear.weight.normal_()
    assert meter(now) == pytest.approx(lost)


def test_labels_that_the_head_cannot_give(networks):
    for more, others in ((0, False), (1, True)):  # up to 4 and up to 5, of a head of 5 classes
        samples = SourceInputs.parse((X, Y + more), 60)
        assert ForgettingMeter(networks[0], samples, points=False).by_features == others
    samples = SourceInputs.parse((X, Y + 4), 60)
    with pytest.raises(ValueError, match=r"label 8, and the source head has 5 classes.*features"):
        ForgettingMeter(networks[0], samples, points=False, skill="answers")
    alone = torch.arange(60)
    one_pair = alone.clone()
    one_pair[1] = 0
    for labels, classes in ((alone, 60), (one_pair, 59)):
        samples = SourceInputs.parse((X, labels), 60)
        with pytest.raises(ValueError, match=f"60 held-back samples of {classes} classes"):
            ForgettingMeter(networks[0], samples, points=False)


class Tokens(nn.Module):
    """A head that sees each row of a picture by itself; its answers are averaged if `mean`."""

    def __init__(self, mean):
        super().__init__()
        self.body, self.fc, self.mean = nn.Linear(8, 6), nn.Linear(6, 5), mean

    def forward(self, x):
        logits = self.fc(self.body(x).flatten(0, 2))
        return logits.unflatten(0, x.shape[:3]).mean((1, 2)) if self.mean else logits


@pytest.mark.parametrize("data", [X, (X, Y)])
@pytest.mark.parametrize(
    ("mean", "skill", "message"),
    [
        (True, "features", "480 feature vectors of 60 samples.*set source_skill='answers'"),
        (False, "auto", r"answers 60 samples with 480 rows of logits.*return \[B, C"),
    ],
)
def test_each_sample_needs_one_answer(data, mean, skill, message):
    with pytest.raises(ValueError, match=message):
        ForgettingMeter(Tokens(mean), SourceInputs.parse(data, 60), points=False, skill=skill)


def test_answers_have_to_be_finite(networks):
    with torch.no_grad():
        networks[0].decide.bias[0] = math.inf
    with pytest.raises(ValueError, match="answers to them are not finite"):
        ForgettingMeter(networks[0], SourceInputs.parse(X, 60), points=False)


def test_a_label_that_the_head_cannot_give_counts_wherever_it_is(networks):
    """Also where it is not among the samples held back to measure on."""
    network = copy.deepcopy(networks[0])
    first, meter = hold_back(network, SourceInputs.parse((X, Y % 2), 60), budget=None, skill="auto")
    assert (first.size, meter.size) == (30, 30)
    assert not meter.by_features
    labels = Y % 2
    labels[0] = 7
    _, meter = hold_back(network, SourceInputs.parse((X, labels), 60), budget=None, skill="auto")
    assert int(meter.samples.labels.max()) < 5
    assert meter.by_features


@pytest.mark.parametrize(("budget", "held"), [(None, 128), (Budget(amount=0.1), 512)])
@pytest.mark.parametrize("samples", [60, 1200])
def test_a_budget_is_checked_on_more_inputs_but_at_most_on_half(networks, budget, held, samples):
    kept = SourceInputs.parse(X.repeat(samples // 60, 1, 1, 1), samples)
    first, meter = hold_back(networks[0], kept, budget=budget, skill="auto")
    assert meter.size == min(held, samples // 2)
    assert first.size == samples - meter.size
