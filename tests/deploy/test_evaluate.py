"""What answers to labelled data come to."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from fast.deploy.evaluation import Evaluation
from fast.deploy.figures import evaluation_figure

# Probabilities of class 1 of two, and labels: confidences .9, .8, .6, .7, .9 and 1 mistake in each
# of two bins.
SCORES = [(0.9, 1), (0.8, 1), (0.4, 0), (0.3, 1), (0.1, 1)]


def evaluation(**fields):
    p = torch.tensor([score for score, _ in SCORES], dtype=torch.float64)
    logits = torch.stack([1 - p, p], 1).log().float()
    labels = torch.tensor([label for _, label in SCORES])
    return Evaluation(task="target", classes=["no", "yes"], labels=labels, logits=logits, **fields)


def test_figures_by_hand():
    e = evaluation()
    assert e.accuracy == 3 / 5
    assert e.confusion.tolist() == [[1, 0], [2, 2]]
    no, yes = e.per_class
    assert (no.samples, no.recall, no.precision) == (1, 1.0, 1 / 3)
    assert (yes.samples, yes.recall, yes.precision) == (4, 0.5, 1.0)
    assert yes.f1 == pytest.approx(2 * 0.5 / 1.5)
    assert e.loss == pytest.approx(-np.log([0.9, 0.8, 0.6, 0.3, 0.1]).mean(), rel=1e-6)
    assert e.confused() == [("yes", "no", 2)]
    assert repr(e).startswith("Evaluation(target: accuracy=0.6000, ")


def test_the_calibration_error_is_that_of_its_definition():
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(0, 2, (500, 6))).float()
    labels = torch.from_numpy(rng.integers(0, 6, 500))
    e = Evaluation(task="target", classes=list("abcdef"), labels=labels, logits=logits)
    confidence = logits.softmax(1).double().max(1).values.numpy()
    right = (logits.argmax(1) == labels).double().numpy()
    edges = np.linspace(0, 1, 16)
    expected = 0.0
    for low, high in itertools.pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert e.calibration_error == pytest.approx(expected, abs=1e-9)
    assert sum(n for n, _, _ in e.reliability()) == 500
    sure = Evaluation(task="target", classes=["a", "b"], labels=torch.tensor([0, 1]),
                      logits=torch.tensor([[50.0, 0], [50.0, 0]]))  # fmt: skip
    assert sure.calibration_error == pytest.approx(0.5)


def test_the_worst_mistakes_come_first():
    e = evaluation(names=["a", "b", "c", "d", "e"])
    first, second = e.mistakes()
    assert (first.name, first.label, first.predicted) == ("e", "yes", "no")
    assert first.probability == pytest.approx(0.9, rel=1e-5)
    assert first.probability_of_label == pytest.approx(0.1, rel=1e-5)
    assert (second.row, second.name) == (3, "d")
    assert e.mistakes(1) == [first]


def test_the_picture_shows_the_matrix():
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    left, right = evaluation_figure(evaluation()).axes
    assert [t.get_text() for t in left.get_xticklabels()] == ["no", "yes"]
    assert sorted(t.get_text() for t in left.texts) == ["1", "2", "2"]
    assert "points apart" in right.get_title(loc="left")


def test_odd_names_of_classes_are_drawn_as_they_are(tmp_path):
    """A name that is not UTF-8 cannot be drawn, and dollars would begin a formula."""
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    figure = evaluation_figure(dataclasses.replace(evaluation(), classes=["Gr\udcfcn", r"$\5 $"]))
    figure.savefig(tmp_path / "confusion.png")
    names = [t.get_text() for t in figure.axes[0].get_xticklabels()]
    assert names == [r"Gr\udcfcn", r"\$\5 \$"]


def test_classes_of_the_data_are_matched_by_name(adapted, tmp_path):
    """A set with some of the classes, which it numbers on its own."""
    chosen = (adapted.y == 1) | (adapted.y == 3)
    labels = (adapted.y[chosen] == 1).long()  # dog 0, bee 1
    np.savez(tmp_path / "some.npz", x=adapted.x[chosen].numpy(), y=labels.numpy(),
             classes=["dog", "bee"])  # fmt: skip
    predictor = adapted.result._predictor()
    named = predictor.evaluate(tmp_path / "some.npz")
    assert torch.equal(named.labels, adapted.y[chosen])
    assert named.accuracy == predictor.evaluate((adapted.x[chosen], adapted.y[chosen])).accuracy
    np.savez(tmp_path / "other.npz", x=adapted.x[:9].numpy(), y=np.arange(9) % 2,
             classes=["dog", "cow"])  # fmt: skip
    with pytest.raises(ValueError, match=r"other.npz: classes that are none of the target's: cow"):
        predictor.evaluate(str(tmp_path / "other.npz"))


def test_labels_beyond_the_classes_are_refused(adapted):
    with pytest.raises(ValueError, match=r"labels must be 0..3; got"):
        adapted.result.evaluate((adapted.x, adapted.y + 1))
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        adapted.result.evaluate("none")
