"""Checks and layout rules of the update ops: what reaches a kernel is safe for a flat loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkernels._storage import code_scales
from fastkernels._update import STATS, Batch, Optionals

_MOMENT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.uint8)


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
    stats = batch.stats
    if stats is not None and (stats.dtype, stats.shape) != (torch.float64, (len(STATS),)):
        raise ValueError(
            f"{name}: stats must be float64 [{len(STATS)}]; got {stats.dtype} {list(stats.shape)}"
        )


def check_tensors(batch: Batch) -> None:
    """Raise a ValueError that names the list and the entry that does not fit its parameter."""
    name, count = batch.op.name, len(batch.params)
    moments = dict(zip(batch.op.moments, batch.moments, strict=True))
    lists: dict[str, Optionals] = {"grads": batch.grads, **moments}
    lists |= {"anchors": batch.anchors, "curvature": batch.curvature}
    lists |= {"remainders": batch.remainders}
    optional = ("anchors", "curvature", "remainders", "curvature_scales")
    scales = {
        m: batch.moment_scales[k] if batch.moment_scales else () for k, m in enumerate(moments)
    }
    sizes = {**lists, "steps": batch.steps, "groups": batch.groups}
    sizes |= {"curvature_scales": batch.curvature_scales}
    for key, entries in sizes.items():
        if len(entries) != count and not (key in optional and not entries):
            raise ValueError(f"{name}: {key} has {len(entries)} entries for {count} params")
    for i, p in enumerate(batch.params):
        if not p.is_floating_point():
            raise ValueError(f"{name}: params[{i}] is {p.dtype}; it must be a real floating type")
        if batch.steps[i].dtype != torch.float32 or batch.steps[i].numel() != 1:
            raise ValueError(f"{name}: steps[{i}] must be float32 []")
        for key, tensors in lists.items():
            t = tensors[i] if tensors else None
            if t is None or (t.numel() == 0 and key in (*moments, "remainders")):
                continue
            if t.layout is not p.layout:
                raise ValueError(f"{name}: {key}[{i}] is {t.layout}, params[{i}] {p.layout}")
            if t.shape != p.shape:
                raise ValueError(
                    f"{name}: {key}[{i}] is {list(t.shape)}, params[{i}] is {list(p.shape)}"
                )
            if t.device != p.device:
                raise ValueError(f"{name}: {key}[{i}] is on {t.device}, params[{i}] on {p.device}")
            if key in moments:
                if t.dtype not in _MOMENT_DTYPES:
                    known = ", ".join(map(str, _MOMENT_DTYPES))
                    raise ValueError(f"{name}: {key}[{i}] is {t.dtype}; it must be one of {known}")
                _check_scales(f"{name}: scales of {key}", i, t, scales[key])
            elif key == "curvature":
                _check_scales(f"{name}: curvature_scales", i, t, batch.curvature_scales)
            elif key == "remainders" and (t.dtype, p.dtype) != (torch.int16, torch.bfloat16):
                raise ValueError(f"{name}: remainders[{i}] must be int16, of a bfloat16 parameter")


def _check_scales(what: str, i: int, t: Tensor, scales: Optionals) -> None:
    if t.dtype != torch.uint8:
        return
    found = scales[i] if scales else None
    if found is None or found.dtype != torch.float32 or found.numel() != code_scales(t.numel()):
        raise ValueError(f"{what}[{i}] must be float32 [{code_scales(t.numel())}] for 8-bit codes")


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

    Returns the batch to work on, and what to call afterwards: it brings copies of mutated tensors
    back. Only gradients may be copied while every other tensor stays: then nothing is brought back.
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
