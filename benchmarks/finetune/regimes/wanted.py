"""The figures that are wanted of FAST in each regime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

from benchmarks.finetune.regimes.figures import Comparison
from benchmarks.finetune.regimes.runs import HALF_STEPS, USUAL_STEPS
from benchmarks.finetune.regimes.timing import PAIRS

FEW = 10


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure over pairs, and its bound.

    Attributes:
        name: what it is.
        of: its value for one pair; None: it is the time, which has runs of its own.
        over: takes the values of the pairs together.
        bound, at_most: it is to be at most, or at least, the bound.
        steps, samples: the part of the table that it is of.
        pairs: how many pairs it has; None for all.
    """

    name: str
    of: Callable[[Comparison], float] | None
    over: Callable[[Sequence[float]], float]
    bound: float
    at_most: bool = True
    steps: int = USUAL_STEPS
    samples: int | None = None
    pairs: int | None = None

    def values(self, comparisons: Sequence[Comparison], times: Sequence[float]) -> list[float]:
        """One value for each pair that has been run."""
        if self.of is None:
            return list(times)
        part = (self.steps, self.samples)
        return [self.of(c) for c in comparisons if (c.ours["steps"], c.ours["samples"]) == part]


def _lost(c: Comparison) -> float:
    return 100 * c.lost


def _ahead(c: Comparison) -> float:
    return 100 * c.ahead


def _share(c: Comparison) -> float:
    return 1.0 if c.share is None else c.share


def _not_reached(c: Comparison) -> float:
    return float(c.share is None)


def wanted(source_inputs: bool) -> list[Figure]:
    """The figures with, or without, source inputs."""
    most_mean, most_worst = (1.0, 2.0) if source_inputs else (3.0, 6.0)
    figures = [
        Figure(name="source lost, mean", of=_lost, over=mean, bound=most_mean),
        Figure(name="source lost, worst pair", of=_lost, over=max, bound=most_worst),
    ]
    lengths = {150: 0.0, 400: 0.0, 1500: -0.3} if source_inputs else {150: -0.5}
    figures += [
        Figure(
            name=f"target minus the best baseline's, {steps} steps, mean",
            of=_ahead,
            over=mean,
            bound=bound,
            at_most=False,
            steps=steps,
        )
        for steps, bound in lengths.items()
    ]
    few = f"{FEW} samples a class"
    return [
        *figures,
        Figure(
            name="target minus the best baseline's, worst pair",
            of=_ahead,
            over=min,
            bound=-2.0,
            at_most=False,
        ),
        Figure(
            name="target in half of the steps minus the best baseline's in all, mean",
            of=_ahead,
            over=mean,
            bound=0.0,
            at_most=False,
            steps=HALF_STEPS,
        ),
        Figure(name="share of steps to its final accuracy, mean", of=_share, over=mean, bound=0.5),
        Figure(name="pairs that do not reach it", of=_not_reached, over=sum, bound=0.0),
        Figure(
            name=f"{few}: target minus the best baseline's, mean",
            of=_ahead,
            over=mean,
            bound=-1.0,
            at_most=False,
            samples=FEW,
        ),
        Figure(name=f"{few}: source lost, mean", of=_lost, over=mean, bound=2.0, samples=FEW),
        Figure(
            name="time of a whole call / LP-FT's",
            of=None,
            over=mean,
            bound=1.05,
            pairs=len(PAIRS.split(",")),
        ),
    ]
