"""The average of the last steps' weights, which is what a run evaluates and returns.

In the middle of a run the learning rate is high and the weights are noisy; their average already
answers like weights at a small rate (Polyak and Juditsky 1992; Izmailov et al. 2018, arXiv
1803.05407). Frozen batch norm keeps its statistics, so the average needs no new ones. Tracked
statistics stay as the last steps left them, because they are an average already.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fast import dtensor
from fast.adapt.guards.base import Guard
from fast.errors import warn

# Updating takes three passes over the weights, a third of an optimizer step; every other step, but
# for an average over so few that it would be the weights of one of them.
EVERY = 2


class WeightAverage(Guard):
    """Exponential average of `params` over about `horizon` steps.

    Args:
        params: trained parameters; the average starts from their present values.
        horizon: steps to average over; until there are as many, over the steps so far.
        stall: steps before the backbone moves; until then the average is the current weights.

    Attributes:
        adopted: whether the average, or what replaced it, has become the weights.
        applies: whether the parameters hold the average for a block, and `values` theirs.
    """

    def __init__(self, params: Sequence[Tensor], horizon: int, stall: int = 0) -> None:
        self.params = list(params)
        self.horizon, self.stall = horizon, stall
        self._every = EVERY if horizon > EVERY else 1
        self.values = [p.detach().clone() for p in self.params]
        self.adopted = self.applies = False
        self.keep()

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        self.adopted = False  # a loop may go on after the end of its plan
        moved = step - self.stall
        if moved < 1:  # only the head learns during a stall, and its last weights are its best
            torch._foreach_copy_(_local(self.values), self._current())
        elif moved % self._every == 0 or moved < self._every:
            weight = min(1.0, self._every / min(self.horizon, moved))
            torch._foreach_lerp_(_local(self.values), self._current(), weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average in place of the parameters for the block, unless it is there already."""
        if self.adopted or self.applies:
            yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """`applied` for a block of the user's, who is warned if it writes to the weights."""
        in_place = self.adopted or self.applies
        with self.applied():
            versions = self._now()
            yield
            if not in_place and self._now() != versions:
                warn(
                    "the weights were written to inside of averaged() (by load_state_dict, or by "
                    "an average of yours?): what is there now is taken for the average of the last "
                    "steps' weights; load weights outside, and let one average act at a time"
                )

    def check_outside(self, what: str) -> None:
        """Raise RuntimeError where the model holds the average for a block."""
        if self.applies:
            raise RuntimeError(
                f"{what} inside of averaged(), where the model holds the average of the last "
                "steps' weights, and not those that training goes on from: leave the block first"
            )

    def keep(self) -> None:
        """Take the present weights for those that the last step has left."""
        self._versions = self._now()

    def _now(self) -> list[int]:
        return dtensor.versions(self.params)

    @torch.no_grad()
    def _swap(self) -> None:
        replaced = self._versions != self._now()
        current = [p.clone() for p in self._current()]
        torch._foreach_copy_(self._current(), _local(self.values))
        torch._foreach_copy_(_local(self.values), current)
        self.applies = not self.applies
        if not replaced:
            self.keep()

    @torch.no_grad()
    def finish(self) -> None:
        """Make the average the weights, unless others were loaded after the last step."""
        if self._versions == self._now():
            torch._foreach_copy_(self._current(), _local(self.values))
        else:
            warn(
                "the weights were written to after the last step (by load_state_dict?): finish() "
                "keeps them, and not the average of the last steps' weights"
            )
        self.adopted = True

    def _current(self) -> list[Tensor]:
        return _local(self.params)

    def state_dict(self) -> dict[str, Any]:
        return {"adopted": self.adopted, **{str(i): v for i, v in enumerate(self.values)}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adopted = bool(state["adopted"])
        for i, value in enumerate(self.values):
            value.copy_(state[str(i)])
        self.keep()


def _local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This rank's part of each: torch has no `_foreach_copy_` of sharded tensors."""
    return [dtensor.local(t.detach()) for t in tensors]
