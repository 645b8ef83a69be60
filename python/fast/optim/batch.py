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
            RuntimeError: a state does not have it.
        """
        try:
            return [state[name] for state in self.states]
        except KeyError:
            raise RuntimeError(_missing(name)) from None

    def optional(self, name: str, nothing: Tensor | None = None) -> list[Any]:
        """Entry `name` of every state, or `nothing`; empty when no state has it."""
        found = [state.get(name, nothing) for state in self.states]
        missing = sum(t is nothing for t in found)
        return [] if missing == len(found) else found

    def moment(self, name: str, optional: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        """Moment `name` of every state, stored plain or as codes, and its scales. Where `optional`,
        a state may be without: it has one of 0 elements then.

        Raises:
            RuntimeError: a state does not have it, and must.
        """
        try:
            return [state[name] for state in self.states], []
        except KeyError:  # codes, or none
            nothing = self.nothing if optional else None
            found: list[Any] = [s.get(f"{name}_codes", s.get(name, nothing)) for s in self.states]
        if any(t is None for t in found):
            raise RuntimeError(_missing(name))
        return found, self.optional(f"{name}_scales", self.nothing)


def _missing(name: str) -> str:
    return (
        f"the state of a parameter has no {name!r}: somebody took it away; load a whole state, or "
        "delete `optimizer.state[parameter]` to begin anew"
    )
