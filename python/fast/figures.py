"""The style that all figures share, and the figure of one run. matplotlib is loaded on use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fast.errors import import_library
from fast.files import atomic_file

# Okabe and Ito's palette, which colour-blind readers can tell apart; `fast` stands out.
COLOURS = {
    "fast": "#D55E00",
    "vanilla": "#0072B2",
    "l2-sp": "#009E73",
    "lp-ft": "#CC79A7",
    "ewc": "#56B4E9",
    "replay": "#E69F00",
}
GREY = "#666666"
OTHER_COLOURS = ("#000000", "#999999")
# Methods differ in shape as well as in colour, for grey print.
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "figure.dpi": 150,
}


def run_figure(
    history: Sequence[Mapping[str, Any]],
    method: str,
    *,
    source_before: float | None = None,
    forecast_in_points: bool = False,
) -> Any:
    """The matplotlib Figure of one run: its accuracies over the steps, and its forecast.

    Args:
        history: records with `step` and, where they were measured, `target_accuracy` and
            `source_accuracy` in 0..1 and `forecast`.
        method: the method that ran; it decides the colour of the target.
        source_before: source accuracy before the run, drawn as a dashed line.
        forecast_in_points: the forecast is of source accuracy lost, 0..1, and not in nats.

    Raises:
        ValueError: nothing was measured.
    """
    percent = 100 if forecast_in_points else 1
    accuracies = {name: measured(history, f"{name}_accuracy", 100) for name in ("target", "source")}
    forecast = measured(history, "forecast", percent)
    panels = [any(steps for steps, _ in accuracies.values()), bool(forecast[0])]
    if not any(panels):
        raise ValueError("no record has an accuracy or a forecast: there is nothing to draw")
    matplotlib = load_matplotlib()
    with matplotlib.rc_context(STYLE):
        size = (4.2 * sum(panels) + 0.4, 3.2)
        figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
        axes = list(figure.subplots(1, sum(panels), squeeze=False)[0])
        if panels[0]:
            _accuracy_panel(axes[0], accuracies, (colour_of(method, 0), GREY), source_before)
        if panels[1]:
            axis = axes[-1]
            axis.plot(*forecast, color=colour_of(method, 0), marker="o", markersize=4)
            unit = "points of source accuracy" if forecast_in_points else "nats of source loss"
            axis.set(title="Forecast: what the source loses", xlabel="step", ylabel=unit)
    return figure


def _accuracy_panel(
    axis: Any,
    accuracies: Mapping[str, tuple[list[int], list[float]]],
    colours: Sequence[str],
    before: float | None,
) -> None:
    if before is not None:
        level(axis, before)
    for (name, curve), colour, marker in zip(accuracies.items(), colours, MARKERS, strict=False):
        if curve[0]:
            axis.plot(*curve, color=colour, marker=marker, markersize=4, label=name)
    axis.set(title="Accuracy", xlabel="step", ylabel="%")
    axis.legend(loc="lower right")


def measured(
    history: Sequence[Mapping[str, Any]], key: str, scale: float
) -> tuple[list[int], list[float]]:
    """Steps at which `key` was measured, and its values there times `scale`."""
    rows = [row for row in history if row.get(key) is not None]
    return [row["step"] for row in rows], [scale * row[key] for row in rows]


def level(axis: Any, accuracy: float) -> None:
    """Draw a line at the accuracy, in 0..1, before adaptation."""
    axis.axhline(100 * accuracy, color=GREY, linestyle="--", linewidth=1)


def colour_of(method: str, i: int) -> str:
    """The colour of a method; one of the other colours for the i-th that is unknown."""
    return COLOURS.get(method, OTHER_COLOURS[i % len(OTHER_COLOURS)])


def save(figure: Any, path: str | Path) -> Path:
    """Write `figure` as PNG, whole or not at all."""
    path = Path(path)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")
    return path


def load_matplotlib() -> Any:
    """matplotlib without pyplot: no display is opened and the caller's backend stays as it is."""
    import_library("matplotlib.figure", "plots need")
    import matplotlib

    return matplotlib
