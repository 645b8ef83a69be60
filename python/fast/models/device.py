"""Where a network computes, and how precisely."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fast.data.trees import leaves, mapped
from fast.errors import warn
from fast.ranks import local_rank

ENVIRONMENT = "FAST_DEVICE"
HALF = (torch.bfloat16, torch.float16)


def pick_device(name: str | torch.device | None) -> torch.device:
    """The device called `name`, on which a trial computation has worked.

    None stands for the device in the environment variable FAST_DEVICE, else for CUDA if there is a
    GPU, else for the CPU. Under `torchrun`, "cuda" is the GPU of this process.

    Raises:
        ValueError: there is no such device, or it cannot compute here; the message says which can.
    """
    name = name or os.environ.get(ENVIRONMENT) or None
    local = local_rank()
    if local is not None and torch.cuda.is_available() and str(name or "cuda") == "cuda":
        name = f"cuda:{local}"
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones((), device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # torch raises any of the three
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ValueError(
            f"device {str(name)!r} cannot be used here: there is {', '.join(here)}"
        ) from error
    return device


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype of a forward pass under autocast; None for full precision.

    `auto` is bfloat16 on a GPU that has it in hardware, and full precision elsewhere, because on a
    CPU bfloat16 in software is slower than fp32.

    Args:
        precision: auto, fp32, bf16 or fp16.
    """
    if precision == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else None
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def trains_in_16_bits(model: nn.Module) -> bool:
    return any(p.requires_grad and p.dtype in HALF for p in model.parameters())


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Turn 16-bit weights into float32, for good; inside the block 16-bit inputs are widened, too.

    A step of fine-tuning is smaller than the spacing of 16-bit numbers: at a learning rate of 2e-5,
    one bfloat16 weight in a hundred would move. 16 bits could not hold the result either, so the
    network stays in float32, and a warning says so. Parameters stay the same objects.
    """
    dtypes = {t.dtype for t in chain(model.parameters(), model.buffers()) if t.dtype in HALF}
    if not dtypes:
        yield
        return
    names = " and ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
    warn(
        f"the network has {names} weights, too coarse for the steps of fine-tuning: it is trained "
        "and returned in float32; round it afterwards with result.model.to(dtype)",
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
