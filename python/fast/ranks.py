"""The processes that train one network together, and what they exchange.

Everything that data parallelism needs beyond the averaged gradients of `DistributedDataParallel`
goes through a `Ranks`. With one process, each of its methods returns its argument. Figures on the
device are reduced there, so that no host waits for them; decisions are exchanged on the host, by
gloo.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

AUTO = "auto"


class RankError(RuntimeError):
    """Another rank failed."""


class Ranks:
    """One process, or those of a group, which all have to call the same methods in the same order.

    Args:
        process_group: a group of torch.distributed; `"auto"` takes all processes if
            torch.distributed is initialised; None takes this process alone.

    Attributes:
        group: the process group; None for one process.
        rank: number of this process, from 0.
        size: number of processes.
    """

    def __init__(self, process_group: dist.ProcessGroup | str | None = None) -> None:
        group: Any = process_group
        if not (group is None or group == AUTO or isinstance(group, dist.ProcessGroup)):
            raise ValueError(
                f"process_group must be 'auto', None or a process group; got {group!r}"
            )
        if isinstance(group, str):
            group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        self.group: Any = None
        self.rank, self.size = 0, 1
        if group is not None and dist.get_world_size(group) > 1:
            self.group = group
            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
            self._first = dist.get_global_rank(group, 0)
            self._host = _host_group(group)

    @property
    def first(self) -> bool:
        """Whether this process writes the files and speaks for all."""
        return self.rank == 0

    @property
    def share(self) -> slice:
        """This process's part of anything that all of them share."""
        return slice(None) if self.size == 1 else slice(self.rank, None, self.size)

    # Figures, where they are.

    def sum_(self, values: Tensor) -> Tensor:
        """Add up a tensor over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    @torch.no_grad()
    def mean_(self, tensors: Iterable[Tensor]) -> None:
        """Put the mean over the ranks in place of each tensor, in one message."""
        tensors = list(tensors)
        if self.size == 1 or not tensors:
            return
        flat = self.sum_(torch.cat([x.detach().flatten() for x in tensors])) / self.size
        for x, mean in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
            x.copy_(mean.view_as(x))

    @torch.no_grad()
    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite these tensors with those of the first rank."""
        if self.size > 1:
            for x in tensors:
                value = x.detach().contiguous()
                dist.broadcast(value, self._first, group=self.group)
                x.copy_(value)

    # Decisions, on the host.

    def from_first(self, value: Any) -> Any:
        """The value that the first rank has."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, self._first, group=self._host, device=_CPU)
        return values[0]

    def all(self, value: Any) -> list[Any]:
        """The values of all ranks."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self._host)
        return values

    def total(self, number: int) -> int:
        """The sum over the ranks."""
        return number if self.size == 1 else int(self._reduced(number, dist.ReduceOp.SUM))

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        return number if self.size == 1 else int(self._reduced(number, dist.ReduceOp.MAX))

    def _reduced(self, number: int, op: Any) -> int:
        values = torch.tensor(number, dtype=torch.int64)
        dist.all_reduce(values, op, group=self._host)
        return int(values)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that raises on one rank raises on all; nothing in it may wait for other ranks.

        Raises:
            RankError: another rank failed; the message is that rank's.
        """
        try:
            yield
        except Exception as error:
            self._failure(f"{type(error).__name__}: {error}")
            raise
        failure = self._failure(None)
        if failure is not None:
            raise RankError(failure)

    def _failure(self, own: str | None) -> str | None:
        """The message of the first rank that failed; None if none did."""
        if self.size == 1 or not self.largest(own is not None):
            return None
        said = self.all(own)
        return next(f"rank {i} failed: {x}" for i, x in enumerate(said) if x is not None)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Warnings and log lines come from the first rank only."""
        if self.first:
            yield
            return
        log = logging.getLogger("fast")
        before, log.disabled = log.disabled, True
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            log.disabled = before


ALONE = Ranks()
_CPU = torch.device("cpu")


def tensors_of(model: nn.Module) -> list[Tensor]:
    """All parameters and buffers of a network."""
    return [*model.parameters(), *model.buffers()]


def _host_group(group: Any) -> Any:
    """A group of the same processes that exchanges messages on the host."""
    if "gloo" in str(dist.get_backend_config(group)):
        return group
    members = dist.get_process_group_ranks(group)
    return dist.new_group(members, backend="gloo", use_local_synchronization=True)


def local_rank() -> int | None:
    """The number of this process on its machine, if `torchrun` has started several; else None."""
    started = int(os.environ.get("WORLD_SIZE") or 1) > 1 and "MASTER_ADDR" in os.environ
    return int(os.environ.get("LOCAL_RANK") or 0) if started else None


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks of this run: those of a process group that is initialised; or else the processes
    that `torchrun` has started; or else this process alone."""
    local = local_rank()
    if local is None or not dist.is_available() or dist.is_initialized():
        yield Ranks(AUTO)
        return
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local < gpus:
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    try:
        yield Ranks(AUTO)
    finally:
        dist.destroy_process_group()
