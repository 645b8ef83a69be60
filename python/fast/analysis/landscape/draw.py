"""The figure of a landscape. matplotlib is loaded on first use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fast.analysis.landscape.result import Landscape, PathGeometry
from fast.analysis.plots import MARKERS, STYLE, colour_of, matplotlib_

# Losses are drawn on a logarithmic scale that ends here: a destroyed network is a destroyed one.
LEVELS = 14
LOWEST, HIGHEST = 1e-3, 20.0
# Rises below this are rounding and sampling.
SMALLEST_RISE = 1e-4
GREY = "#666666"


def draw(found: Landscape, *, title: str = "") -> Any:
    """The matplotlib Figure of a landscape.

    Above: source loss and target loss over the plane, with the paths. Below: the share of each step
    in the source's stiff directions, and forecast against measured rise of the source loss.
    """
    matplotlib = matplotlib_()
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=(9.2, 7.6), layout="constrained")
        (source, target), (stiff, forecast) = figure.subplots(2, 2)
        _surface(figure, source, found, found.source_loss, "Source loss, nats")
        head = "" if len(found.paths) == 1 else f", head of {found.head_of}"
        _surface(figure, target, found, found.target_loss, f"Target loss, nats{head}")
        _stiff_panel(stiff, found)
        _forecast_panel(forecast, found)
        handles, labels = source.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def _surface(figure: Any, axis: Any, found: Landscape, losses: Sequence[Any], title: str) -> None:
    from matplotlib.colors import LogNorm

    values = np.clip(np.nan_to_num(np.array(losses), nan=HIGHEST), LOWEST, HIGHEST)
    low, high = float(values.min()), float(values.max())
    levels = np.geomspace(low, max(high, 1.01 * low), LEVELS)
    filled = axis.contourf(
        found.x,
        found.y,
        values,
        levels=levels,
        cmap="Greys",
        norm=LogNorm(levels[0], 3 * levels[-1]),  # the darkest grey would hide the paths
        extend="both",
    )
    axis.contour(found.x, found.y, values, levels=levels, colors="white", linewidths=0.5)
    bar = figure.colorbar(filled, ax=axis, shrink=0.9, pad=0.02)
    bar.set_ticks(levels[::3], labels=[f"{v:.2g}" for v in levels[::3]])
    bar.minorticks_off()
    for i, path in enumerate(found.paths):
        _path(axis, path, i)
    axis.plot(0, 0, marker="*", color="black", markersize=11, zorder=7)
    axis.annotate("w0", (0, 0), (6, 6), textcoords="offset points", fontsize=8, zorder=7)
    towards = f"||w - w0||, towards the end of {found.paths[-1].name}"
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


def _stiff_panel(axis: Any, found: Landscape) -> None:
    for i, path in enumerate(found.paths):
        pairs = zip(path.steps[1:], path.stiff_share, strict=True)
        known = [(step, share) for step, share in pairs if share]
        if known:
            axis.plot(
                *zip(*known, strict=True),
                color=colour_of(path.name, i),
                marker=MARKERS[i % len(MARKERS)],
                markersize=4,
            )
    axis.axhline(found.chance, color=GREY, linestyle="--", linewidth=1)
    axis.annotate(
        "a random direction",
        (1, found.chance),
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
        ylabel=f"share in its {len(found.eigenvalues)} stiffest directions",
    )


def undrawn(found: Landscape) -> int:
    """Points of the forecast panel, after the start, that have no place on its logarithmic axes."""
    pairs = [
        pair
        for path in found.paths
        for forecast in ([*path.forecast], path.card_shown)
        for pair in list(zip(path.rise, forecast, strict=True))[1:]
    ]
    return sum(f is not None and not min(m, f) > SMALLEST_RISE for m, f in pairs)


def _forecast_panel(axis: Any, found: Landscape) -> None:
    drawn: list[float] = []
    for i, path in enumerate(found.paths):
        colour, marker = colour_of(path.name, i), MARKERS[i % len(MARKERS)]
        for forecast, full in (([*path.forecast], True), (path.card_shown, False)):
            pairs = zip(path.rise, forecast, strict=True)
            points = [(m, f) for m, f in pairs if f is not None and min(m, f) > SMALLEST_RISE]
            if not points:
                continue
            drawn += [v for pair in points for v in pair]
            face = colour if full else "none"
            axis.scatter(
                *zip(*points, strict=True), s=26, marker=marker, edgecolor=colour, facecolor=face
            )
    if drawn:
        ends = [min(drawn), max(drawn)]
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
