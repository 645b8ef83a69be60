"""When a run measures what is forgotten, and on how many samples: checks must not cost much."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much time checks may take.

    Attributes:
        share: checks may take this share of the run's time; a forward pass is a third of a step.
        least, most: number of checks per run.
        samples: the most samples per check, if `share` allows them.
        bend: the k-th of n checks comes at `(k / n) ** bend` of the way.
    """

    share: float
    least: int
    most: int
    bend: float
    samples: int = 128

    def schedule(
        self, *, samples: int, whole: bool, steps: int, stall: int, batch_size: int
    ) -> tuple[set[int], int]:
        """Steps after which there is a check, and the number of samples of each.

        Args:
            samples: how many samples there are.
            whole: a check needs all of them.
            stall: steps before the backbone moves.
        """
        allowed = _forwards(self.share, steps, batch_size)
        size = samples if whole else min(samples, self.samples, max(32, allowed // self.least))
        count = min(max(allowed // size, self.least), self.most, steps)
        moving = steps - stall
        times = {stall + math.ceil(moving * (k / count) ** self.bend) for k in range(1, count)}
        return times, size


# A forecast alone must not slow a run down. Early checks tell most: the loss starts from zero, and
# the first check sets the scale.
FORECAST = Effort(share=0.01, least=2, most=8, bend=2.0)
# Somebody asked for a budget, so its checks may cost more; they are spread evenly.
BUDGET = Effort(share=0.03, least=8, most=16, bend=1.0)
# Number of exact checks in the last search along the line to the pretrained weights, and the share
# of the run's time that they may take.
LAST_CHECKS, LAST_SHARE = 5, 0.03


def last_samples(samples: int, steps: int, batch_size: int) -> int:
    """Samples of each of the checks that decide where the run ends."""
    allowed = _forwards(LAST_SHARE, steps, batch_size)
    return min(samples, max(128, allowed // (1 + LAST_CHECKS)))


def _forwards(share: float, steps: int, batch_size: int) -> int:
    """Forward passes of samples that take this share of a run's time."""
    return int(share * 3 * batch_size * steps)
