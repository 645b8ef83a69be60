"""Read the arrays of an `.npz` of unknown origin one by one, after a check of their sizes."""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from fast.errors import first_line, printable

# Deflate makes zeros 230 to 1,000 times smaller, text 10 times. Small arrays may be all zeros.
MOST_COMPRESSED, HARMLESS = 100, 64 << 20
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class Archive:
    """The arrays in a file, by name, while it is open.

    Raises:
        ValueError: by any method: the file is damaged or no `.npz`, or an array holds objects, is
            much larger than the file explains, or is larger than the memory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read: set[str] = set()
        if not path.is_file():
            raise ValueError(f"{path}: is not a file")
        try:
            self._zip = zipfile.ZipFile(path)
        except Exception as err:  # zipfile raises errors of many kinds on damaged files
            raise self._refusal(err) from err
        members = [n for n in self._zip.namelist() if n.endswith(".npy")]
        self.names = [name.removesuffix(".npy") for name in members]
        if len(set(members)) < len(members):
            raise ValueError(f"{path}: has two arrays of one name")

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *error: object) -> None:
        self._zip.close()

    def read(self, name: str) -> np.ndarray:
        info = self._zip.getinfo(f"{name}.npy")
        self._read.add(name)
        try:
            with self._zip.open(info) as file:
                self._check(name, info, file)
            with self._zip.open(info) as file:
                return np.lib.format.read_array(file, allow_pickle=False)
        except _Refused:
            raise
        except Exception as err:
            raise self._refusal(err) from err

    def unused(self) -> list[str]:
        """Names of the arrays that were not read."""
        return [name for name in self.names if name not in self._read]

    def _check(self, name: str, info: zipfile.ZipInfo, file: Any) -> None:
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            raise ValueError(f"{name} has a format of version {version}")
        shape, _, dtype = _HEADERS[version](file)
        if dtype.hasobject:
            raise ValueError(f"{name} holds Python objects")
        size = math.prod(shape) * dtype.itemsize
        where = f"{self.path}: {printable(name)}"
        if min(shape, default=0) < 0 or size != info.file_size - file.tell():
            raise _Refused(
                f"{where}: not a readable .npz of plain arrays (its header says {dtype} of shape "
                f"{shape}, and it has {info.file_size} bytes)"
            )
        if size > HARMLESS and size > MOST_COMPRESSED * info.compress_size:
            raise _Refused(
                f"{where}: {size / 1e9:.1f} GB in a file of {info.compress_size / 1e6:.1f} MB: it "
                "holds next to nothing; if that is intended, store it with np.savez"
            )
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if size > memory:
            raise _Refused(
                f"{where}: {size / 1e9:.1f} GB, and this machine has {memory / 1e9:.1f} GB of "
                "memory; give images as files in folders"
            )

    def _refusal(self, err: Exception) -> ValueError:
        with self.path.open("rb") as file:
            is_single = file.read(6) == np.lib.format.MAGIC_PREFIX
        if is_single:
            return ValueError(
                f"{self.path}: is a single array (.npy) by another name; store inputs and labels "
                "together: np.savez(file, x=..., y=...)"
            )
        reason = printable(first_line(err))
        return ValueError(f"{self.path}: not a readable .npz of plain arrays ({reason})")


class _Refused(ValueError):
    """An error whose message says all."""
