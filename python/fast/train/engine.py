"""The device of a run, the precision of its forward pass, and the loss scale."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from fast import dtensor
from fast.data.trees import leaves, mapped, pick
from fast.errors import warn
from fast.heads import forward_logits, in_mode
from fast.ranks import ALONE, Ranks, local_rank

ENVIRONMENT = "FAST_DEVICE"
HALF = (torch.bfloat16, torch.float16)


class Engine:
    """One device, of this process.

    Args:
        device: the network's device.
        precision: as in `TrainConfig`; "fp16" scales the loss.
        ranks: the processes that train together.

    Attributes:
        network: the network in `DistributedDataParallel`, set by `parallelize`; None for one
            process.
    """

    def __init__(self, device: torch.device, precision: str, ranks: Ranks = ALONE) -> None:
        self.device, self.ranks = device, ranks
        self.network: DistributedDataParallel | None = None
        self.dtype = autocast_dtype(precision, device)
        self._scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def parallelize(self, model: nn.Module, sample: Any) -> None:
        """Average gradients over the ranks from now on; a sharded network does so by itself.

        A trial pass tells whether all parameters get a gradient. It also makes torch settle the
        order of its messages, which it does after the first pass, so that a resumed run rounds its
        sums as an uninterrupted one does.

        Args:
            model: with its new head.
            sample: a batch of its inputs.
        """
        params = list(model.parameters())
        if self.ranks.size == 1 or not any(p.requires_grad for p in params):
            return
        if dtensor.any_sharded(params):
            return
        few = pick(sample, slice(2))
        with in_mode(model, False), held_buffers(model):
            forward_logits(model, few).float().sum().backward()
            unused = any(p.requires_grad and p.grad is None for p in model.parameters())
            self.network = DistributedDataParallel(
                model,
                process_group=self.ranks.group,
                find_unused_parameters=bool(self.ranks.largest(unused)),
            )
            for _ in range(2):
                forward_logits(self.network, few).float().sum().backward()
        model.zero_grad()

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Context of a micro-batch: gradients are averaged with the last one of a step."""
        return nullcontext() if self.network is None or last else self.network.no_sync()

    def backward(self, loss: Tensor) -> None:
        self._scaler.scale(loss).backward()

    def step(self, optimizer: Optimizer) -> None:
        self._scaler.step(optimizer)
        self._scaler.update()

    def state_dict(self) -> dict[str, Any]:
        return self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scaler.load_state_dict(state)


@contextmanager
def held_buffers(model: nn.Module) -> Iterator[None]:
    """Restore buffers and random states after the block."""
    before = [(b, b.clone()) for b in model.buffers()]
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    for buffer, value in before:
        buffer.copy_(value)


def pick_device(name: str | torch.device | None) -> torch.device:
    """The device called `name`, after a trial computation on it.

    None takes the device in the environment variable FAST_DEVICE, else CUDA if there is a GPU, else
    the CPU. Under `torchrun`, "cuda" is the GPU of this process.

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


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Turn 16-bit weights into float32, for good; inside the block 16-bit inputs are widened too.

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


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The forward pass's dtype; None for full precision.

    `auto` is bfloat16 on a GPU that has it in hardware, and full precision elsewhere: on a CPU,
    bfloat16 in software is slower than fp32.
    """
    if precision == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else None
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
