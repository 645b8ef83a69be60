"""Sharded parameters (DTensors, as FSDP2 makes them): every rank steps its own shard.

State tensors are DTensors with the placements of their parameter, so torch.distributed.checkpoint
saves and reshards them. Norms are summed over the ranks that share a parameter.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_PLAIN = {Tensor, torch.nn.Parameter}


class Place(NamedTuple):
    """Where a parameter is: its device, and the process groups over which it is sharded."""

    device: torch.device
    groups: tuple[Any, ...] = ()


def is_sharded(t: Any) -> bool:
    # A program that has a DTensor has imported its module; one that has none need not.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def any_sharded(params: Sequence[Tensor]) -> bool:
    return not set(map(type, params)) <= _PLAIN and any(map(is_sharded, params))


def place(p: Any) -> Place:
    if not is_sharded(p):
        return Place(p.device)
    mesh = p.device_mesh
    dims = [i for i, placement in enumerate(p.placements) if not placement.is_replicate()]
    return Place(p.device, tuple(mesh.get_group(i) for i in dims))


def local(t: Any) -> Any:
    """This rank's part of `t`; `t` itself when it is not sharded."""
    return t.to_local() if is_sharded(t) else t


def whole(t: Any) -> Any:
    """The tensor of all ranks, which are asked for their parts; `t` itself when not sharded."""
    return t.full_tensor() if is_sharded(t) else t


def shard(value: Tensor, p: Any) -> Tensor:
    """`value`, which every rank has, where `p` is and sharded as it is. Nothing is sent."""
    value = value.to(p.device)
    if not is_sharded(p):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    mesh = p.device_mesh
    copies = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return copies.redistribute(mesh, p.placements)


def as_in(value: Any, own: Any) -> Any:
    """`value`, a tensor that every rank has whole, sharded as `own` is; nothing is sent."""
    return shard(value, own) if is_sharded(own) and not is_sharded(value) else value


def norm(tensors: Iterable[Tensor | None]) -> Tensor:
    """float64 `[]`: the norm of these tensors together, of all ranks."""
    squares: dict[Place, Tensor] = {}
    for t in tensors:
        if t is not None:
            square = local(t).double().square().sum()
            where = place(t)
            squares[where] = squares[where] + square if where in squares else square
    total = torch.zeros((), dtype=torch.float64)
    for where, square in squares.items():
        total = total.to(square.device) + sum_over(where.groups, square)
    return total.sqrt()


def versions(tensors: Iterable[Tensor]) -> list[int]:
    """How often each was written to: by an optimizer, by `load_state_dict`, by `copy_`."""
    return [local(t.detach())._version for t in tensors]


def local_state(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: local(value) for key, value in state.items()}


def like(value: Any, p: Any) -> Tensor:
    """`value` sharded as `p` is, or whole when `p` is whole. Communicates when they differ."""
    result: Tensor
    if not is_sharded(p):
        result = whole(value)
    elif not is_sharded(value):
        from torch.distributed.tensor import distribute_tensor

        result = distribute_tensor(value.detach().to(p.device), p.device_mesh, p.placements)
    elif (value.device_mesh, value.placements) == (p.device_mesh, p.placements):
        result = value
    else:
        result = value.redistribute(p.device_mesh, p.placements)
    return result


def sum_over(groups: Iterable[Any], values: Tensor) -> Tensor:
    """`values`, summed in place over the ranks of `groups`."""
    for group in groups:
        torch.distributed.all_reduce(values, group=group)
    return values
