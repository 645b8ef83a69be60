"""What `fast landscape` prints: a row for each path, and what the columns mean."""

from __future__ import annotations

from fast.analysis.landscape import Landscape
from fast.analysis.landscape.draw import SMALLEST_RISE, undrawn
from fast.cli.report.table import percent

HEADER = [
    "method", "target", "source", "drift", "in plane", "stiff share", "rise", "forecast", "by card",
]  # fmt: skip


def table(landscape: Landscape) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the end of each path."""
    rows = []
    for path in landscape.paths:
        share, card = path.mean_stiff_share, path.card_shown[-1]
        rows.append(
            [
                path.name,
                percent(path.target_accuracy[-1]),
                percent(path.source_accuracy[-1]),
                f"{path.drift[-1]:.2f}",
                f"{path.in_plane:.0%}",
                "" if share is None else f"{share:.3f}",
                f"{path.rise[-1]:.3g}",
                f"{path.forecast[-1]:.3g}",
                "" if card is None else f"{card:.3g}",
            ]
        )
    return HEADER, rows


def notes(landscape: Landscape) -> str:
    """What the columns of `table` mean."""
    matrix = landscape.matrix
    by_product, by_card = (
        _correlation(landscape.correlation(kind)) for kind in ("forecast", "card_forecast")
    )
    eigenvalues = ", ".join(f"{v:.3g}" for v in landscape.eigenvalues)
    short = "" if landscape.converged else " (not converged)"
    count = undrawn(landscape)
    left_out = (
        f"\n{count} points are not in the figure of forecasts, whose axes are logarithmic: the "
        f"source loss did not rise there, or was not forecast to, by {SMALLEST_RISE:g} nats."
        if count
        else ""
    )
    return f"""
Accuracies in %, drift ||w - w0||. Rise of the source loss in nats on {landscape.source_samples} \
samples:
measured, by the exact product of the {matrix} at w0, by a source card. The card is
calibrated on steps like Adam's first ones: a run that turns, or is held to its source, loses less
than it says, and of a run that went further than those steps it says nothing.
Stiff share: of a step's norm, in the top {len(landscape.eigenvalues)} eigenvectors of the source
{matrix} (a random direction: {landscape.chance:.4f}); eigenvalues {eigenvalues}{short}.
Correlation of forecast and rise over all steps: {by_product} by product, {by_card} by card.\
{left_out}"""


def _correlation(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"
