"""Compute in worker processes, in order: they read and decode samples while the network trains."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

Key = TypeVar("Key")
Value = TypeVar("Value")
# More processes would read faster than most GPUs train, and each takes memory.
MOST = 8
# So few samples are read before the processes have even started.
FEW = 256


def workers_for(samples: int) -> int:
    """The default number of processes that read image files: one per core, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, MOST) if samples >= FEW else 0


def in_workers(
    function: Callable[[Key], Value], keys: Iterable[Key], workers: int, *, pinned: bool = False
) -> Iterator[Value]:
    """`function` of each key, in order, computed ahead by worker processes, or here without any.

    Processes are forked, so that they see the data without a copy; where that is not possible
    (Windows), everything is computed here. Their random generators do not affect this process's.

    Args:
        function: returns tensors, or tuples, lists and mappings of them.
        keys: may be endless.
        workers: number of processes.
        pinned: return tensors in page-locked memory, so that copies to a GPU do not wait.

    Raises:
        Exception: what `function` raises is raised here.
    """
    if not workers or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(function, keys)
        return
    loader: DataLoader[Any] = DataLoader(
        _Function(function),
        batch_size=None,
        sampler=keys,
        num_workers=workers,
        collate_fn=_same,
        pin_memory=pinned,
        generator=torch.Generator().manual_seed(0),
        multiprocessing_context="fork",
    )
    for value in loader:
        if isinstance(value, _Raised):
            raise value.error
        yield value


class _Raised:
    """An exception on its way from a worker: DataLoader would reduce it to a text."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class _Function(Dataset[Any]):
    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.function(key)
        except Exception as error:  # noqa: BLE001 (raised where the value is read)
            return _Raised(error)


def _same(value: Any) -> Any:
    return value
