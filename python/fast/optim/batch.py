"""The arguments of one call of an update op, and the figures that it writes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fast import dtensor
from fast.dtensor import Place
from fast.optim.groups import Group
from fast.optim.storage import Storage
from fastkernels.ops.update import STATS

# A plain function, because it is faster to call: a step of many small tensors is mostly Python.
_device_of = Tensor.device.__get__  # type: ignore[attr-defined]


class UpdateBatch:
    """Parameters of one device that are updated together, as the parallel lists of an op, and the
    groups they belong to."""

    def __init__(self, device: torch.device) -> None:
        self.nothing = torch.empty(0, device=device)
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.states: list[dict[str, Any]] = []
        self.groups: list[int] = []
        self.rows: list[tuple[Group, float]] = []

    def row(self, group: Group, factor: float) -> int:
        """Add a group whose learning rate is multiplied by `factor`; returns its row in the hyper
        table."""
        self.rows.append((group, factor))
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
        entries = [state.get(name, nothing) for state in self.states]
        return [] if all(t is nothing for t in entries) else entries

    def moment(self, name: str, optional: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        """The moment `name` of every state, as numbers or 8-bit codes, and the scales of the codes.

        Args:
            optional: a state without the moment gives a tensor of 0 elements.

        Raises:
            RuntimeError: a state lacks a moment that is not optional.
        """
        try:
            return [state[name] for state in self.states], []
        except KeyError:  # codes, or none
            nothing = self.nothing if optional else None
            moments: list[Any] = [s.get(f"{name}_codes", s.get(name, nothing)) for s in self.states]
        if any(t is None for t in moments):
            raise RuntimeError(_missing(name))
        return moments, self.optional(f"{name}_scales", self.nothing)

    def curvature(self, in_codes: bool) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """The curvature of every state, and the scales of 8-bit codes.

        Args:
            in_codes: the curvature of parameters other than float64 ones is stored in codes.
        """
        numbers = self.optional("curvature")
        codes = self.optional("curvature_codes") if in_codes else []
        if not codes:
            return numbers, []
        if numbers:  # float64 parameters, beside others
            codes = [f if c is None else c for f, c in zip(numbers, codes, strict=True)]
        return codes, self.optional("curvature_scales")

    def options(self, storage: Storage) -> dict[str, Any]:
        """The keyword arguments of an update op that come from the states, except its moments."""
        curvature, curvature_scales = self.curvature(storage.curvature_dtype == torch.uint8)
        return {
            "anchors": self.optional("anchor"),
            "curvature": curvature,
            "curvature_scales": curvature_scales,
            "remainders": self.optional("remainder", self.nothing) if storage.exact_bf16 else [],
        }

    def move_states(self) -> None:
        """Bring the states to the device of the parameters, if the model was moved after a step."""
        step, device = self.states[0].get("step"), self.nothing.device
        if step is not None and step.device != device:
            for state in self.states:
                state.update({key: value.to(device) for key, value in state.items()})


def _missing(name: str) -> str:
    return (
        f"the state of a parameter has no {name!r}: somebody took it away; load a whole state, or "
        "delete `optimizer.state[parameter]` to start it anew"
    )


def with_gradients(params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters that have a gradient, and their gradients."""
    grads = [p.grad for p in params]
    present = [g for g in grads if g is not None]
    if len(present) < len(params):
        params = [p for p, g in zip(params, grads, strict=True) if g is not None]
    return params, present


def by_place(params: list[Tensor], grads: list[Tensor]) -> dict[Place, list[int] | None]:
    """The places of these parameters, each with their indices; None: all of them, unsharded."""
    if not dtensor.any_sharded(params) and not dtensor.any_sharded(grads):
        devices = set(map(_device_of, params))
        if len(devices) < 2:
            return {Place(device): None for device in devices}
    places: dict[Place, list[int] | None] = {}
    for i, p in enumerate(params):
        places.setdefault(dtensor.place(p), []).append(i)  # type: ignore[union-attr]
    return places


class StepFigures:
    """The figures of the last step; never saved."""

    def __init__(self) -> None:
        self.stats: dict[Place, Tensor] = {}  # float64 [len(STATS)], of this rank
        self.totals: dict[Place, Tensor] = {}  # of all ranks, where parameters are sharded
        # The places of the last step, and whether a parameter there has an anchor.
        self.has_anchor: dict[Place, bool] = {}

    def stats_at(self, place: Place) -> Tensor:
        """The tensor that the op at `place` writes its figures into."""
        if place not in self.stats:
            unknown = torch.full((len(STATS),), math.nan, dtype=torch.float64, device="cpu")
            self.stats[place] = unknown.to(place.device)
        return self.stats[place]

    def by_name(self) -> dict[str, Tensor]:
        """The figures over all places, each by its name."""
        by_place = self.stats | self.totals
        values = [by_place[place] for place in self.has_anchor]
        total = torch.full((len(STATS),), math.nan, dtype=torch.float64, device="cpu")
        if values:
            rows = torch.stack([v.to(values[0].device) for v in values])
            total = torch.cat([rows[:, :3].square().sum(0).sqrt(), rows[:, 3:].sum(0)])
        figures = dict(zip(STATS, total.unbind(), strict=True))
        if not any(self.has_anchor.values()):
            for name in ("drift", "forgetting"):
                figures[name] = torch.full_like(figures[name], math.nan)
        return figures
