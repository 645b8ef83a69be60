"""Runs that die on the way, for the tests of what they leave."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fast.train.step import TrainStep


class Stopped(RuntimeError):
    """Raised in place of a step."""


@contextmanager
def dying_at(step: int | None, error: BaseException | None = None) -> Iterator[None]:
    """Inside the block a run of `fast.finetune` dies when it has taken `step` steps.

    Args:
        step: None lets the run live.
        error: raised in place of the next step (default: `Stopped`).
    """
    take = TrainStep.__call__

    def dying(self, *args):
        if self.adaptation.done == step:
            raise error or Stopped
        return take(self, *args)

    TrainStep.__call__ = dying
    try:
        yield
    finally:
        TrainStep.__call__ = take
