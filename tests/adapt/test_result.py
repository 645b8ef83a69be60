"""`Result` as it is looked at: in a prompt, in a notebook, as a figure."""

from __future__ import annotations

import pytest
from torch import nn

import fast
from networks import ConvNet, images

TRAIN, VAL, KEPT = images(60, 4, seed=1), images(30, 4, seed=2), images(60, 5, seed=3)
RUN = {"steps": 4, "eval_every": 2, "batch_size": 16, "progress": False}


@pytest.fixture(scope="module")
def result():
    return fast.finetune(ConvNet(), TRAIN, VAL, KEPT, source_inputs=KEPT, **RUN)


def test_it_is_shown_in_a_line(result):
    line = repr(result)
    assert len(line) < 200
    assert "\n" not in line
    assert f"target_accuracy={result.target_accuracy:.4f}" in line
    assert "method=fast" in line


def test_a_notebook_shows_a_table(result):
    page = result._repr_html_()
    assert page.count("<tr>") == 7
    assert f"<td>{result.source_accuracy_before:.4f}</td>" in page


def test_what_was_not_measured_is_not_shown():
    line = repr(fast.finetune(ConvNet(), TRAIN, **RUN))
    assert "accuracy" not in line


def test_its_figure(result):
    pytest.importorskip("matplotlib", reason="it draws")
    accuracy, forecast = result.plot().axes
    curves = {line.get_label(): line for line in accuracy.get_lines()}
    for name in ("target", "source"):
        values = [100 * record[f"{name}_accuracy"] for record in result.history]
        assert curves[name].get_ydata().tolist() == values
        assert curves[name].get_xdata().tolist() == [0, 2, 4]
    assert [100 * result.source_accuracy_before] * 2 in [
        list(line.get_ydata()) for line in accuracy.get_lines()
    ]
    assert "nats" in forecast.get_ylabel()


def test_its_figure_without_validation_data():
    pytest.importorskip("matplotlib", reason="it draws")
    result = fast.finetune(ConvNet(), TRAIN, source_inputs=KEPT, forget_budget="5%", **RUN)
    (forecast,) = result.plot().axes
    assert "points" in forecast.get_ylabel()
    with pytest.raises(ValueError, match="nothing to draw"):
        fast.finetune(ConvNet(), TRAIN, method="vanilla", **RUN).plot()


def test_a_card_is_shown_short():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 5))
    card = fast.SourceCard.estimate(net, KEPT, num_samples=16, calibration_samples=4)
    assert len(repr(card)) < 200
    assert card._repr_html_() == f"<pre>{card}</pre>"
