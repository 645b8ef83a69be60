"""Planes and grids, worked out by hand."""

import pytest
import torch

from fast.analysis.landscape.plane import Plane, grid


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_two_displacements_span_it():
    origin = rows(1.0, 1, 1, 1)
    plane = Plane.through(origin, rows([3, 4, 0, 0], [6, -8, 0, 0]))
    torch.testing.assert_close(plane.basis @ plane.basis.T, torch.eye(2, dtype=torch.float64))
    # The last lies on the first axis, the other above it.
    xy = plane.coordinates(rows([3, 4, 0, 0], [6, -8, 0, 0]))
    torch.testing.assert_close(xy, rows([-1.4, 4.8], [10, 0]))
    for x, y, d in ((*xy[0].tolist(), [3, 4, 0, 0]), (*xy[1].tolist(), [6, -8, 0, 0])):
        torch.testing.assert_close(plane.at(x, y), origin + rows(*d))
    assert plane.share(rows([3, 4, 0, 0])) == pytest.approx(1)
    assert plane.share(rows([3, 4, 5, 0])) == pytest.approx(0.5)


@pytest.mark.parametrize("count", [3, 30])
def test_of_many_it_is_the_closest_through_the_origin(count):
    torch.manual_seed(0)
    d = torch.randn(count, 20, dtype=torch.float64)
    plane = Plane.through(torch.zeros(20, dtype=torch.float64), d)
    values = torch.linalg.svdvals(d).square()
    assert plane.share(d) == pytest.approx(float(values[:2].sum() / values.sum()))


@pytest.mark.parametrize("displacements", [[[3.0, 4, 0]], [[3.0, 4, 0], [6.0, 8, 0]]])
def test_displacements_on_a_line_get_a_second_axis(displacements):
    plane = Plane.through(torch.zeros(3, dtype=torch.float64), rows(*displacements))
    torch.testing.assert_close(plane.basis @ plane.basis.T, torch.eye(2, dtype=torch.float64))
    x, y = plane.coordinates(rows(displacements[-1]))[0].tolist()
    assert x == pytest.approx(torch.tensor(displacements[-1]).norm().item())
    assert abs(y) < 1e-9


def test_the_last_displacement_may_be_zero():
    plane = Plane.through(torch.zeros(3, dtype=torch.float64), rows([0, 2, 0], [0, 0, 0]))
    assert plane.coordinates(rows([0, 2, 0]))[0, 0] == pytest.approx(2)


def test_no_displacement_is_no_plane():
    with pytest.raises(ValueError, match="the weights did not move"):
        Plane.through(torch.zeros(3), torch.zeros(2, 3))


def test_grid_has_square_cells_and_room():
    x, y = grid([rows([0, 0], [4, 0.5]), rows([2, -0.5])], 13)
    assert len(x) == 13
    assert (x[0], x[-1]) == pytest.approx((-1, 5))
    assert (y[0], y[-1]) == pytest.approx((-2, 2))
    assert x[1] - x[0] == pytest.approx(y[1] - y[0])
