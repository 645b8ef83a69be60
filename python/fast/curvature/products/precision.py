"""The arithmetic in which matrix products and convolutions of float32 numbers are computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
GEMMS = (None, "float32", "tf32", "bfloat16")
_PRODUCTS = {
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
    aten.convolution.default,
    aten.convolution_backward.default,
}
# Products that are added to a tensor that is there, or written to it, by the product alone.
_ONTO = {aten.baddbmm_.default: aten.bmm.default, aten.addmm_.default: aten.mm.default}
_INTO = {aten.mm.out: aten.mm.default, aten.bmm.out: aten.bmm.default}


class Bfloat16Products(TorchDispatchMode):
    """Rounds the operands of products of float32 numbers to bfloat16; sums stay in float32."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in `Recorder`

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ONTO:
            onto, *factors = args
            product = _rounded(_ONTO[func], factors, {})
            onto.mul_(kwargs.get("beta", 1))
            return onto.add_(product, alpha=kwargs.get("alpha", 1))
        if func in _INTO:
            return kwargs["out"].copy_(_rounded(_INTO[func], args, {}))
        if func in _PRODUCTS:
            return _rounded(func, args, kwargs)
        return func(*args, **kwargs)


def _rounded(func: Any, args: Any, kwargs: Any) -> Any:
    """A product of factors in bfloat16, as float32."""

    def to_bfloat16(t: Tensor) -> Tensor:
        return t.bfloat16() if t.dtype == torch.float32 else t

    def to_float32(t: Tensor) -> Tensor:
        return t.float() if t.dtype == torch.bfloat16 else t

    out = func(*pytree.tree_map_only(Tensor, to_bfloat16, args), **kwargs)
    return pytree.tree_map_only(Tensor, to_float32, out)


def rounding(gemm: str | None) -> AbstractContextManager[Any]:
    """A context for a pass, which rounds products to bfloat16 where `gemm` says so."""
    return Bfloat16Products() if gemm == "bfloat16" else nullcontext()


@contextmanager
def backends(gemm: str | None, device: torch.device) -> Iterator[None]:
    """A context for everything that is computed on a device: it says whether a GPU may use TF32."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    if gemm is None or device.type != "cuda":
        yield
        return
    before = [s.fp32_precision for s in switches]
    try:
        for s in switches:
            s.fp32_precision = "tf32" if gemm == "tf32" else "ieee"
        yield
    finally:
        for s, precision in zip(switches, before, strict=True):
            s.fp32_precision = precision
