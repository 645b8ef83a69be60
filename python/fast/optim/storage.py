"""Optimizer state: how it is stored, converted when loaded, and the forms curvature comes in.

A tensor `name` is stored as `name`, or as `name_codes` and `name_scales` in 8 bits: torch, which
would take codes for numbers, then finds nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fast.optim import dtensor
from fastkernels import codes as _storage
from fastkernels.codes import compute_dtype

State = dict[str, Any]
ROUND_TO_NEAREST = 1 << 19
# What the 8-bit codes of a state mean, as a key `code_format` of its group; a state without the key
# is of format 1. Signed codes changed in format 2 (`_storage`); unsigned ones never did.
CODE_FORMAT = 2


@dataclass(frozen=True)
class Storage:
    """Dtypes of the state; None is the exact one: float32, float64 for float64 parameters, and for
    anchors the parameter's own."""

    state_dtype: torch.dtype | None = None
    anchor_dtype: torch.dtype | None = None
    curvature_dtype: torch.dtype | None = None
    exact_bf16: bool = False

    def __post_init__(self) -> None:
        compact = (torch.float32, torch.bfloat16, torch.uint8)
        plain = (torch.float32, torch.bfloat16, torch.float16)
        for name, known in (
            ("state_dtype", compact),
            ("anchor_dtype", plain),
            ("curvature_dtype", compact),
        ):
            dtype = getattr(self, name)
            if dtype is not None and dtype not in known:
                raise ValueError(f"{name} must be None or one of {known}; got {dtype!r}")

    @property
    def codes(self) -> bool:
        """Whether anything is stored in 8-bit codes."""
        return torch.uint8 in (self.state_dtype, self.curvature_dtype)

    def dtype(self, name: str, p: Tensor) -> torch.dtype:
        """The dtype that tensor `name` of the state of `p` is stored in."""
        if name == "anchor":
            return self.anchor_dtype or p.dtype
        chosen = self.curvature_dtype if name == "curvature" else self.state_dtype
        # float64 parameters are there to be exact.
        return chosen if chosen and p.dtype != torch.float64 else compute_dtype(p)


def is_stored(state: Mapping[str, Any], name: str) -> bool:
    return state.get(name) is not None or f"{name}_codes" in state


def drop(state: State, name: str) -> None:
    for key in (name, f"{name}_codes", f"{name}_scales"):
        state.pop(key, None)


def signed(name: str) -> bool:
    """Whether codes of `name` carry a sign."""
    return name not in ("exp_avg_sq", "curvature")


def dense_like(p: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(p, dtype=dtype, requires_grad=False)


def put_zeros(state: State, name: str, p: Tensor, dtype: torch.dtype) -> None:
    drop(state, name)
    if dtype != torch.uint8:
        state[name] = dense_like(p, dtype).zero_()
        return
    state[f"{name}_codes"] = dense_like(p, dtype).zero_()
    state[f"{name}_scales"] = torch.zeros(
        _storage.code_scales(p.numel()), dtype=torch.float32, device=p.device
    )


def put(state: State, name: str, value: Tensor, p: Tensor, dtype: torch.dtype) -> None:
    """Store a copy of `value` (of the shape of `p`) as `dtype`, in the layout of `p`."""
    drop(state, name)
    if dtype != torch.uint8:
        value = dtensor.like(value.detach(), p)
        stored = dense_like(p, dtype).copy_(value)
        if torch.finfo(dtype).max < torch.finfo(value.dtype).max:
            lost = ~dtensor.local(stored).isfinite() & dtensor.local(value).isfinite()
            if bool(lost.any()):
                raise ValueError(f"{name}: a value is too large for {dtype}; choose another dtype")
        state[name] = stored
        return
    dense = dense_like(p, torch.float32).copy_(value.detach())
    codes, scales = _storage.encode(_storage.flat(dense), ROUND_TO_NEAREST, signed=signed(name))
    stored = dense_like(p, torch.uint8)
    _storage.flat(stored).copy_(codes)
    state[f"{name}_codes"], state[f"{name}_scales"] = stored, scales


def check_saved(saved: Mapping[str, Any], names: Sequence[str], p: Tensor, where: str) -> None:
    """Raise a ValueError that names the entry when a saved state is not one of `p`."""
    step = saved.get("step", 0)
    if not isinstance(step, (int, float, Tensor)) or torch.as_tensor(step).numel() != 1:
        raise ValueError(f"{where}['step'] must be one number; got {step!r}")
    shapes: dict[str, Sequence[int]] = {}
    for name in names:
        shapes |= {name: p.shape, f"{name}_codes": p.shape}
        shapes[f"{name}_scales"] = (_storage.code_scales(p.numel()),)
        if f"{name}_codes" in saved and f"{name}_scales" not in saved:
            raise ValueError(f"{where} has {name}_codes but no {name}_scales")
    for key, shape in shapes.items():
        value = saved.get(key)
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"{where}[{key!r}] must be a tensor; got {type(value).__name__}")
        if value.shape != torch.Size(shape):
            raise ValueError(
                f"{where}[{key!r}] is {list(value.shape)}, but must be {list(shape)} for its "
                f"parameter {list(p.shape)}: the state is of another model or order of parameters"
            )


def adopt(
    state: State,
    saved: Mapping[str, Any],
    name: str,
    p: Tensor,
    dtype: torch.dtype,
    code_format: int = CODE_FORMAT,
) -> None:
    """Take `name` from a loaded state in whatever form; as it is (not copied) when it fits."""
    old = code_format == 1 and signed(name)
    for key in (f"{name}_codes", name):
        value = saved.get(key)
        if value is None:
            continue
        value = dtensor.like(value, p)
        fits = value.dtype == dtype and value.device == p.device and value.stride() == p.stride()
        if fits and not (old and key != name):
            drop(state, name)
            state[key] = value
            if key != name:
                state[f"{name}_scales"] = saved[f"{name}_scales"]
            return
        if key != name:
            codes, scales = _storage.flat(value), saved[f"{name}_scales"]
            value = torch.empty_like(value, dtype=torch.float32)
            _storage.flat(value).copy_(
                _storage.decode_format_1(codes, scales)
                if old
                else _storage.decode(codes, scales, signed=signed(name))
            )
        put(state, name, value, p, dtype)
        return


def match_curvature(params: Sequence[Tensor], curvature: Any) -> list[Tensor | None]:
    """A curvature tensor (or None) for each of `params`.

    Args:
        curvature: a list of tensors in the order and shapes of `params`, or an object whose
            `curvature_for(params)` gives such a list (`fast.SourceCard`).

    Raises:
        TypeError: it is no such list.
        ValueError: number or shapes do not fit, or a value is negative or not finite.
    """
    if hasattr(curvature, "curvature_for"):
        curvature = curvature.curvature_for(params)
    if isinstance(curvature, (Tensor, Mapping)) or not isinstance(curvature, Iterable):
        raise TypeError(
            "curvature must be a SourceCard, or a list of a tensor (or None) per parameter; got "
            f"{type(curvature).__name__}"
        )
    found = list(curvature)
    if len(found) != len(params):
        raise ValueError(f"curvature: {len(found)} tensors for {len(params)} parameters")
    for i, (p, f) in enumerate(zip(params, found, strict=True)):
        if f is None:
            continue
        if not isinstance(f, Tensor):
            raise TypeError(f"curvature[{i}] must be a tensor or None; got {type(f).__name__}")
        if f.shape != p.shape:
            raise ValueError(f"curvature[{i}] is {list(f.shape)}, its parameter {list(p.shape)}")
        if f.layout is not torch.strided or not f.is_floating_point():
            raise ValueError(f"curvature[{i}] is {f.layout} {f.dtype}; it must be dense and real")
        own = dtensor.local(f)
        if own.numel() and not bool(((own >= 0) & own.isfinite()).all()):
            raise ValueError(
                f"curvature[{i}] has negative or non-finite values; clamp it (a Hessian diagonal "
                "may be negative, a GGN or Fisher diagonal is not)"
            )
    return found
