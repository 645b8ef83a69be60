"""Where and how exactly a run computes: device, precision of the forward pass, loss scale."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fast.data.trees import leaves, mapped

ENVIRONMENT = "FAST_DEVICE"
HALF = (torch.bfloat16, torch.float16)


class Engine:
    """One device.

    Args:
        device: of the network.
        precision: an option of `TrainConfig`; "fp16" scales the loss.
    """

    def __init__(self, device: torch.device, precision: str) -> None:
        self.device = device
        self.dtype = autocast_dtype(precision, device)
        self._scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def backward(self, loss: Tensor) -> None:
        self._scaler.scale(loss).backward()

    def step(self, optimizer: Optimizer) -> None:
        self._scaler.step(optimizer)
        self._scaler.update()

    def state_dict(self) -> dict[str, Any]:
        return self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scaler.load_state_dict(state)


def pick_device(name: str | torch.device | None) -> torch.device:
    """The device called `name`, tried out; None: that of the environment variable FAST_DEVICE, else
    CUDA when there is one, else the CPU.

    Raises:
        ValueError: no such device, or none that can compute here; the message says which can.
    """
    name = name or os.environ.get(ENVIRONMENT) or None
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones((), device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # torch has all three for it
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ValueError(
            f"device {str(name)!r} cannot be used here: there is {', '.join(here)}"
        ) from error
    return device


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
