"""The parallel lists of one call of an update op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Group = dict[str, Any]


class Batch:
    """Parameters of one device that are updated together, and the groups they belong to."""

    def __init__(self, device: torch.device) -> None:
        self.nothing = torch.empty(0, device=device)
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.states: list[dict[str, Any]] = []
        self.groups: list[int] = []
        self.rows: list[tuple[Group, float]] = []

    def row(self, group: Group, ramp: float) -> int:
        """Begin `group`: its index in the hyper table."""
        self.rows.append((group, ramp))
        return len(self.rows) - 1

    def add(
        self, params: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]], row: int
    ) -> None:
        self.params += params
        self.grads += grads
        self.states += states
        self.groups += [row] * len(params)

    def column(self, name: str) -> list[Tensor]:
        """Entry `name` of every state.

        Raises:
            KeyError: a state does not have it.
        """
        return [state[name] for state in self.states]

    def optional(self, name: str, nothing: Tensor | None = None) -> list[Any]:
        """Entry `name` of every state, or `nothing`; empty when no state has it."""
        found = [state.get(name, nothing) for state in self.states]
        missing = sum(t is nothing for t in found)
        return [] if missing == len(found) else found

    def moment(self, name: str) -> tuple[list[Tensor], list[Tensor]]:
        """Moment `name` of every state, stored plain, as codes, or not at all; and its scales."""
        try:
            return self.column(name), []
        except KeyError:
            plain = self.optional(name, self.nothing) or [self.nothing] * len(self.states)
            found = zip(self.states, plain, strict=True)
            moments = [state.get(f"{name}_codes", other) for state, other in found]
            return moments, self.optional(f"{name}_scales", self.nothing)
