"""Parameter groups: the check of their values, their ramp, and the count of their steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Group = dict[str, Any]


def number(name: str, value: Any) -> Any:
    """`value`, a number or a tensor of one element.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name} must have one element; got a tensor {list(value.shape)}")
    if not isinstance(value, (int, float, Tensor)):
        raise ValueError(f"{name} must be a number; got {value!r}")
    return value


def check_finite(name: str, value: Any) -> None:
    """Raise a ValueError when `value` is no finite number."""
    if not math.isfinite(number(name, value)):
        raise ValueError(f"{name} must be finite; got {value}")


def check_not_negative(name: str, value: Any) -> None:
    """Raise a ValueError when `value` is no number of at least 0; infinity is one."""
    if not number(name, value) >= 0:
        raise ValueError(f"{name} must not be negative; got {value}")


def check_pull(group: Group) -> None:
    """Raise a ValueError that names the key when a value that the pull uses is out of range."""
    for key in ("lr", "restraint"):
        check_finite(key, group[key])
    for key in ("lr", "restraint", "anchor_decay", "stall", "ramp"):
        check_not_negative(key, group[key])


def ramp_factor(progress: int, stall: int, ramp: int) -> float:
    """The factor of the learning rate after `progress` steps: 0 during the stall, and then
    1/ramp, 2/ramp, ..., 1. The first step after the stall already moves."""
    steps = progress - stall + 1
    if steps <= 0:
        return 0.0
    return steps / ramp if steps < ramp else 1.0


class Progress:
    """Advances the key `progress` of groups, by which they leave their stall and ramp.

    Whether a step under a GradScaler overflowed, and so does not count, is known on its device
    only. The flag is copied to the host behind the step, and read when it decides something: at the
    next step, which then waits for the step before (not for the passes queued since), and only
    while a group stalls or ramps.
    """

    def __init__(self) -> None:
        self._flag: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def count(self, groups: Sequence[Group], found_inf: Tensor | None) -> None:
        """Count a step; `found_inf` (`[]` or `[1]`, on any device) is not 0 where it overflowed."""
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
        """Count the last step if it is still open."""
        flag, arrived = self._flag, self._arrived
        self._flag = self._arrived = None
        if arrived is not None:
            arrived.synchronize()
        if flag is not None and not flag.any():
            _advance(groups)


def _advance(groups: Sequence[Group]) -> None:
    for group in groups:
        group["progress"] += 1
