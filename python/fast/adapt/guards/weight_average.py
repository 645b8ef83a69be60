"""The average of the last steps' weights, which is what a run evaluates and returns.

With a cosine schedule the weights of the middle of a run are noisy, at the learning rate's height;
their average already answers like weights at a small one (Polyak and Juditsky 1992; Izmailov et al.
2018, arXiv 1803.05407). Frozen batch norm keeps its statistics, so averages need no new ones; those
that are tracked stay as the last steps left them, which is an average of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

# Updating takes three passes over the weights, a third of an optimizer step; every other step.
EVERY = 2


class Average:
    """Exponential average of `params` over about `horizon` steps.

    Args:
        params: trained; their values now are where the average starts.
        horizon: steps; the first ones are averaged over as many as there are.
    """

    def __init__(self, params: Sequence[Tensor], horizon: int) -> None:
        self.params = list(params)
        self.horizon = horizon
        self.values = [p.detach().clone() for p in self.params]

    @torch.no_grad()
    def update(self, moved: int) -> None:
        """Take in the weights after a step.

        Args:
            moved: steps in which the backbone has moved; before that the weights are taken over.
        """
        if moved < 1:  # the head learns during a stall, and may learn fast: the last is the best
            torch._foreach_copy_(self.values, self._current())
        elif moved % EVERY == 0 or moved < EVERY:
            weight = min(1.0, EVERY / min(self.horizon, moved))
            torch._foreach_lerp_(self.values, self._current(), weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The average in the parameters' place."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average and the weights."""
        current = [p.clone() for p in self._current()]
        torch._foreach_copy_(self._current(), self.values)
        torch._foreach_copy_(self.values, current)

    @torch.no_grad()
    def adopt(self) -> None:
        """Make the average the weights."""
        torch._foreach_copy_(self._current(), self.values)

    def _current(self) -> list[Tensor]:
        return [p.detach() for p in self.params]

    def state(self) -> dict[str, Tensor]:
        """The average itself, by names of its own: to be saved, or filled on resuming."""
        return {f"average.{i}": v for i, v in enumerate(self.values)}
