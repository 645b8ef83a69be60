"""Figures of fine-tuning runs. matplotlib is imported here only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

History = Sequence[Mapping[str, Any]]
Runs = Mapping[str, Sequence[History]]

# Okabe and Ito's palette, told apart by colour-blind readers; the method of the house stands out.
COLOURS = {
    "fast": "#D55E00",
    "vanilla": "#0072B2",
    "l2-sp": "#009E73",
    "lp-ft": "#CC79A7",
    "ewc": "#56B4E9",
}
OTHER_COLOURS = ("#E69F00", "#000000", "#999999")
# Shape as well as colour, for grey print.
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "figure.dpi": 150,
}
# Single seeds behind their mean.
FAINT = 0.18


def comparison(runs: Runs, *, title: str = "", source_before: float | None = None) -> Any:
    """The matplotlib Figure of several methods on one job.

    Panels: target accuracy against step; where source accuracy was measured, also source accuracy
    against step, and the path of each method in the (target, source) plane.

    Args:
        runs: method -> one history for each seed. A history is a list of dicts with `step`,
            `target_accuracy` and, if measured, `source_accuracy` in 0..1; others are passed over.
        source_before: source accuracy before adaptation, drawn as a dashed line.

    Raises:
        ValueError: there is no evaluated step in any history.
    """
    matplotlib = _matplotlib()
    curves = {
        method: [c for c in (evaluations(h) for h in histories) if len(c["step"])]
        for method, histories in runs.items()
    }
    curves = {method: seeds for method, seeds in curves.items() if seeds}
    if not curves:
        raise ValueError("no history has a target_accuracy: there is nothing to draw")
    with_source = any(len(c["source"]) for seeds in curves.values() for c in seeds)

    panels: list[Callable[..., None]] = [_target_panel]
    if with_source:
        panels += [_source_panel, _plane_panel]
    with matplotlib.rc_context(STYLE):
        size = (3.6 * len(panels) + 0.4, 3.4)
        figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for panel, axis in zip(panels, axes, strict=True):
            panel(axis, curves, source_before)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6))
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def save(figure: Any, path: str | Path) -> Path:
    """Write `figure` as PNG."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path


def evaluations(history: History) -> dict[str, np.ndarray]:
    """Evaluated steps of a history: `step`; `target` and `source` (empty if not measured) in %."""
    rows = [row for row in history if row.get("target_accuracy") is not None]
    source = [row["source_accuracy"] for row in rows if row.get("source_accuracy") is not None]
    return {
        "step": np.array([row["step"] for row in rows]),
        "target": 100 * np.array([row["target_accuracy"] for row in rows], dtype=float),
        "source": 100 * np.array(source if len(source) == len(rows) else [], dtype=float),
    }


def mean_curve(
    seeds: Sequence[Mapping[str, np.ndarray]], key: str
) -> tuple[np.ndarray, np.ndarray]:
    """`(steps, mean)` over the steps that every seed evaluated: early stopping cuts some short."""
    steps = seeds[0]["step"]
    for curve in seeds[1:]:
        steps = np.intersect1d(steps, curve["step"])
    values = [curve[key][np.isin(curve["step"], steps)] for curve in seeds if len(curve[key])]
    return steps, (np.mean(values, axis=0) if values else np.array([]))


def _target_panel(axis: Any, curves: Any, before: float | None) -> None:
    _curve_panel(axis, curves, "target")
    axis.set(title="Learns: target accuracy", xlabel="step", ylabel="%")


def _source_panel(axis: Any, curves: Any, before: float | None) -> None:
    if before is not None:
        axis.axhline(100 * before, color="#666666", linestyle="--", linewidth=1)
        axis.annotate(
            "before",
            (1, 100 * before),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            color="#666666",
            fontsize=8,
        )
    _curve_panel(axis, curves, "source")
    axis.set(title="Keeps: source accuracy", xlabel="step", ylabel="%")


def _curve_panel(axis: Any, curves: Any, key: str) -> None:
    for i, (method, seeds) in enumerate(curves.items()):
        colour = _colour(method, i)
        if len(seeds) > 1:
            for curve in seeds:
                if len(curve[key]):
                    axis.plot(curve["step"], curve[key], color=colour, alpha=FAINT, linewidth=1)
        steps, mean = mean_curve(seeds, key)
        if len(mean):
            axis.plot(
                steps,
                mean,
                color=colour,
                label=method,
                marker=MARKERS[i % len(MARKERS)],
                markersize=4,
                markevery=max(len(steps) // 8, 1),
                zorder=_order(method),
            )
    axis.margins(x=0.02)


def _plane_panel(axis: Any, curves: Any, before: float | None) -> None:
    for i, (method, seeds) in enumerate(curves.items()):
        colour = _colour(method, i)
        _, target = mean_curve(seeds, "target")
        _, source = mean_curve(seeds, "source")
        if not len(source):
            continue
        axis.plot(target, source, color=colour, linewidth=1.2, alpha=0.7, zorder=_order(method))
        ends = [(c["target"][-1], c["source"][-1]) for c in seeds if len(c["source"])]
        axis.scatter(
            *zip(*ends, strict=True),
            color=colour,
            marker=MARKERS[i % len(MARKERS)],
            s=36,
            edgecolor="white",
            linewidth=0.6,
            zorder=_order(method) + 1,
        )
    axis.annotate(
        "better",
        (0.17, 0.21),
        (0.03, 0.04),
        xycoords="axes fraction",
        fontsize=8,
        color="#666666",
        arrowprops={"arrowstyle": "->", "color": "#666666"},
    )
    axis.set(title="Both: path and end", xlabel="target accuracy, %", ylabel="source accuracy, %")


def _colour(method: str, i: int) -> str:
    return COLOURS.get(method, OTHER_COLOURS[i % len(OTHER_COLOURS)])


def _order(method: str) -> int:
    return 5 if method == "fast" else 3


def _matplotlib() -> Any:
    """matplotlib without pyplot: no display is opened and the caller's backend stays as it is."""
    try:
        import matplotlib.figure
    except ImportError as err:
        raise ImportError("plots need matplotlib: pip install matplotlib") from err
    return matplotlib
