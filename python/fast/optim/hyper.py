"""The hyper table of an update op: the options of each group as numbers, on the op's device."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fast.dtensor import Place
from fast.optim.batch import UpdateBatch
from fast.optim.groups import Group

Rows = list[list[float]]
MakeRow = Callable[[Group, float], list[float]]
Check = Callable[[Group], None]


class HyperTables:
    """The tables of the last step, which the next one uses again if no value has changed."""

    def __init__(self) -> None:
        self._tables: dict[Place, tuple[Rows, Tensor]] = {}

    def table(self, place: Place, batch: UpdateBatch, make_row: MakeRow, check: Check) -> Tensor:
        """The table of the batch at `place`, float64 `[groups, columns]`.

        Args:
            make_row: gives the row of a group at a learning rate.
            check: raises a ValueError that names the key when a group has a value out of range. It
                is called when a value has changed.
        """
        rows, device_lrs = _rows(batch, make_row, check)
        kept_rows, table = self._tables.get(place, (None, None))
        if table is None or kept_rows != rows:
            if not torch.compiler.is_compiling():
                for i, (group, _) in enumerate(batch.rows):
                    check(group | {"lr": 0.0} if i in device_lrs else group)
            table = _on(place, rows)
            self._tables[place] = rows, table
        for i, lr in device_lrs.items():
            table[i, 0].copy_(lr)
        return table


def _rows(batch: UpdateBatch, make_row: MakeRow, check: Check) -> tuple[Rows, dict[int, Tensor]]:
    """The rows, and the learning rates that are known only on a device, by their row."""
    rows, device_lrs = [], {}
    for i, (group, ramp) in enumerate(batch.rows):
        lr = group["lr"]
        try:
            restraint = float(group["restraint"])
            if not 0 <= restraint < math.inf:
                check(group)
            factor = restraint * ramp
            if isinstance(lr, Tensor) and (
                lr.device.type != "cpu" or torch.compiler.is_compiling()
            ):
                # Reading it would be a sync, or a graph break.
                device_lrs[i] = lr.reshape(()) * factor
                value = math.nan  # differs from every valid rate; lists find it equal to itself
            else:
                value = float(lr) * factor
            rows.append(make_row(group, value))
        except (TypeError, ValueError, RuntimeError):
            check(group)  # which says more
            raise
    return rows, device_lrs


def _on(place: Place, rows: Rows) -> Tensor:
    # Pinned memory: the lr changes in every step, and a copy from other memory would wait.
    pin = place.device.type == "cuda" and not torch.compiler.is_compiling()
    table = torch.tensor(rows, dtype=torch.float64, pin_memory=pin, device="cpu")
    return table.to(place.device, non_blocking=pin)
