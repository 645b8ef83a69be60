"""What rewinding gives back: a result like any other, and the way there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fast.adapt.config import AdaptConfig, option
from fast.adapt.result import Result
from fast.figures import GREY, MARKERS, OTHER_COLOURS, STYLE, load_matplotlib

REWIND = "rewind"
TUNED = "tuned"
COLOURS = {"line": "#0072B2", "layers": "#009E73", "restored": "#D55E00"}


@dataclass(frozen=True, kw_only=True)
class RewindConfig(AdaptConfig):
    """The options of `fast.rewind`, as every result has them."""

    method: str = option(REWIND, "how the network was made", choices=Literal["rewind"])


@dataclass(kw_only=True, repr=False)
class Rewound(Result):
    """The network that keeps the budget, and how it was found.

    `history` has one record per place that was looked at: `stage` (tuned, line, layers, restored),
    `place` on the way of that stage (0 before fine-tuning, 1 after it), `forecast` (what is lost on
    held-back source inputs, in the unit of the budget), `target_accuracy` and `source_accuracy`
    there, or None where it was not measured. `target_accuracy` is that of samples of `data` that
    were held back here; the fine-tuning run may have learned from them.

    Attributes:
        lost: what is lost on all held-back source inputs, in nats or in points of accuracy (0..1).
        unknown: what cannot be known, a sentence each.
    """

    lost: float
    unknown: list[str]

    def _facts(self) -> dict[str, str]:
        facts = super()._facts() | {"stage": str(self.final["stage"])}
        del facts["step"]
        return facts | {"lost": f"{self.lost:.4f}", "budget": str(self.config.budget)}

    def plot(self) -> Any:
        """The matplotlib Figure: target against source along each stage, the budget, and the point
        that was chosen. Without target data it is the place on the line against the source.

        Raises:
            ImportError: matplotlib is not installed.
        """
        budget = self.config.budget
        assert budget is not None
        scale = 100 if budget.points else 1
        by_target = any(record["target_accuracy"] is not None for record in self.history)

        def height(record: dict[str, Any]) -> float | None:
            value = record["target_accuracy"] if by_target else record["place"]
            return None if value is None else (100 if by_target else 1) * value

        matplotlib = load_matplotlib()
        with matplotlib.rc_context(STYLE):
            figure = matplotlib.figure.Figure(figsize=(4.6, 3.4), layout="constrained")
            axis = figure.subplots()
            for i, stage in enumerate(dict.fromkeys(r["stage"] for r in self.history)):
                records = [r for r in self.history if r["stage"] == stage]
                points = sorted(
                    (scale * r["forecast"], y) for r in records if (y := height(r)) is not None
                )
                if points:
                    colour = COLOURS.get(stage, OTHER_COLOURS[0])
                    axis.plot(*zip(*points, strict=True), color=colour, marker=MARKERS[i],
                              markersize=5, label=stage)  # fmt: skip
            axis.axvline(scale * budget.amount, color=GREY, linestyle="--", linewidth=1)
            chosen = height(self.final)
            if chosen is not None:
                axis.plot(scale * self.final["forecast"], chosen, color=OTHER_COLOURS[0],
                          marker="o", markersize=12, markerfacecolor="none", linestyle="none",
                          label="chosen")  # fmt: skip
            unit = "points of accuracy" if budget.points else "nats"
            axis.set_xscale("symlog", linthresh=scale * budget.amount)
            axis.set(
                title="Rewound to a budget",
                xlabel=f"the source loses, {unit} (dashed: the budget)",
                ylabel="target accuracy, %" if by_target else "place on the way to the tuned one",
            )
            axis.legend()
        return figure
