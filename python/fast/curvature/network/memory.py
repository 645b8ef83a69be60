"""How products get their memory on a CPU: freed memory is kept, and large results lie in large
pages."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MOST_FREE = 2**30  # bytes of freed memory that stay with the process, at most
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # what glibc allows
_MADV_HUGEPAGE, _LARGE_PAGE = 14, 2 * 2**20  # of mman.h


def _libc_function(name: str) -> Callable[..., Any] | None:
    """A function of Linux's C library, or None where there is no such function."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        function: Callable[..., Any] = getattr(ctypes.CDLL("libc.so.6"), name)
    except (OSError, AttributeError):
        return None  # musl has no mallopt, nor the habit that makes it necessary
    return function


@functools.cache
def keep_freed_memory() -> bool:
    """Raise glibc's trim threshold for the whole process; True where that is possible.

    Call it once at the start of a program that takes many products on a CPU. A product allocates
    and frees the same few sizes of tensor hundreds of times. By default glibc hands the memory back
    each time and gets it again page by page, zeroed: exact products of ResNet-20 then take 1.43
    times as long (two vectors, batch 128, one thread: 1.40 s and 260,000 page faults, against
    0.98 s). The price is up to 1 GiB of freed memory that stays with the process.

    Other allocators (jemalloc, tcmalloc, macOS, Windows) are left alone. Nothing else in this
    library calls it, except the command `fast curvature`.
    """
    mallopt = _libc_function("mallopt")
    if mallopt is None:
        return False
    # Setting one threshold freezes the other, which glibc otherwise raises to its maximum by
    # itself: both are set.
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)) and bool(
        mallopt(_M_TRIM_THRESHOLD, MOST_FREE)
    )


def empty_product(vectors: Tensor) -> Tensor:
    """An uninitialised, contiguous tensor for the products with `vectors`, shaped like them.

    glibc maps a tensor of 32 MiB or more anew every time, and the kernel zeroes a page of it at
    each first access. In pages of 2 MiB, which Linux gives where they are asked for, writing 128
    MiB for the first time took 27 to 35 ms; in pages of 4 KiB it took 52 to 155 ms, and in memory
    that was there already 15 ms.
    """
    out = torch.empty_like(vectors, memory_format=torch.contiguous_format)
    size = out.numel() * out.element_size()
    if out.device.type == "cpu" and size >= _LARGEST_MMAP_THRESHOLD:
        madvise = _libc_function("madvise")
        if madvise is not None:
            begin = -(-out.data_ptr() // _LARGE_PAGE) * _LARGE_PAGE
            length = (out.data_ptr() + size - begin) // _LARGE_PAGE * _LARGE_PAGE
            # This is advice alone: where the kernel does not take it, nothing changes.
            madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), _MADV_HUGEPAGE)
    return out
