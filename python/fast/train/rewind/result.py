"""Rewinding returns a result like any other, which also tells how it was found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fast.adapt.config import AdaptConfig, setting
from fast.adapt.result import Record, Result
from fast.figures import GREY, OTHER_COLOURS, STYLE, load_matplotlib

REWIND = "rewind"
# The stage of a record: the tuned network, or a place on the line to it.
TUNED, LINE = "tuned", "line"
COLOUR = "#0072B2"


@dataclass(frozen=True, kw_only=True)
class RewindConfig(AdaptConfig):
    """The options of `fast.rewind`, in the form in which every result has its options."""

    method: str = setting(REWIND, "how the network was made", choices=Literal["rewind"])


def lost_at(record: Record) -> float:
    """What is lost at a place, which is measured at each."""
    lost = record["forecast"]
    assert lost is not None
    return lost


@dataclass(kw_only=True, repr=False)
class Rewound(Result):
    """The network that keeps the budget, and how it was found.

    `history` has one record for each place that was measured: `stage` (tuned or line); `place` on
    the line (0 before fine-tuning, 1 after it); `forecast`, the loss on held-back source inputs in
    the unit of the budget; `target_accuracy` and `source_accuracy`, which are None where they were
    not measured. `target_accuracy` is measured on samples of `data` that were held back here, and
    the fine-tuning run may have learned from them.

    Attributes:
        lost: what is lost on all held-back source inputs, in nats or in points of accuracy (0..1).
        unknown: a sentence for each thing that cannot be known.
    """

    lost: float
    unknown: list[str]

    def _facts(self) -> dict[str, str]:
        facts = super()._facts() | {"stage": str(self.final["stage"])}
        del facts["step"]
        return facts | {"lost": f"{self.lost:z.4f}", "budget": str(self.config.budget)}

    def plot(self) -> Any:
        """Draw what is lost along the line, the budget, the place that was chosen, and the target
        accuracy where it was measured.

        Returns:
            a matplotlib Figure.

        Raises:
            ImportError: matplotlib is not installed.
        """
        budget = self.config.budget
        assert budget is not None
        scale = 100 if budget.points else 1
        matplotlib = load_matplotlib()
        with matplotlib.rc_context(STYLE):
            figure = matplotlib.figure.Figure(figsize=(4.6, 3.4), layout="constrained")
            axis = figure.subplots()
            points = sorted((r["place"], scale * lost_at(r)) for r in self.history)
            axis.plot(*zip(*points, strict=True), color=COLOUR, marker="o", label="on the line")
            chosen = (self.final["place"], scale * lost_at(self.final))
            axis.plot(*chosen, color=OTHER_COLOURS[0], marker="o", markersize=12,
                      markerfacecolor="none", linestyle="none", label="chosen")  # fmt: skip
            axis.axhline(
                scale * budget.amount, color=GREY, linestyle="--", linewidth=1, label="budget"
            )
            for record in self.history:
                if record["target_accuracy"] is not None:
                    axis.annotate(
                        f"target {100 * record['target_accuracy']:.0f} %",
                        (record["place"], scale * lost_at(record)),
                        xytext=(-8, 8), textcoords="offset points", ha="right",
                    )  # fmt: skip
            axis.set_yscale("symlog", linthresh=scale * budget.amount)
            axis.set(
                title="Rewound to a budget",
                xlabel="place on the line to the tuned network",
                ylabel=f"the source loses, {'points of accuracy' if budget.points else 'nats'}",
            )
            axis.legend(loc="upper left")
        return figure
