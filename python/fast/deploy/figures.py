"""The picture of an evaluation: which classes are confused, and whether confidence is right."""

from __future__ import annotations

from typing import Any

import torch

from fast.deploy.evaluation import Evaluation
from fast.errors import printable
from fast.figures import GREY, STYLE, load_matplotlib

# Classes beyond this cannot be told apart in a picture.
MOST_CLASSES = 50
NUMBERED = 15  # classes up to which the cells show their counts


def evaluation_figure(evaluation: Evaluation) -> Any:
    """Draw the confusion matrix, in shares of each class, and accuracy over confidence.

    Returns:
        a matplotlib Figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    matplotlib = load_matplotlib()
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=(10.4, 5), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        _draw_confusion(left, evaluation)
        _draw_reliability(right, evaluation)
    return figure


def _draw_confusion(axis: Any, evaluation: Evaluation) -> None:
    shown = _shown_classes(evaluation)
    counts = evaluation.confusion[shown][:, shown]
    shares = counts / evaluation.confusion.sum(1)[shown].clamp_min(1)[:, None]
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = [_label(evaluation.classes[i]) for i in shown.tolist()]
    ticks = range(len(names))
    axis.set_xticks(ticks, names, rotation=90)
    axis.set_yticks(ticks, names)
    axis.grid(False)
    left_out = len(evaluation.classes) - len(names)
    title = "What is taken for what" + (f" ({left_out} classes not shown)" if left_out else "")
    axis.set(title=title, xlabel="answer", ylabel="class")
    if len(names) <= NUMBERED:
        for i in ticks:
            for j in ticks:
                if counts[i, j]:
                    colour = "white" if shares[i, j] > 0.5 else "black"
                    text = str(int(counts[i, j]))
                    axis.text(j, i, text, ha="center", va="center", color=colour)


def _shown_classes(evaluation: Evaluation) -> torch.Tensor:
    """Numbers of the classes to draw: those with samples; of many, those with most mistakes."""
    truly = evaluation.confusion.sum(1)
    present = truly.nonzero()[:, 0]
    if len(present) <= MOST_CLASSES:
        return present
    wrong = (truly - evaluation.confusion.diagonal())[present]
    return present[wrong.argsort(descending=True, stable=True)[:MOST_CLASSES]].sort().values


def _draw_reliability(axis: Any, evaluation: Evaluation) -> None:
    rows = evaluation.reliability()
    axis.plot([0, 100], [0, 100], color=GREY, linestyle="--", linewidth=1, label="as it should be")
    confidence, accuracy = ([100 * row[i] for row in rows] for i in (1, 2))
    largest = max(row[0] for row in rows)
    axis.plot(confidence, accuracy, color="#D55E00", linewidth=1)
    axis.scatter(
        confidence, accuracy, s=[10 + 60 * row[0] / largest for row in rows], color="#D55E00",
        label="answers of like confidence", zorder=3,
    )  # fmt: skip
    error = 100 * evaluation.calibration_error
    axis.set(
        title=f"Confidence and accuracy: {error:.1f} points apart",
        xlabel="confidence, %",
        ylabel="accuracy, %",
        xlim=(0, 102),
        ylim=(-2, 102),
    )
    axis.legend(loc="upper left")


def _label(name: str, most: int = 18) -> str:
    """A name as it is drawn: short, without odd bytes, and not as a formula."""
    shown = printable(name)
    shown = shown if len(shown) <= most else f"{shown[: most - 3]}..."
    return shown.replace("$", r"\$")
