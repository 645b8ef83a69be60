"""The figure of a landscape. matplotlib is loaded on first use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fast.analysis.landscape.result import Landscape, PathGeometry
from fast.figures import GREY, MARKERS, STYLE, colour_of, load_matplotlib

# Losses are drawn on a logarithmic scale between these. Above the highest a network knows nothing.
LEVELS = 14
LOWEST, HIGHEST = 1e-3, 20.0
# Smaller rises, in nats, are rounding and sampling.
SMALLEST_RISE = 1e-4


def draw(landscape: Landscape, *, title: str = "") -> Any:
    """The matplotlib Figure of a landscape.

    Above: source loss and target loss over the plane, with the paths. Below: the share of each step
    in the source's stiff directions, and forecast against measured rise of the source loss.
    """
    matplotlib = load_matplotlib()
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=(9.2, 7.6), layout="constrained")
        (source, target), (stiff, forecast) = figure.subplots(2, 2)
        _surface(figure, source, landscape, landscape.source_loss, "Source loss, nats")
        head = "" if len(landscape.paths) == 1 else f", head of {landscape.head_of}"
        _surface(figure, target, landscape, landscape.target_loss, f"Target loss, nats{head}")
        _stiff_panel(stiff, landscape)
        _forecast_panel(forecast, landscape)
        handles, labels = source.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def _surface(
    figure: Any, axis: Any, landscape: Landscape, losses: Sequence[Any], title: str
) -> None:
    from matplotlib.colors import LogNorm

    values = np.clip(np.nan_to_num(np.array(losses), nan=HIGHEST), LOWEST, HIGHEST)
    low, high = float(values.min()), float(values.max())
    levels = np.geomspace(low, max(high, 1.01 * low), LEVELS)
    contours = axis.contourf(
        landscape.x,
        landscape.y,
        values,
        levels=levels,
        cmap="Greys",
        norm=LogNorm(levels[0], 3 * levels[-1]),  # the darkest grey would hide the paths
        extend="both",
    )
    axis.contour(landscape.x, landscape.y, values, levels=levels, colors="white", linewidths=0.5)
    bar = figure.colorbar(contours, ax=axis, shrink=0.9, pad=0.02)
    bar.set_ticks(levels[::3], labels=[f"{v:.2g}" for v in levels[::3]])
    bar.minorticks_off()
    for i, path in enumerate(landscape.paths):
        _path(axis, path, i)
    axis.plot(0, 0, marker="*", color="black", markersize=11, zorder=7)
    axis.annotate("w0", (0, 0), (6, 6), textcoords="offset points", fontsize=8, zorder=7)
    towards = f"||w - w0||, towards the end of {landscape.paths[-1].name}"
    axis.set(title=title, xlabel=towards, ylabel="across", aspect="equal")
    axis.grid(visible=False)


def _path(axis: Any, path: PathGeometry, i: int) -> None:
    colour = colour_of(path.name, i)
    axis.plot(
        path.x,
        path.y,
        color=colour,
        marker=MARKERS[i % len(MARKERS)],
        markersize=4,
        markeredgecolor="white",
        markeredgewidth=0.4,
        label=f"{path.name} ({path.in_plane:.0%} in the plane)",
        zorder=5,
    )


def _stiff_panel(axis: Any, landscape: Landscape) -> None:
    for i, path in enumerate(landscape.paths):
        pairs = zip(path.steps[1:], path.stiff_share, strict=True)
        points = [(step, share) for step, share in pairs if share]
        if points:
            axis.plot(
                *zip(*points, strict=True),
                color=colour_of(path.name, i),
                marker=MARKERS[i % len(MARKERS)],
                markersize=4,
            )
    axis.axhline(landscape.chance, color=GREY, linestyle="--", linewidth=1)
    axis.annotate(
        "a random direction",
        (1, landscape.chance),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        color=GREY,
        fontsize=8,
    )
    axis.set_yscale("log")
    axis.set(
        title="How stiff: steps in the source loss",
        xlabel="step",
        ylabel=f"share in its {len(landscape.eigenvalues)} stiffest directions",
    )


def undrawn(landscape: Landscape) -> int:
    """Number of points, after the start, that have no place on logarithmic axes."""
    pairs = [
        pair
        for path in landscape.paths
        for forecast in ([*path.forecast], path.card_shown)
        for pair in list(zip(path.rise, forecast, strict=True))[1:]
    ]
    return sum(f is not None and not min(m, f) > SMALLEST_RISE for m, f in pairs)


def _forecast_panel(axis: Any, landscape: Landscape) -> None:
    values: list[float] = []
    for i, path in enumerate(landscape.paths):
        colour, marker = colour_of(path.name, i), MARKERS[i % len(MARKERS)]
        for forecast, full in (([*path.forecast], True), (path.card_shown, False)):
            pairs = zip(path.rise, forecast, strict=True)
            points = [(m, f) for m, f in pairs if f is not None and min(m, f) > SMALLEST_RISE]
            if not points:
                continue
            values += [v for pair in points for v in pair]
            face = colour if full else "none"
            axis.scatter(
                *zip(*points, strict=True), s=26, marker=marker, edgecolor=colour, facecolor=face
            )
    if values:
        ends = [min(values), max(values)]
        axis.plot(ends, ends, color=GREY, linestyle="--", linewidth=1)
        axis.set(xscale="log", yscale="log")
    else:
        axis.annotate(
            "the source loss did not rise", (0.5, 0.5), xycoords="axes fraction", ha="center"
        )
    axis.set(
        title="How foreseen: rise of the source loss",
        xlabel="measured, nats",
        ylabel="forecast: exact product (filled), card (open)",
    )
