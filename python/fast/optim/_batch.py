"""The parallel lists of one call of an update op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Group = dict[str, Any]


class Batch:
    """Tensors of one device that are updated together, and the groups they belong to."""

    def __init__(self, device: torch.device, moments: int) -> None:
        self.nothing = torch.empty(0, device=device)
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.moments: tuple[list[Tensor], ...] = tuple([] for _ in range(moments))
        self.moment_scales: tuple[list[Tensor], ...] = tuple([] for _ in range(moments))
        self.steps: list[Tensor] = []
        self.groups: list[int] = []
        self.anchors: list[Tensor | None] = []
        self.curvature: list[Tensor | None] = []
        self.curvature_scales: list[Tensor | None] = []
        self.remainders: list[Tensor] = []
        self.rows: list[tuple[Group, float]] = []

    def row(self, group: Group, ramp: float) -> int:
        """Index of `group` in the hyper table."""
        if not self.rows or self.rows[-1][0] is not group:
            self.rows.append((group, ramp))
        return len(self.rows) - 1

    def add(self, p: Tensor, grad: Tensor, state: dict[str, Any], moments: tuple[str, ...]) -> None:
        """Add one parameter; `moments` are the keys of `state` to pass, codes with their scales.

        Raises:
            KeyError: a moment is not in `state`.
        """
        found = [state[key] for key in moments]
        for k, moment in enumerate(found):
            self.moments[k].append(moment)
            if moment.dtype == torch.uint8:
                scales = self.moment_scales[k]
                scales += [self.nothing] * (len(self.params) - len(scales))
                scales.append(state[moments[k].removesuffix("codes") + "scales"])
        for k in range(len(found), len(self.moments)):
            self.moments[k].append(self.nothing)
        self.params.append(p)
        self.grads.append(grad)
        self.steps.append(state["step"])
        self.groups.append(len(self.rows) - 1)
        self._optional(self.anchors, state.get("anchor"), None)
        curvature = state.get("curvature")
        if curvature is None and "curvature_codes" in state:
            curvature = state["curvature_codes"]
            self._optional(self.curvature_scales, state["curvature_scales"], None)
        self._optional(self.curvature, curvature, None)
        self._optional(self.remainders, state.get("remainder"), self.nothing)

    def _optional(self, tensors: list[Any], entry: Tensor | None, nothing: Tensor | None) -> None:
        """Append to a list that stays empty until its first entry."""
        if entry is not None:
            tensors += [nothing] * (len(self.params) - 1 - len(tensors))
            tensors.append(entry)

    def finish(self) -> Batch:
        """Bring the optional lists that have begun to full length."""
        count = len(self.params)
        for some in (self.anchors, self.curvature, self.curvature_scales):
            if some:
                some += [None] * (count - len(some))
        for others in (self.remainders, *self.moment_scales):
            if others:
                others += [self.nothing] * (count - len(others))
        return self
