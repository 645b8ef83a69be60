"""The line to the pretrained weights, and where a search on it ends."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fast.adapt.guards.weight_line import WeightLine


@pytest.mark.parametrize(("power", "looks"), [(1.0, 6), (2.0, 1), (6.0, 2)])
def test_a_line_lands_where_the_aim_is_lost(power, looks):
    """On a loss that is a power of the displacement, whatever power was guessed; two places around
    the aim tell the right one."""
    anchor, p = torch.zeros(5), nn.Parameter(torch.randn(5))
    end = p.detach().clone()
    line, measured = WeightLine([p], [anchor]), []

    def loss():
        measured.append(3 * float(p.detach().norm() / end.norm()) ** power)
        return measured[-1]

    lost = line.land(loss, lost=3.0, aim=0.4, exponent=2.0, checks=8)
    assert len(measured) == looks
    assert lost == measured[-1] == pytest.approx(0.4, rel=0.05)
    assert loss() == pytest.approx(lost)
    assert torch.allclose(p, line.place * end)


def test_the_last_place_is_guessed_from_the_nearest_measurement():
    """Each goes on from the one before by the power of 2 that is assumed; the loss has a power of
    1, so that more than the aim is lost at all of them."""
    p = nn.Parameter(torch.ones(1))
    line = WeightLine([p], [torch.zeros(1)])
    place = 1.0
    for _ in range(3):
        place *= (0.4 / (3 * place)) ** 0.5
    lost = line.land(lambda: 3 * p.item(), lost=3.0, aim=0.4, exponent=2.0, checks=2, surely=False)
    assert line.place == pytest.approx(place)
    assert lost == pytest.approx(3 * place)


def test_a_line_ends_at_the_last_place_that_was_measured_to_be_inside():
    """A cliff behind the first place that is measured, and before the second."""
    p = nn.Parameter(torch.ones(1))
    line = WeightLine([p], [torch.zeros(1)])
    lost = line.land(
        lambda: 9.0 if p.item() > 0.12 else 0.02, lost=9.0, aim=0.1, exponent=2.0, checks=2
    )
    assert lost == 0.02
    assert line.place == pytest.approx((0.1 / 9) ** 0.5)


def test_a_line_goes_far_back_where_all_is_lost_at_once():
    """A cliff at a twentieth of the way: the last check found nothing inside, a guess follows."""
    p = nn.Parameter(torch.ones(1))
    line = WeightLine([p], [torch.zeros(1)])
    lost = line.land(
        lambda: 9.0 if p.item() > 0.05 else 0.0, lost=9.0, aim=0.1, exponent=2.0, checks=4
    )
    assert lost <= 0.1
    assert p.item() < 0.05


@pytest.mark.parametrize("surely", [True, False])
def test_what_a_line_says_is_lost_was_measured(surely):
    """Everywhere but at the very start more is lost than the aim: no guess passes for the aim."""
    p = nn.Parameter(torch.ones(1))
    line = WeightLine([p], [torch.zeros(1)])

    def loss():
        return 9.0 if p.item() > 0 else 0.02

    lost = line.land(loss, lost=9.0, aim=0.1, exponent=2.0, checks=3, surely=surely)
    assert lost == loss() == (0.02 if surely else 9.0)


def test_landing_is_the_same_from_any_number_of_looks():
    start, end = torch.randn(50), torch.randn(50)
    p, q = nn.Parameter(end.clone()), nn.Parameter(end.clone())
    a, b = WeightLine([p], [start]), WeightLine([q], [start])
    for place in (0.3, 0.9, 0.1):
        a.go(place)
    a.go(0.5)
    b.go(0.5)
    assert torch.equal(p, q)


@pytest.mark.parametrize(("lost", "place"), [(1e6, 0.1), (1.01, 0.98)])
def test_a_place_stays_off_the_ends(lost, place):
    """Guesses at 0.001 and at 0.995 of the way would tell nothing."""
    p = nn.Parameter(torch.ones(1))
    line = WeightLine([p], [torch.zeros(1)])
    line.land(lambda: 1.0, lost=lost, aim=1.0, exponent=2.0, checks=1)
    assert line.place == pytest.approx(place)
