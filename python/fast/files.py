"""Write a file or a folder so that it is there whole or not at all, and tell what is read from what
was written."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

UNFINISHED = ".unfinished"
# What is read as JSON is never that long; a stranger's file may be.
MOST_JSON_BYTES = 16 << 20
CHECKSUM = "checksum"
# What comes of values that are not there, or of other types than were written.
_DAMAGE = (
    ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, MemoryError,
)  # fmt: skip


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path; renamed to `path` when the block ends without an error."""
    with _scratch(path) as folder:
        temporary = folder / path.name
        yield temporary
        _settle(temporary, folder)
        temporary.replace(path)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` (which must not exist); renamed to it at the end."""
    with _scratch(path) as folder:
        yield folder
        for file in folder.iterdir():
            _settle(file, folder)
        folder.rename(path)


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.with_name(f".{path.name[:100]}-{secrets.token_hex(4)}{UNFINISHED}")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def clear_unfinished(folder: Path) -> None:
    """Remove what a process that was killed in the middle of a write has left in `folder`."""
    for path in folder.glob(f".*{UNFINISHED}"):
        shutil.rmtree(path, ignore_errors=True)


def _settle(file: Path, folder: Path) -> None:
    """On the disk, and readable by whom the user's umask lets read (safetensors has its own)."""
    file.chmod(folder.stat().st_mode & 0o666)
    with file.open("rb") as f:
        os.fsync(f.fileno())


def check_writable(folder: Path, option: str) -> None:
    """Now, and not after the work of an hour; leaves nothing there.

    Args:
        option: that named the folder, for the message.

    Raises:
        ValueError: it is a file, or cannot be written to.
    """
    made: list[Path] = []
    try:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{option} {folder}: is a file; name a folder")
        made = [p for p in (folder, *folder.parents) if not p.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{option} {folder}: cannot be written to ({error.strerror})") from error
    finally:
        for part in made:
            if part.is_dir():
                part.rmdir()


def write_json(path: Path, value: Any) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(to_json(value, indent=2) + "\n")


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that any reader takes: NaN and infinities, which it does not have, are null.

    What JSON does not know either (paths, devices) is written as text.
    """
    return json.dumps(_finite(value), indent=indent, default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Name the file in what is raised by values that it does not have, or has otherwise.

    Raises:
        ValueError: in place of all of these.
    """
    try:
        yield
    except _DAMAGE as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"{path} is damaged or was changed ({reason})") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds anything else; the message names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with reading(path):
        if path.stat().st_size > MOST_JSON_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes are too many")
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise TypeError(f"it holds a {type(value).__name__}")
        return value


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """JSON with a checksum of itself, which `read_sealed` compares."""
    with path.open("x") as file:
        json.dump({**value, CHECKSUM: _checksum(value)}, file)


def read_sealed(path: Path, format: int) -> dict[str, Any]:
    """What `write_sealed` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it has changed since, or is not of this `format`; the message names the file.
    """
    value = read_json(path)
    found = value.get("format")
    if found != format:
        raise ValueError(f"{path} is of format {found!r}; this version of fast reads {format}")
    if value.pop(CHECKSUM, None) != _checksum(value):
        raise ValueError(f"{path} is damaged or was changed: its checksum is another")
    return value


def _checksum(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def file_hash(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Save tensors of any layout; tied ones are stored once for each name.

    Raises:
        OSError: the file cannot be written, as on a full disk.
    """
    plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    try:
        save_file(plain, path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written ({error})") from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Raises ValueError, with the file's name, where the file is truncated or no safetensors."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error})") from error
