"""Check the tensors of an update, so that kernels can loop over them as flat arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkernels import memory
from fastkernels.codes import code_scales
from fastkernels.ops.update.call import UpdateCall

_REAL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_MOMENTS = (torch.float32, torch.float64, torch.bfloat16, torch.uint8)
# The dtypes that the entries of each list may have.
_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "grads": _REAL,
    "anchors": _REAL,
    "curvature": (*_REAL, torch.uint8),
    "remainders": (torch.int16,),
}
# The lists that may have None as an entry.
_OPTIONAL = ("anchors", "curvature", "curvature_scales")


def check_tensors(call: UpdateCall) -> None:
    """Raise a ValueError that names the list and the entry that does not fit its parameter, or that
    breaks a rule of `fastkernels.memory`."""
    lists = call.lists()
    _check_entries(call, lists)
    for i in range(len(call.params)):
        _check_tensor(call, lists, i)
    tensors = [
        (f"{key}[{i}]", t, key in call.rule.outputs)
        for key, entries in lists.items() for i, t in enumerate(entries) if t is not None
    ]  # fmt: skip
    tensors.append(("hyper", call.hyper, False))
    if call.stats is not None:
        tensors.append(("stats", call.stats, True))
    memory.check(call.rule.name, tensors)


def _check_entries(call: UpdateCall, lists: dict[str, Sequence[Any]]) -> None:
    """Check that every list has an entry per parameter, and a tensor as each of them."""
    name, count = call.rule.name, len(call.params)
    required = {"params", "grads", "steps", "groups", *call.rule.moments}
    for key, entries in (lists | {"groups": call.groups}).items():
        if len(entries) != count and (entries or key in required):
            raise ValueError(f"{name}: {key} has {len(entries)} entries for {count} params")
        for i, t in enumerate(entries):
            if key == "groups" or (t is None and key in _OPTIONAL):
                continue
            if not isinstance(t, Tensor):
                raise ValueError(f"{name}: {key}[{i}] must be a tensor; got {type(t).__name__}")


def _check_tensor(call: UpdateCall, lists: dict[str, Sequence[Any]], i: int) -> None:
    """Check parameter i, and that the tensors that belong to it fit it."""
    name, p, device = call.rule.name, call.params[i], call.params[0].device
    if p.dtype not in _REAL:
        legal = ", ".join(map(str, _REAL))
        raise ValueError(f"{name}: params[{i}] is {p.dtype}; it must be one of {legal}")
    if p.layout is not torch.strided:
        raise ValueError(f"{name}: params[{i}] is {p.layout}; it must be dense")
    if p.device != device:
        raise ValueError(
            f"{name}: params[{i}] is on {p.device}, params[0] on {device}; make a call for each "
            "device"
        )
    _check_flat(f"{name}: steps[{i}]", call.steps[i], 1, device)
    may_be_empty = ("remainders", *call.rule.optional_moments)
    for key in ("grads", *call.rule.moments, "anchors", "curvature", "remainders"):
        t = lists[key][i] if lists[key] else None
        if t is None or (t.numel() == 0 and key in may_be_empty):
            continue
        _check_like_param(f"{name}: {key}[{i}]", t, i, p, _DTYPES.get(key, _MOMENTS))
        if key == "remainders" and p.dtype != torch.bfloat16:
            raise ValueError(f"{name}: remainders[{i}] must be of a bfloat16 parameter")
        if t.dtype == torch.uint8:
            scale_key = call.rule.scales_of(key)
            scales = lists[scale_key][i] if lists[scale_key] else None
            if scales is None:
                raise ValueError(
                    f"{name}: {key}[{i}] are 8-bit codes, and {scale_key} has no scales of them"
                )
            _check_flat(f"{name}: {scale_key}[{i}]", scales, code_scales(t.numel()), device)


def _check_like_param(
    what: str, t: Tensor, i: int, p: Tensor, dtypes: Sequence[torch.dtype]
) -> None:
    """Check a tensor of the shape of parameter i, `p`."""
    if t.layout is not p.layout:
        raise ValueError(f"{what} is {t.layout}, params[{i}] {p.layout}")
    if t.shape != p.shape:
        raise ValueError(f"{what} is {list(t.shape)}, params[{i}] is {list(p.shape)}")
    if t.device != p.device:
        raise ValueError(f"{what} is on {t.device}, params[{i}] on {p.device}")
    if t.dtype not in dtypes:
        raise ValueError(f"{what} is {t.dtype}; it must be one of {', '.join(map(str, dtypes))}")


def _check_flat(what: str, t: Tensor, size: int, device: torch.device) -> None:
    """Check a step count, or scales, of `size` elements."""
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


def prepare(call: UpdateCall) -> tuple[UpdateCall, Callable[[], None]]:
    """Check `call`, and give every tensor its parameter's layout, by a copy if it has another.

    Returns:
        the call to work on, and a function to run after the update, which copies what was written
        back to where it belongs.
    """
    check_tensors(call)
    copies: list[tuple[Tensor, Tensor]] = []

    def in_layout(t: Tensor, p: Tensor) -> Tensor:
        if t.numel() == 0 or same_layout(t, p):
            return t
        if t.dtype == torch.uint8:
            raise ValueError(
                f"{call.rule.name}: 8-bit codes of strides {t.stride()} for a parameter of "
                f"strides {p.stride()}; their blocks follow the storage, so both must be the same "
                "and without gaps: make the parameter contiguous, or use torch.bfloat16 state"
            )
        copies.append((t, like(t, p)))
        return copies[-1][1]

    params = list(call.params)
    for i, p in enumerate(params):
        if p.numel() and not memory.is_dense(p):
            params[i] = p.contiguous()
            copies.append((p, params[i]))

    def each(tensors: Sequence[Any]) -> list[Any]:
        return [t if t is None else like(t, p) for t, p in zip(tensors, params, strict=False)]

    result = dataclasses.replace(
        call,
        params=params,
        grads=each(call.grads),
        moments=tuple(
            [in_layout(t, p) for t, p in zip(m, params, strict=True)] for m in call.moments
        ),
        anchors=each(call.anchors),
        curvature=each(call.curvature),
        remainders=[in_layout(t, p) for t, p in zip(call.remainders, params, strict=False)],
    )

    def write_back() -> None:
        for target, copy in copies:
            target.copy_(copy)

    return result, write_back
