"""Count the steps of each group, but not those that a GradScaler had skipped, without a sync."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fast.optim.batch import Group


def ramp_factor(progress: int, stall: int, ramp: int) -> float:
    """What the learning rate is multiplied by after `progress` steps: 0 in the stall; then
    1/ramp, 2/ramp, ..., 1, so that the first step after the stall already moves."""
    steps = progress - stall + 1
    if steps <= 0:
        return 0.0
    return steps / ramp if steps < ramp else 1.0


class Progress:
    """Advances the key `progress` of groups, by which they leave their stall and ramp.

    Whether a step overflowed is known on its device only. The flag is copied to the host behind the
    step, and read when it decides something: at the next step, which then waits for the step before
    (not for the passes queued since), and only while a group stalls or ramps.
    """

    def __init__(self) -> None:
        self._flag: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def count(self, groups: Sequence[Group], found_inf: Tensor | None) -> None:
        """One step more; `found_inf` `[]` or `[1]` on any device: not 0 where it was skipped."""
        if found_inf is None or not self.warming(groups):
            _advance(groups)
        elif found_inf.device.type == "cuda":
            self._flag = torch.empty(
                found_inf.shape, dtype=found_inf.dtype, pin_memory=True, device="cpu"
            )
            self._flag.copy_(found_inf, non_blocking=True)
            self._arrived = torch.cuda.current_stream(found_inf.device).record_event()
        else:
            self._flag = found_inf.clone()

    def warming(self, groups: Sequence[Group]) -> bool:
        """Whether a group is still in its stall or ramp."""
        return any(g["progress"] < g["stall"] + g["ramp"] for g in groups)

    def settle(self, groups: Sequence[Group]) -> None:
        """Count the last step if that is still open."""
        flag, arrived = self._flag, self._arrived
        self._flag = self._arrived = None
        if arrived is not None:
            arrived.synchronize()
        if flag is not None and not flag.any():
            _advance(groups)


def _advance(groups: Sequence[Group]) -> None:
    for group in groups:
        group["progress"] += 1
