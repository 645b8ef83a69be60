"""Checks and layout rules of the update ops: what reaches a kernel is safe for a flat loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkernels import _memory
from fastkernels._storage import code_scales
from fastkernels._update import STATS, Batch

_REAL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_MOMENTS = (torch.float32, torch.float64, torch.bfloat16, torch.uint8)
# What each list may be stored as.
_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "grads": _REAL,
    "anchors": _REAL,
    "curvature": (*_REAL, torch.uint8),
    "remainders": (torch.int16,),
}


def check_call(batch: Batch) -> None:
    """Raise a ValueError when anything but the entries of the lists does not fit; cheap, run at
    every call."""
    name, columns, hyper = batch.op.name, batch.op.hyper, batch.hyper
    lists = _lists(batch) | {"groups": batch.groups}
    for key, entries in lists.items():
        if not isinstance(entries, (list, tuple)):
            raise ValueError(f"{name}: {key} must be a list; got {type(entries).__name__}")
    device = batch.params[0].device if batch.params else torch.device("cpu")
    table = f"float64 [groups, {len(columns)}] ({', '.join(columns)})"
    _check_array(f"{name}: hyper", hyper, table, None, len(columns))
    if hyper.device.type not in ("cpu", device.type):
        raise ValueError(f"{name}: hyper is on {hyper.device}, params[0] on {device}")
    rows, groups = hyper.shape[0], batch.groups
    integers = set(map(type, groups)) <= {int}
    if not integers or (groups and not 0 <= min(groups) <= max(groups) < rows):
        raise ValueError(f"{name}: groups must index the {rows} rows of hyper")
    if batch.stats is not None:
        _check_array(f"{name}: stats", batch.stats, f"float64 [{len(STATS)}]", len(STATS))
        if batch.stats.is_inference():
            raise ValueError(f"{name}: stats is an inference tensor, which may not be written to")
        if batch.stats.device != device:
            raise ValueError(f"{name}: stats is on {batch.stats.device}, params[0] on {device}")
    norm, seed = batch.max_grad_norm, batch.seed
    if norm is not None and (not _is_number(norm) or not norm > 0):
        raise ValueError(f"{name}: max_grad_norm must be None or positive; got {norm!r}")
    if not _is_number(seed) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"{name}: seed must be an integer in [0, 2**63); got {seed!r}")
    for key, flag in (("grad_scale", batch.grad_scale), ("found_inf", batch.found_inf)):
        if flag is not None and (
            not isinstance(flag, Tensor) or flag.numel() != 1 or flag.is_complex()
        ):
            got = list(flag.shape) if isinstance(flag, Tensor) else repr(flag)
            raise ValueError(f"{name}: {key} must be None or a tensor of one number; got {got}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_array(what: str, t: Any, wanted: str, *shape: int | None) -> None:
    """Of a float64 array; None: any size."""
    if not isinstance(t, Tensor):
        raise ValueError(f"{what} must be {wanted}; got {type(t).__name__}")
    fits = t.dim() == len(shape) and all(
        size in (None, n) for size, n in zip(shape, t.shape, strict=True)
    )
    if t.dtype != torch.float64 or not fits:
        raise ValueError(f"{what} must be {wanted}; got {t.dtype} {list(t.shape)}")
    if not t.is_contiguous() or t.is_neg() or (t.numel() and t.data_ptr() % t.element_size()):
        raise ValueError(f"{what} must be contiguous and aligned; give its .clone()")


def _lists(batch: Batch) -> dict[str, Sequence[Any]]:
    """Every list of tensors by its name."""
    moments = dict(zip(batch.op.moments, batch.moments, strict=True))
    scales = zip(moments, batch.moment_scales, strict=False)
    return {
        "params": batch.params, "grads": batch.grads, **moments, "steps": batch.steps,
        "anchors": batch.anchors, "curvature": batch.curvature, "remainders": batch.remainders,
        "curvature_scales": batch.curvature_scales,
        **{f"scales of {key}": entries for key, entries in scales},
    }  # fmt: skip


def written(batch: Batch) -> list[Tensor]:
    """What a call writes to, but for `stats`."""
    lists = _lists(batch).items()
    return [t for key, entries in lists if key not in _READ for t in entries if t.numel()]


_READ = {"grads", "anchors", "curvature", "curvature_scales"}


def check_tensors(batch: Batch) -> None:
    """Raise a ValueError that names the list and the entry that does not fit its parameter, or that
    breaks a rule of `_memory`."""
    name, count, lists = batch.op.name, len(batch.params), _lists(batch)
    required = {"params", "grads", "steps", "groups", *batch.op.moments}
    for key, entries in (lists | {"groups": batch.groups}).items():
        if len(entries) != count and (entries or key in required):
            raise ValueError(f"{name}: {key} has {len(entries)} entries for {count} params")
        for i, t in enumerate(entries):
            optional = t is None and key in _READ - {"grads"}
            if key != "groups" and not isinstance(t, Tensor) and not optional:
                raise ValueError(f"{name}: {key}[{i}] must be a tensor; got {type(t).__name__}")
    shaped = ("grads", *batch.op.moments, "anchors", "curvature", "remainders")
    may_be_empty = ("remainders", *batch.op.optional_moments)
    for i, p in enumerate(batch.params):
        if p.dtype not in _REAL:
            known = ", ".join(map(str, _REAL))
            raise ValueError(f"{name}: params[{i}] is {p.dtype}; it must be one of {known}")
        if p.layout is not torch.strided:
            raise ValueError(f"{name}: params[{i}] is {p.layout}; it must be dense")
        _check_flat(f"{name}: steps[{i}]", batch.steps[i], 1, p.device)
        for key in shaped:
            t = lists[key][i] if lists[key] else None
            if t is None or (t.numel() == 0 and key in may_be_empty):
                continue
            _check_shaped(f"{name}: {key}[{i}]", t, i, p, _DTYPES.get(key, _MOMENTS))
            if key == "remainders" and p.dtype != torch.bfloat16:
                raise ValueError(f"{name}: remainders[{i}] must be of a bfloat16 parameter")
            if t.dtype == torch.uint8:
                own = "curvature_scales" if key == "curvature" else f"scales of {key}"
                found = lists[own][i] if lists.get(own) else None
                what = f"{name}: scales of {key}[{i}], which are 8-bit codes,"
                if found is None:
                    raise ValueError(f"{what} are missing")
                _check_flat(what, found, code_scales(t.numel()), p.device)
    _memory.check(name, (
        (f"{key}[{i}]", t, key not in _READ)
        for key, entries in lists.items() for i, t in enumerate(entries) if t is not None
    ))  # fmt: skip


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
        if p.numel() and not _memory.is_dense(p):
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
