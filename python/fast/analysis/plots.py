"""Figures of fine-tuning runs. matplotlib is loaded on first use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fast.analysis.intervals import half_interval
from fast.figures import GREY, MARKERS, STYLE, colour_of, level, load_matplotlib

History = Sequence[Mapping[str, Any]]
Runs = Mapping[str, Sequence[History]]

# Opacity of single seeds behind their mean.
FAINT = 0.18


def comparison(runs: Runs, *, title: str = "", source_before: float | None = None) -> Any:
    """The matplotlib Figure of several methods on one job.

    Panels: target accuracy against step; where source accuracy was measured, also source accuracy
    against step, and the path of each method in the (target, source) plane.

    Args:
        runs: method -> one history for each seed. A history is a list of dicts with `step`,
            `target_accuracy` and, if measured, `source_accuracy` in 0..1; those without a
            `target_accuracy` are skipped.
        source_before: source accuracy before adaptation, drawn as a dashed line.

    Raises:
        ValueError: there is no evaluated step in any history.
    """
    matplotlib = load_matplotlib()
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


def retention(
    points: Sequence[Mapping[str, Any]], *, title: str = "", source_before: float | None = None
) -> Any:
    """The matplotlib Figure of trade-off curves: source against target accuracy.

    Args:
        points: in the order of their curves; each with `method`, `label` (its strength, drawn
            beside it), `target`, `source` in 0..1, and `target_half`, `source_half`, half of their
            confidence intervals or None.
        source_before: source accuracy before adaptation, drawn as a dashed line.

    Raises:
        ValueError: no point has both accuracies.
    """
    complete = [p for p in points if p["target"] is not None and p["source"] is not None]
    if not complete:
        raise ValueError("no point has target and source accuracy: there is nothing to draw")
    matplotlib = load_matplotlib()
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=(5.4, 4.2), layout="constrained")
        axis = figure.subplots()
        if source_before is not None:
            level(axis, source_before)
        methods = list(dict.fromkeys(p["method"] for p in complete))
        for i, method in enumerate(methods):
            _trade_off(axis, [p for p in complete if p["method"] == method], method, i)
        axis.margins(0.08)
        for point in complete:
            _cross(axis, point, colour_of(point["method"], methods.index(point["method"])))
        _labels(axis, complete, methods)
        _better(axis)
        axis.set(xlabel="target accuracy, %", ylabel="source accuracy, %")
        axis.set_title(title)
        axis.legend(loc="lower right")
    return figure


def _trade_off(axis: Any, points: Sequence[Mapping[str, Any]], method: str, i: int) -> None:
    axis.plot(
        [100 * p["target"] for p in points],
        [100 * p["source"] for p in points],
        color=colour_of(method, i),
        marker=MARKERS[i % len(MARKERS)],
        markersize=5,
        label=method,
        zorder=_order(method),
    )


def _labels(axis: Any, points: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> None:
    """Write the label of each point beside it, unless it would cover an earlier one."""
    to_pixels = axis.transData.transform
    places: list[Any] = []
    for point in points:
        place = 100 * point["target"], 100 * point["source"]
        pixels = to_pixels(place)
        if not point["label"] or any(np.abs(pixels - t).max() < 14 for t in places):
            continue
        places.append(pixels)
        axis.annotate(
            point["label"],
            place,
            (4, 4),
            textcoords="offset points",
            fontsize=7,
            color=colour_of(point["method"], methods.index(point["method"])),
        )


def evaluations(history: History) -> dict[str, np.ndarray]:
    """The evaluated steps of a history, and target and source accuracy there in %.

    Returns:
        `step`, `target` and `source`, `[n]` each; `source` is empty where it was not measured.
    """
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
        level(axis, before)
        axis.annotate(
            "before",
            (1.02, 100 * before),
            xycoords=("axes fraction", "data"),
            annotation_clip=False,
            va="center",
            color=GREY,
            fontsize=8,
        )
    _curve_panel(axis, curves, "source")
    axis.set(title="Keeps: source accuracy", xlabel="step", ylabel="%")


def _curve_panel(axis: Any, curves: Any, key: str) -> None:
    for i, (method, seeds) in enumerate(curves.items()):
        colour = colour_of(method, i)
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
    axis.xaxis.get_major_locator().set_params(integer=True)


def _plane_panel(axis: Any, curves: Any, before: float | None) -> None:
    points: list[tuple[dict[str, Any], str]] = []
    for i, (method, seeds) in enumerate(curves.items()):
        colour = colour_of(method, i)
        _, target = mean_curve(seeds, "target")
        _, source = mean_curve(seeds, "source")
        if not len(source):
            continue
        axis.plot(target, source, color=colour, linewidth=1.2, alpha=0.7, zorder=_order(method))
        ends = [(c["target"][-1], c["source"][-1]) for c in seeds if len(c["source"])]
        points.append((_mean_point(ends), colour))
        axis.scatter(
            *zip(*ends, strict=True),
            color=colour,
            marker=MARKERS[i % len(MARKERS)],
            s=36,
            edgecolor="white",
            linewidth=0.6,
            zorder=_order(method) + 1,
        )
    for point, colour in points:
        _cross(axis, point, colour)
    _better(axis)
    axis.set(title="Both: path and end", xlabel="target accuracy, %", ylabel="source accuracy, %")


def _mean_point(ends: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Mean and half intervals, in 0..1, of points `(target, source)` in %."""
    point: dict[str, Any] = {}
    for name, values in zip(("target", "source"), zip(*ends, strict=True), strict=True):
        point[name] = float(np.mean(values)) / 100
        point[f"{name}_half"] = half_interval(values) / 100 if len(values) > 1 else None
    return point


def _cross(axis: Any, point: Mapping[str, Any], colour: str) -> None:
    """The 95 % intervals of both means. The view is not widened for them: with two or three seeds
    they are wider than all curves together."""
    if point["target_half"] is None:
        return
    axis.autoscale_view()
    axis.set_autoscale_on(False)
    axis.errorbar(
        100 * point["target"],
        100 * point["source"],
        xerr=100 * point["target_half"],
        yerr=100 * point["source_half"],
        color=colour,
        linewidth=0.8,
        alpha=0.35,
        capsize=2,
        zorder=2,
    )


def _better(axis: Any) -> None:
    """An arrow to the upper right, in the corner that is farthest from what is drawn."""
    data = [line.get_xydata() for line in axis.get_lines()]
    data += [c.get_offsets() for c in axis.collections if len(c.get_offsets())]
    points = axis.transLimits.transform(np.concatenate(data)) if data else np.empty((0, 2))
    points = points[np.isfinite(points).all(axis=1)]

    def room(corner: tuple[float, float]) -> float:
        middle = np.array(corner) + 0.08
        return float(np.abs(points - middle).max(axis=1).min()) if len(points) else 1.0

    x, y = max([(0.03, 0.04), (0.03, 0.78), (0.78, 0.04), (0.4, 0.04), (0.4, 0.4)], key=room)
    axis.annotate(
        "better",
        (x + 0.14, y + 0.17),
        (x, y),
        xycoords="axes fraction",
        fontsize=8,
        color=GREY,
        arrowprops={"arrowstyle": "->", "color": GREY},
    )


def _order(method: str) -> int:
    return 5 if method == "fast" else 3
