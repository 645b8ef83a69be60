"""The memory floor of an update: its streams are read and rewritten, and nothing is computed."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).parent / "native" / "streams.cpp"
CHUNK = 8192  # csrc's kChunk


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


@functools.cache
def _library() -> ctypes.CDLL:
    """The compiled walk."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "streams.so"
        flags = ["-std=c++17", "-O3", "-fopenmp", "-fPIC", "-shared"]
        subprocess.run([str(compiler()), *flags, str(SOURCE), "-o", str(target)], check=True)
        return ctypes.CDLL(str(target))  # stays loaded when the file is gone


class StreamWalk:
    """The streams of a list of tensors, walked as an update would.

    Args:
        streams: lists of tensors that run parallel, one per stream, and whether each is written.
    """

    def __init__(self, streams: Sequence[tuple[Sequence[Tensor], bool]]) -> None:
        rows: list[tuple[int, ...]] = []
        chunks: list[tuple[int, ...]] = []
        for tensors in zip(*(tensors for tensors, _ in streams), strict=True):
            first, count = len(rows), tensors[0].numel()
            for t, (_, written) in zip(tensors, streams, strict=True):
                rows.append((t.data_ptr(), t.element_size(), int(written)))
            for begin in range(0, count, CHUNK):
                chunks.append((first, len(streams), begin, min(CHUNK, count - begin)))
        self._rows = torch.tensor(rows, dtype=torch.int64)
        self._chunks = torch.tensor(chunks, dtype=torch.int64)
        self._walk = _library().walk_streams
        self._walk.restype = ctypes.c_uint64

    def run(self, threads: int) -> int:
        """Walk once; a digest of what was read."""
        rows, chunks = (ctypes.c_void_p(t.data_ptr()) for t in (self._rows, self._chunks))
        digest: int = self._walk(rows, chunks, ctypes.c_int64(len(self._chunks)), threads)
        return digest
