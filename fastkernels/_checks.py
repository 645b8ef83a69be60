"""Checks and layout rules of the update ops: what reaches a kernel is safe for a flat loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkernels._storage import code_scales
from fastkernels._update import STATS, Batch, Optionals

_REAL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_MOMENTS = (torch.float32, torch.float64, torch.bfloat16, torch.uint8)
# What each list may be stored as.
_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "grads": _REAL,
    "anchors": _REAL,
    "curvature": (*_REAL, torch.uint8),
    "remainders": (torch.int16,),
}
_OPTIONAL = ("anchors", "curvature", "curvature_scales", "remainders")


def check_table(batch: Batch) -> None:
    """Raise a ValueError when `hyper`, `groups` or `stats` do not fit; cheap, run at every call."""
    name, columns, hyper = batch.op.name, batch.op.hyper, batch.hyper
    if hyper.dim() != 2 or hyper.shape[1] != len(columns) or hyper.dtype != torch.float64:
        raise ValueError(
            f"{name}: hyper must be float64 [groups, {len(columns)}] ({', '.join(columns)}); "
            f"got {hyper.dtype} {list(hyper.shape)}"
        )
    if not hyper.is_contiguous():
        raise ValueError(f"{name}: hyper must be contiguous")
    groups = batch.groups
    if groups and not 0 <= min(groups) <= max(groups) < hyper.shape[0]:
        raise ValueError(f"{name}: groups must index the {hyper.shape[0]} rows of hyper")
    device = batch.params[0].device if batch.params else hyper.device
    if hyper.device.type not in ("cpu", device.type):
        raise ValueError(f"{name}: hyper is on {hyper.device}, params[0] on {device}")
    stats = batch.stats
    if stats is None:
        return
    if (stats.dtype, stats.shape) != (torch.float64, (len(STATS),)) or not stats.is_contiguous():
        raise ValueError(
            f"{name}: stats must be float64 [{len(STATS)}], contiguous; got {stats.dtype} "
            f"{list(stats.shape)}"
        )
    if stats.device != device:
        raise ValueError(f"{name}: stats is on {stats.device}, params[0] on {device}")


def check_tensors(batch: Batch) -> None:
    """Raise a ValueError that names the list and the entry that does not fit its parameter."""
    name, count = batch.op.name, len(batch.params)
    moments = dict(zip(batch.op.moments, batch.moments, strict=True))
    scales = dict(zip(moments, batch.moment_scales or ((),) * len(moments), strict=True))
    shaped: dict[str, Optionals] = {"grads": batch.grads, **moments}
    shaped |= {"anchors": batch.anchors, "curvature": batch.curvature}
    shaped |= {"remainders": batch.remainders}
    sizes = {**shaped, "steps": batch.steps, "groups": batch.groups}
    sizes |= {"curvature_scales": batch.curvature_scales}
    for key, entries in sizes.items():
        if len(entries) != count and not (key in _OPTIONAL and not entries):
            raise ValueError(f"{name}: {key} has {len(entries)} entries for {count} params")
    for i, p in enumerate(batch.params):
        if p.dtype not in _REAL:
            known = ", ".join(map(str, _REAL))
            raise ValueError(f"{name}: params[{i}] is {p.dtype}; it must be one of {known}")
        _check_flat(f"{name}: steps[{i}]", batch.steps[i], 1, p.device)
        for key, tensors in shaped.items():
            t = tensors[i] if tensors else None
            if t is None or (t.numel() == 0 and key in (*moments, "remainders")):
                continue
            _check_shaped(f"{name}: {key}[{i}]", t, i, p, _DTYPES.get(key, _MOMENTS))
            if key == "remainders" and p.dtype != torch.bfloat16:
                raise ValueError(f"{name}: remainders[{i}] must be of a bfloat16 parameter")
            if t.dtype == torch.uint8:
                own = scales.get(key, batch.curvature_scales)
                found = own[i] if own else None
                what = f"{name}: scales of {key}[{i}], which are 8-bit codes,"
                if found is None:
                    raise ValueError(f"{what} are missing")
                _check_flat(what, found, code_scales(t.numel()), p.device)


def _check_shaped(what: str, t: Tensor, i: int, p: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if t.layout is not p.layout:
        raise ValueError(f"{what} is {t.layout}, params[{i}] {p.layout}")
    if t.shape != p.shape:
        raise ValueError(f"{what} is {list(t.shape)}, params[{i}] is {list(p.shape)}")
    if t.device != p.device:
        raise ValueError(f"{what} is on {t.device}, params[{i}] on {p.device}")
    if t.dtype not in dtypes:
        raise ValueError(f"{what} is {t.dtype}; it must be one of {', '.join(map(str, dtypes))}")


def _check_flat(what: str, t: Tensor, size: int, device: torch.device) -> None:
    """Of a step count or scales."""
    if t.dtype != torch.float32 or t.numel() != size or not t.is_contiguous():
        raise ValueError(
            f"{what} must be float32 with {size} elements, contiguous; got {t.dtype} "
            f"{list(t.shape)}"
        )
    if t.device != device:
        raise ValueError(f"{what} must be on {device}; got {t.device}")


def is_dense(t: Tensor) -> bool:
    """Whether `t` fills its storage range without gaps and without overlap."""
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape keep their elements in the same order in the storage.

    Strides of dimensions of size 1 mean nothing.
    """
    if a.stride() == b.stride():
        return True
    return a.numel() == 0 or all(
        size == 1 or x == y for size, x, y in zip(a.shape, a.stride(), b.stride(), strict=True)
    )


def like(t: Tensor, param: Tensor) -> Tensor:
    """`t`, or a copy of it in the layout of `param`."""
    if same_layout(t, param):
        return t
    return torch.empty_strided(param.shape, param.stride(), dtype=t.dtype, device=t.device).copy_(t)


def prepare(batch: Batch) -> tuple[Batch, Callable[[], None]]:
    """Check `batch`, and give every tensor its parameter's layout, by copies where it has another.

    Returns:
        the batch to work on, and what to call after the update: it brings copies of tensors that
        were written back to where they came from.
    """
    check_tensors(batch)
    copies: list[tuple[Tensor, Tensor]] = []

    def mutated(t: Tensor, p: Tensor) -> Tensor:
        if t.numel() == 0 or same_layout(t, p):
            return t
        if t.dtype == torch.uint8:
            raise ValueError(
                f"{batch.op.name}: 8-bit codes of strides {t.stride()} for a parameter of strides "
                f"{p.stride()}; their blocks follow the storage, so both must be the same and "
                "without gaps: make the parameter contiguous, or use torch.bfloat16 state"
            )
        copies.append((t, like(t, p)))
        return copies[-1][1]

    params = list(batch.params)
    for i, p in enumerate(params):
        if any(stride == 0 and size > 1 for stride, size in zip(p.stride(), p.shape, strict=True)):
            raise ValueError(f"{batch.op.name}: params[{i}] is expanded; give its .clone()")
        if p.numel() and not is_dense(p):
            params[i] = p.contiguous()
            copies.append((p, params[i]))

    def each(tensors: Sequence[Any]) -> list[Any]:
        return [t if t is None else like(t, p) for t, p in zip(tensors, params, strict=False)]

    prepared = dataclasses.replace(
        batch,
        params=params,
        grads=each(batch.grads),
        moments=tuple(
            [mutated(t, p) for t, p in zip(m, params, strict=True)] for m in batch.moments
        ),
        anchors=each(batch.anchors),
        curvature=each(batch.curvature),
        remainders=[mutated(t, p) for t, p in zip(batch.remainders, params, strict=False)],
    )

    def write_back() -> None:
        for target, copy in copies:
            target.copy_(copy)

    return prepared, write_back
