"""16-bit networks: trained in float32, and what the forward pass computes in."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fast.data.trees import leaves, mapped

HALF = (torch.bfloat16, torch.float16)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Make a network with 16-bit weights one of float32, and let it take 16-bit inputs inside.

    A step of fine-tuning is smaller than the spacing of 16-bit weights: of bfloat16 weights at a
    learning rate of 2e-5, one in a hundred would move. Nor could they hold the result, so the
    network stays in float32; the caller is warned. Parameters stay the objects that they are.
    """
    found = {t.dtype for t in chain(model.parameters(), model.buffers()) if t.dtype in HALF}
    if not found:
        yield
        return
    names = " and ".join(sorted(str(d).removeprefix("torch.") for d in found))
    warnings.warn(
        f"the network has {names} weights, too coarse for the steps of fine-tuning: it is trained "
        "and returned in float32; round it afterwards with result.model.to(dtype)",
        stacklevel=4,
    )
    model.float()
    hook = model.register_forward_pre_hook(_widened, prepend=True, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _widened(_: nn.Module, args: Any, kwargs: Any) -> Any:
    if any(x.dtype in HALF for x in leaves((args, kwargs))):
        return mapped(args, _wide), mapped(kwargs, _wide)
    return None


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in HALF else x


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The forward pass's dtype; None for full precision.

    `auto` is bfloat16 on a GPU that has it in hardware, full precision elsewhere: bfloat16 in
    software on a CPU is slower than fp32.
    """
    if precision == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else None
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
