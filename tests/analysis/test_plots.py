"""Figures: what is on them, without looking at pixels."""

import itertools

import numpy as np
import pytest

from fast.analysis import plots
from fast.figures import save

pytest.importorskip("matplotlib", reason="plots need matplotlib")


def history(targets, sources=None):
    rows = [{"step": 10 * i, "target_accuracy": t} for i, t in enumerate(targets)]
    for row, source in zip(rows, sources or [], strict=False):
        row["source_accuracy"] = source
    return rows


def lines(axis, label):
    return [line for line in axis.get_lines() if line.get_label() == label]


def test_mean_over_seeds_in_percent():
    runs = {"fast": [history([0.1, 0.5, 0.9]), history([0.3, 0.7, 0.9])]}
    figure = plots.comparison(runs)
    assert len(figure.axes) == 1
    (line,) = lines(figure.axes[0], "fast")
    assert line.get_xdata().tolist() == [0, 10, 20]
    np.testing.assert_allclose(line.get_ydata(), [20, 60, 90])


def test_source_adds_its_curve_and_the_plane():
    runs = {m: [history([0.1, 0.9], [0.9, 0.6])] for m in ("fast", "vanilla", "new-method")}
    figure = plots.comparison(runs, title="job", source_before=0.9)
    target, source, plane = figure.axes
    assert all(len(lines(axis, m)) == 1 for axis in (target, source) for m in runs)
    assert [90, 90] in [list(line.get_ydata()) for line in source.get_lines()]
    np.testing.assert_allclose(plane.get_lines()[0].get_xdata(), [10, 90])
    np.testing.assert_allclose(plane.get_lines()[0].get_ydata(), [90, 60])
    colours = {line.get_color() for m in runs for line in lines(target, m)}
    assert len(colours) == 3


def test_records_without_evaluation_are_passed_over():
    rows = history([0.2, 0.4])
    rows.insert(1, {"step": 5, "target_accuracy": None})
    assert plots.evaluations(rows)["step"].tolist() == [0, 10]


def test_seeds_that_stopped_early_are_averaged_where_all_have_values():
    seeds = [plots.evaluations(history([0.1, 0.5, 0.9])), plots.evaluations(history([0.3, 0.7]))]
    steps, mean = plots.mean_curve(seeds, "target")
    assert steps.tolist() == [0, 10]
    np.testing.assert_allclose(mean, [20, 60])


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.comparison({"fast": [[{"step": 0, "loss": 1.0}]]})


def point(method, label, target, source, half=None):
    halves = {"target_half": half, "source_half": half}
    return {"method": method, "label": label, "target": target, "source": source, **halves}


def test_retention_has_a_curve_for_each_method():
    points = [point("l2-sp", "0", 0.9, 0.5), point("l2-sp", "1", 0.8, 0.7)]
    points.append(point("vanilla", "", 0.85, 0.3))
    (axis,) = plots.retention(points, title="job", source_before=0.9).axes
    (curve,) = lines(axis, "l2-sp")
    np.testing.assert_allclose(curve.get_xydata(), [[90, 50], [80, 70]])
    assert len(lines(axis, "vanilla")) == 1
    assert {t.get_text() for t in axis.texts} >= {"0", "1"}
    assert axis.get_title(loc="left") == "job"


def test_wide_intervals_do_not_widen_the_view():
    narrow = [point("fast", "0", 0.9, 0.5), point("fast", "1", 0.8, 0.7)]
    (axis,) = plots.retention(narrow).axes
    (wide,) = plots.retention([{**p, "target_half": 3.0, "source_half": 4.0} for p in narrow]).axes
    assert wide.get_xlim() == axis.get_xlim()
    assert wide.get_ylim() == axis.get_ylim()
    assert len(wide.containers) == 2
    assert len(axis.containers) == 0


def test_the_plane_shows_the_interval_of_several_seeds():
    runs = {"fast": [history([0.1, 0.9], [0.9, 0.6]), history([0.1, 0.8], [0.9, 0.7])]}
    assert len(plots.comparison(runs).axes[2].containers) == 1
    runs["fast"].pop()
    assert len(plots.comparison(runs).axes[2].containers) == 0


def test_retention_with_nothing_to_draw():
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.retention([point("fast", "1", 0.9, None)])


def test_saved_as_png_without_touching_the_backend(tmp_path):
    import matplotlib

    before = matplotlib.rcParams["backend"], matplotlib.rcParams["font.size"]
    path = save(plots.comparison({"fast": [history([0.1, 0.9])]}), tmp_path / "a" / "b.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert (matplotlib.rcParams["backend"], matplotlib.rcParams["font.size"]) == before


@pytest.mark.parametrize(
    "path", [([0.1, 0.5, 0.9], [0.9, 0.9, 0.9]), ([0.1, 0.5, 0.9], [0.1, 0.5, 0.9])]
)
def test_no_words_lie_on_a_curve(path):
    """Also where the source is kept, which is what the picture is to show."""
    figure = plots.comparison({"fast": [history(*path)]}, source_before=path[1][0])
    figure.canvas.draw()
    _, source, plane = figure.axes
    (word,) = source.texts
    assert word.get_window_extent().x0 >= source.get_window_extent().x1
    (arrow,) = plane.texts
    place = arrow.get_window_extent()
    points = plane.transData.transform(plane.get_lines()[0].get_xydata())
    dense = np.concatenate([np.linspace(a, b, 50) for a, b in itertools.pairwise(points)])
    assert not any(place.contains(x, y) for x, y in dense)
