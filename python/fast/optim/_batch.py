"""The parallel lists of one call of an update op."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Batch:
    """Tensors of one device that are updated together, and the groups they belong to."""

    def __init__(self, moments: tuple[str, ...]) -> None:
        self.names = moments
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.moments: tuple[list[Tensor], ...] = tuple([] for _ in moments)
        self.steps: list[Tensor] = []
        self.groups: list[int] = []
        self.anchors: list[Tensor | None] = []
        self.curvature: list[Tensor | None] = []
        self.rows: list[tuple[dict[str, Any], float]] = []

    def row(self, group: dict[str, Any], ramp: float) -> int:
        """Index of `group` in the hyper table."""
        if not self.rows or self.rows[-1][0] is not group:
            self.rows.append((group, ramp))
        return len(self.rows) - 1

    def add(self, p: Tensor, grad: Tensor, state: dict[str, Any], row: int) -> None:
        self.params.append(p)
        self.grads.append(grad)
        for moments, name in zip(self.moments, self.names, strict=True):
            moment = state.get(name)
            moments.append(p.new_empty(0) if moment is None else moment)
        self.steps.append(state["step"])
        self.groups.append(row)
        self.anchors.append(state.get("anchor"))
        self.curvature.append(state.get("curvature"))

    def optional(self, name: str) -> list[Tensor | None]:
        """`anchors` or `curvature`; empty when no tensor has one."""
        tensors: list[Tensor | None] = getattr(self, name)
        return tensors if any(t is not None for t in tensors) else []
