"""The tables of `fast curvature`, and its figure of the spectral densities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fast.cli.report.table import text_table
from fast.curvature import Eigenpairs, Estimate, Summary
from fast.figures import STYLE, load_matplotlib


def figure(kind: str, summaries: Mapping[str, Summary]) -> Any:
    """The matplotlib Figure: one panel per loss, its density and its top eigenvalues."""
    matplotlib = load_matplotlib()
    with matplotlib.rc_context(STYLE):
        size = (6.4, 2.6 * len(summaries) + 0.3)
        figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(summaries), 1, squeeze=False)[:, 0]
        for ax, (name, s) in zip(axes, summaries.items(), strict=True):
            assert s.spectrum is not None
            s.spectrum.plot(ax=ax)
            low = ax.get_ylim()[0]
            ax.plot(s.top.values, [low] * len(s.top.values), "^", color="#D55E00", clip_on=False,
                    label=f"top {len(s.top.values)}")  # fmt: skip
            ax.legend(loc="upper right")
            ax.set_title(f"{kind} of the {name} loss, {s.numel:,} parameters")
    return figure


def text(kind: str, summaries: Mapping[str, Summary]) -> str:
    """The printed tables: one column per loss, then one row per layer."""
    columns = list(summaries)
    rows = [
        ["loss, nats", *(f"{s.loss:.4g}" for s in summaries.values())],
        ["gradient norm", *(f"{s.gradient_norm:.4g}" for s in summaries.values())],
        ["trace", *(_estimate(s.trace) for s in summaries.values())],
    ]
    for i in range(max(len(s.top.values) for s in summaries.values())):
        rows.append(
            [f"eigenvalue {i + 1} (residual)", *(_pair(s.top, i) for s in summaries.values())]
        )
    sizes = " and ".join(dict.fromkeys(f"{s.numel:,}" for s in summaries.values()))
    out = f"\n{kind}, {sizes} parameters\n\n" + text_table(["", *columns], rows)
    unfinished = [name for name, s in summaries.items() if not s.top.converged]
    if unfinished:
        out += f"\n\nnot converged: eigenvalues of {', '.join(unfinished)}; see their residuals"
    if any(s.layers for s in summaries.values()):
        out += "\n\n" + _layer_table(summaries)
    return out


def _layer_table(summaries: Mapping[str, Summary]) -> str:
    names = list(dict.fromkeys(name for s in summaries.values() for name in s.layers))
    header = ["layer", "parameters"]
    for column in summaries:
        header += [f"{column} trace", f"{column} top eigenvalue"]
    rows = []
    for name in names:
        layers = [s.layers.get(name) for s in summaries.values()]
        row = [name or "(network)", " / ".join(dict.fromkeys(f"{x.numel:,}" for x in layers if x))]
        for layer in layers:
            row += ["-"] * 2 if layer is None else [_estimate(layer.trace), _first(layer.top)]
        rows.append(row)
    return text_table(header, rows)


def _estimate(estimate: Estimate) -> str:
    """`2097 ± 160`, with at least two digits of the error."""
    error = estimate.stderr
    plain = f"{float(f'{error:.2g}'):.0f}" if 10 <= error < 1e6 else f"{error:.2g}"
    return f"{estimate.value:.4g} ± {plain}"


def _pair(pairs: Eigenpairs, i: int) -> str:
    if i >= len(pairs.values):
        return ""
    return f"{float(pairs.values[i]):.5g} ({float(pairs.residuals[i]):.1g})"


def _first(pairs: Eigenpairs) -> str:
    return f"{float(pairs.values[0]):.3g}"
