"""What the anchored updates share: the batch of one call, and its way to a backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkernels import _backends

STATS = ("grad_norm", "drift", "update_norm", "forgetting")
# Elements that share one scale in a moment or curvature of 8-bit codes; as in csrc.
CODE_BLOCK = 128

Optionals = Sequence[Tensor | None]


@dataclass(frozen=True, slots=True)
class Op:
    """An update op: its name, the columns of its hyper table, and its lists of moments, of which
    those in `optional_moments` may have entries of 0 elements."""

    name: str
    hyper: tuple[str, ...]
    moments: tuple[str, ...]
    optional_moments: tuple[str, ...] = ()


@dataclass(slots=True)
class Batch:
    """One call: parallel lists over N tensors; see the public functions for their meaning."""

    op: Op
    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    moments: tuple[Sequence[Tensor], ...]
    steps: Sequence[Tensor]
    hyper: Tensor
    groups: Sequence[int]
    anchors: Optionals = ()
    curvature: Optionals = ()
    curvature_scales: Optionals = ()
    moment_scales: tuple[Sequence[Tensor], ...] = ()
    remainders: Sequence[Tensor] = ()
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    max_grad_norm: float | None = None
    stats: Tensor | None = None
    seed: int = 0


# csrc's Dtype; 0 is "none".
DTYPE_CODES = {
    torch.float32: 1, torch.float64: 2, torch.bfloat16: 3, torch.float16: 4, torch.uint8: 5,
}  # fmt: skip


def dtype_codes(batch: Batch) -> bytes:
    """Six for each tensor: parameter, gradient, two moments, anchor, curvature."""
    none: list[None] = [None] * len(batch.params)
    moments = [*batch.moments, none][:2]
    columns = (batch.params, batch.grads, *moments, batch.anchors or none, batch.curvature or none)
    codes = bytearray()
    for row in zip(*columns, strict=True):
        codes += bytes(0 if t is None or not t.numel() else DTYPE_CODES[t.dtype] for t in row)
    return bytes(codes)


def compute_dtype(param: Tensor) -> torch.dtype:
    """The dtype of the arithmetic, and of state by default."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


_PLAIN = {Tensor, torch.nn.Parameter}


def direct(op: Op, params: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
    """Whether the op can be run without torch's dispatcher: eager, plain tensors, nobody watching.

    The dispatcher unpacks and packs every tensor of every list: 6 ms for 2000 tensors. It makes
    plain tensors of what is none in memory: wrappers (a gradient that is still being all-reduced),
    and the negative views that autograd makes of complex numbers.

    Raises:
        ValueError: `params` or `grads` is no list of tensors, which the dispatcher says at length.
    """
    if torch.compiler.is_compiling():
        return False
    plain = True
    for key, tensors in (("params", params), ("grads", grads)):
        if not isinstance(tensors, (list, tuple)):
            raise ValueError(f"{op.name}: {key} must be a list; got {type(tensors).__name__}")
        if not set(map(type, tensors)) <= _PLAIN:
            plain = False
            for i, t in enumerate(tensors):
                if not isinstance(t, Tensor):
                    raise ValueError(
                        f"{op.name}: {key}[{i}] must be a tensor; got {type(t).__name__}"
                    )
    return plain and not (
        torch._C._len_torch_dispatch_stack()
        or torch.autograd._profiler_enabled()
        or any(map(Tensor.is_neg, grads))
    )


def addresses(tensors: Optionals) -> list[int]:
    """0 for what is not there."""
    return [0 if t is None else t.data_ptr() for t in tensors]


@torch.no_grad()
def run(batch: Batch) -> None:
    """Check what is cheap to check, and hand `batch` to the backend of its device."""
    from fastkernels import _checks

    _checks.check_call(batch)
    if batch.params:
        backend: Any = _backends.choose(batch.op.name, batch.params[0].device.type)
        backend(batch)
