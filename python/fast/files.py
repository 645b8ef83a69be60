"""Write files and folders whole or not at all; read JSON and tensors, and detect damage."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fast.errors import printable

# In the folder of a run: what the command line was asked for. It is read before torch is imported.
JOB_FILE = "job.json"
UNFINISHED = ".unfinished"
# Our JSON files are never this long; a stranger's file may be.
MOST_JSON_BYTES = 16 << 20
CHECKSUM = "checksum"
# Raised by code that reads values which are missing or have unexpected types.
_DAMAGE = (
    ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, MemoryError,
)  # fmt: skip


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path; renamed to `path` when the block ends without an error.

    A link stays one, and its target is replaced. A device or pipe is written to as it is.
    """
    if path.exists() and not path.is_file():
        with writing(path):
            yield path
        return
    path = path.resolve() if path.is_symlink() else path
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
def writing(path: Path) -> Iterator[None]:
    """Name the file in errors that do not, as that of a full disk in the middle of a file."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.with_name(f".{path.name[:100]}-{secrets.token_hex(4)}{UNFINISHED}")
    folder.mkdir()
    try:
        with writing(path):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def clear_unfinished(folder: Path) -> None:
    """Remove what processes have left in `folder` that were killed while they wrote."""
    for path in folder.glob(f".*{UNFINISHED}"):
        shutil.rmtree(path, ignore_errors=True)


def _settle(file: Path, folder: Path) -> None:
    """Flush a file to the disk, with the permissions of its folder (safetensors sets its own)."""
    file.chmod(folder.stat().st_mode & 0o666)
    with file.open("rb") as f:
        os.fsync(f.fileno())


def missing_folders(path: Path) -> list[Path]:
    """The folders that have to be made for `path`, itself included; the innermost first."""
    return [folder for folder in (path, *path.parents) if not folder.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders, the innermost first, up to one that holds something."""
    for folder in folders:
        if folder.is_dir():
            try:
                folder.rmdir()
            except OSError:  # somebody else has put files there
                return


def check_writable(folder: Path, option: str) -> None:
    """Check, before any work is done, that a folder can be written to; nothing stays there.

    Args:
        option: the option that named the folder, for the message.

    Raises:
        ValueError: the path is a file, or cannot be written to; or its name is not UTF-8, which
            safetensors does not write to.
    """
    name = str(folder)
    if not name.isascii() and name.encode("utf-8", "ignore").decode() != name:
        raise ValueError(
            f"{option} {printable(name)}: its name is not UTF-8: name another folder, or set a "
            "locale of UTF-8 (LANG=C.UTF-8)"
        )
    new: list[Path] = []
    try:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{option} {folder}: is a file; name a folder")
        new = missing_folders(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"a disk that is full takes a name and no content")
    except OSError as error:
        raise ValueError(f"{option} {folder}: cannot be written to ({error.strerror})") from error
    finally:
        remove_empty(new)


def check_writable_file(path: Path, option: str) -> None:
    """Check, before any work is done, that a file can be written; a device or pipe is as it is.

    Raises:
        ValueError: the path is a folder, or is in one that cannot be written to.
    """
    if path.is_dir():
        raise ValueError(f"{option} {printable(path)}: is a folder; name a file")
    if path.is_file() or not path.exists():
        check_writable(path.absolute().parent, option)


def write_json(path: Path, value: Any) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(to_json(value, indent=2) + "\n")


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: NaN and infinities become null, paths and devices text."""
    return json.dumps(_finite(value), indent=indent, default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Name the file in errors about values that are missing or have unexpected types.

    Raises:
        ValueError: in place of these errors.
    """
    try:
        yield
    except _DAMAGE as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"{path} is damaged or was changed ({reason})") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no JSON object; the message names the file.
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


def read_json_if_there(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file."""
    return read_json(path) if path.is_file() else {}


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Write JSON with its own checksum, which `read_sealed` compares."""
    with path.open("x") as file:
        json.dump({**value, CHECKSUM: _checksum(value)}, file)


def read_sealed(path: Path, format: int) -> dict[str, Any]:
    """What `write_sealed` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has changed since, or has another `format`; the message names the file.
    """
    value = read_json(path)
    written = value.get("format")
    if written != format:
        raise ValueError(f"{path} is of format {written!r}; this version of fast reads {format}")
    if value.pop(CHECKSUM, None) != _checksum(value):
        raise ValueError(f"{path} is damaged or was changed: its checksum is another")
    return value


def _checksum(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def file_hash(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
