"""Cards and the forgetting budget in a run: what is lost stays inside it, and resumes exactly."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fast
from fast.curvature.answers import SourceInputs
from fast.train.budget import AIM, Controller, Gauge, move_back, share_to_undo
from fast.train.config import Budget
from networks import ConvNet, images

TRAIN, VAL = images(300, 4, seed=1), images(60, 4, seed=2)
KNOWN, ASKED = images(400, 5, seed=3), images(200, 5, seed=4)
RUN = {"steps": 60, "lr": 1e-2, "eval_every": 20}


@pytest.fixture(scope="module")
def pretrained():
    """Knows the source task: 5 places of a bright blob, of which the target names 4 otherwise."""
    torch.manual_seed(0)
    model = ConvNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x, y = KNOWN
    for index in torch.arange(400).repeat(15).split(100):
        optimizer.zero_grad()
        F.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
    return model.eval()


def run(pretrained, **options):
    model = copy.deepcopy(pretrained)
    train = (TRAIN[0], (TRAIN[1] + 1) % 4)
    return fast.finetune(model, train, source=ASKED, **(RUN | options))


def rise(result):
    history = result.history
    return history[-1]["source_loss"] - history[0]["source_loss"]


@pytest.mark.parametrize(
    ("value", "amount", "points"),
    [(0.1, 0.1, False), ("0.25", 0.25, False), ("2%", 0.02, True), (" 0.5 % ", 0.005, True)],
)
def test_a_budget_is_nats_or_points(value, amount, points):
    assert Budget.parse(value) == Budget(pytest.approx(amount), points)


@pytest.mark.parametrize("value", ["much", 0, -1, "0%", "150%", "nan", "inf"])
def test_a_budget_that_is_none(pretrained, value):
    with pytest.raises(ValueError, match=r"forget_budget must be nats .* got"):
        run(pretrained, forget_budget=value, source_inputs=KNOWN[0])


def test_points_of_accuracy(pretrained):
    free = run(pretrained, method="ewc", anchor_decay=1e-6)
    assert free.history[-1]["forgetting"] > 0.2
    kept = run(pretrained, method="ewc", forget_budget="5%", source_inputs=KNOWN)
    assert kept.history[-1]["forgetting"] < 0.12


def test_a_card_alone_gives_forecast_and_budget(pretrained, tmp_path):
    path = tmp_path / "card.safetensors"
    fast.SourceCard.estimate(pretrained, KNOWN[0]).save(path)
    result = run(pretrained, method="ewc", card=str(path), forget_budget=0.05)
    forecasts = [r["forecast"] for r in result.history]
    assert forecasts[0] == 0.0
    assert 0 < forecasts[-1] <= 0.05 * (1 + 1e-6)
    with pytest.raises(ValueError, match="needs source_inputs to check on"):
        run(pretrained, method="ewc", card=path, forget_budget="2%")


def test_a_card_forecasts_for_methods_that_do_not_pull_by_it(pretrained):
    card = fast.SourceCard.estimate(pretrained, KNOWN[0])
    result = run(pretrained, method="vanilla", card=card)
    plain = run(pretrained, method="vanilla")
    assert result.history[-1]["forecast"] > result.history[0]["forecast"] == 0.0
    assert result.history[-1]["loss"] == plain.history[-1]["loss"]
    assert plain.history[-1]["forecast"] is None


@pytest.mark.parametrize("source_inputs", [KNOWN[0], None])
def test_ewc_forgets_less_than_vanilla(pretrained, source_inputs):
    """With source inputs, and with nothing but the target's."""
    vanilla = run(pretrained, method="vanilla")
    ewc = run(pretrained, method="ewc", source_inputs=source_inputs)
    assert rise(ewc) < 0.7 * rise(vanilla)
    assert ewc.history[-1]["forecast"] > 0


class Stopped(RuntimeError):
    pass


def test_what_a_budget_needs(pretrained):
    with pytest.raises(ValueError, match="forget_budget needs source_inputs"):
        run(pretrained, forget_budget=0.1)
    with pytest.raises(ValueError, match="method 'vanilla' has none"):
        run(pretrained, method="vanilla", forget_budget=0.1, source_inputs=KNOWN[0])
    other = ConvNet(5)
    card = fast.SourceCard.estimate(other.eval(), KNOWN[0])
    with pytest.raises(ValueError, match=r"of other weights: 'features\.0\.weight'"):
        run(pretrained, method="ewc", card=card)


def test_the_gauge_measures_what_it_says(pretrained):
    x, y = ASKED
    moved = copy.deepcopy(pretrained)
    with torch.no_grad():
        moved.project.weight += 0.1
    z0, z = pretrained(x).detach(), moved(x).detach()
    labelled, bare = SourceInputs((x, y), 200), SourceInputs(x, 200)
    loss = F.cross_entropy(z, y) - F.cross_entropy(z0, y)
    assert Gauge(pretrained, labelled, False)(moved) == pytest.approx(loss.item(), rel=1e-4)
    kl = F.kl_div(z.log_softmax(1), z0.log_softmax(1), log_target=True, reduction="batchmean")
    assert Gauge(pretrained, bare, False)(moved) == pytest.approx(kl.item(), rel=1e-4)
    changed = (z.argmax(1) != z0.argmax(1)).double().mean().item()
    assert Gauge(pretrained, bare, True)(moved) == pytest.approx(changed)
    assert Gauge(pretrained, bare, False)(pretrained) == 0


def test_the_pull_follows_the_forecast():
    group = {"anchor_decay": 5.0}
    controller = Controller(Budget(0.1), [group])
    controller.adjust(AIM * 0.1)
    assert group["anchor_decay"] == pytest.approx(5.0)
    controller.adjust(4 * AIM * 0.1)
    assert group["anchor_decay"] == pytest.approx(10.0)
    controller.adjust(math.nan)
    assert group["anchor_decay"] == pytest.approx(10.0)
    for _ in range(50):
        controller.adjust(0.0)
    assert 0 < group["anchor_decay"] < 1e-2


def test_moving_back_undoes_the_excess():
    """On a loss that is quadratic in the displacement."""
    anchor, p = torch.zeros(5), nn.Parameter(torch.randn(5))
    before = p.square().sum().item()
    move_back([p], [anchor], share_to_undo(2.5, exponent=1.0))
    assert p.square().sum().item() == pytest.approx(before / 2.5, rel=1e-5)
