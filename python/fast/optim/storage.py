"""The state of a parameter: the dtypes of its tensors, and their 8-bit codes.

The tensor `name` is the entry `name` of the state; in 8 bits it is the entries `name_codes` and
`name_scales` instead, because torch would mistake codes under `name` for numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fast import dtensor
from fastkernels import codes as codec
from fastkernels.codes import compute_dtype

State = dict[str, Any]
# The format of the 8-bit codes in a state is the key `code_format` of its group; without the key it
# is format 1. Format 2 changed signed codes; unsigned codes never changed.
CODE_FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class Storage:
    """Dtypes of the state. None is the exact dtype: float32, or float64 for float64 parameters, and
    the parameter's own for anchors."""

    state_dtype: torch.dtype | None = None
    anchor_dtype: torch.dtype | None = None
    curvature_dtype: torch.dtype | None = None
    exact_bf16: bool = False

    def __post_init__(self) -> None:
        compact = (torch.float32, torch.bfloat16, torch.uint8)
        plain = (torch.float32, torch.bfloat16, torch.float16)
        for name, choices in (
            ("state_dtype", compact),
            ("anchor_dtype", plain),
            ("curvature_dtype", compact),
        ):
            dtype = getattr(self, name)
            if dtype is not None and dtype not in choices:
                raise ValueError(f"{name} must be None or one of {choices}; got {dtype!r}")

    @property
    def codes(self) -> bool:
        """Whether anything is stored in 8-bit codes."""
        return torch.uint8 in (self.state_dtype, self.curvature_dtype)

    def dtype(self, name: str, p: Tensor) -> torch.dtype:
        """The dtype of the tensor `name` in the state of `p`."""
        if name == "anchor":
            return self.anchor_dtype or p.dtype
        dtype = self.curvature_dtype if name == "curvature" else self.state_dtype
        # float64 parameters are there to be exact.
        return dtype if dtype and p.dtype != torch.float64 else compute_dtype(p)


def signed(name: str) -> bool:
    """Whether codes of the tensor `name` carry a sign."""
    return name not in ("exp_avg_sq", "curvature")


def empty_like(p: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(p, dtype=dtype, requires_grad=False)


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor of a state: numbers, or 8-bit codes and their scales (float32, one a block)."""

    values: Tensor
    scales: Tensor | None = None

    @classmethod
    def zeros(cls, p: Tensor, dtype: torch.dtype) -> StoredTensor:
        """Zeros in the shape and layout of `p`."""
        values = empty_like(p, dtype).zero_()
        if dtype != torch.uint8:
            return cls(values=values)
        count = codec.code_scales(p.numel())
        return cls(values=values, scales=torch.zeros(count, dtype=torch.float32, device=p.device))

    @classmethod
    def encode(cls, name: str, value: Tensor, p: Tensor, dtype: torch.dtype) -> StoredTensor:
        """A copy of `value` as `dtype`, in the shape and layout of `p`.

        Raises:
            ValueError: a finite value is infinite in `dtype`.
        """
        value = value.detach()
        if dtype != torch.uint8:
            value = dtensor.like(value, p)
            values = empty_like(p, dtype).copy_(value)
            if torch.finfo(dtype).max < torch.finfo(value.dtype).max:
                overflow = ~dtensor.local(values).isfinite() & dtensor.local(value).isfinite()
                if bool(overflow.any()):
                    raise ValueError(
                        f"{name}: a value is too large for {dtype}; choose another dtype"
                    )
            return cls(values=values)
        dense = empty_like(p, torch.float32).copy_(value)
        codes, scales = codec.encode(codec.flat(dense), codec.NEAREST, signed=signed(name))
        values = empty_like(p, torch.uint8)
        codec.flat(values).copy_(codes)
        return cls(values=values, scales=scales)

    def decode(self, name: str, code_format: int) -> Tensor:
        """The numbers: float32 from codes, and in the dtype they have otherwise."""
        if self.scales is None:
            return self.values
        codes, scales = codec.flat(self.values), self.scales
        numbers = torch.empty_like(self.values, dtype=torch.float32)
        codec.flat(numbers).copy_(
            codec.decode_format_1(codes, scales)
            if code_format == 1 and signed(name)
            else codec.decode(codes, scales, signed=signed(name))
        )
        return numbers

    @classmethod
    def read(cls, state: Mapping[str, Any], name: str) -> StoredTensor | None:
        """The tensor `name` of a state; None where the state has none."""
        if (codes := state.get(f"{name}_codes")) is not None:
            return cls(values=codes, scales=state[f"{name}_scales"])
        values = state.get(name)
        return None if values is None else cls(values=values)

    def write(self, state: State, name: str) -> None:
        """Make it the tensor `name` of `state`."""
        drop(state, name)
        if self.scales is None:
            state[name] = self.values
        else:
            state[f"{name}_codes"], state[f"{name}_scales"] = self.values, self.scales


def complete(state: State, p: Tensor, moments: Sequence[str], storage: Storage) -> None:
    """Give the state of `p` what it lacks: torch's optimizer can load and step what is saved."""
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
    for name in moments:
        if not is_stored(state, name):
            StoredTensor.zeros(p, storage.dtype(name, p)).write(state, name)
    if storage.exact_bf16 and p.dtype == torch.bfloat16 and "remainder" not in state:
        state["remainder"] = empty_like(p, torch.int16).zero_()


def is_stored(state: Mapping[str, Any], name: str) -> bool:
    return state.get(name) is not None or f"{name}_codes" in state


def drop(state: State, name: str) -> None:
    for key in (name, f"{name}_codes", f"{name}_scales"):
        state.pop(key, None)
