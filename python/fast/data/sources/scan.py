"""Scan a folder: which files are images, and which are litter or left out."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from fast.data.sources.formats import CAMERA_FORMATS, readable_suffixes
from fast.errors import printable

# macOS, Windows, Synology and Python leave these behind, at any depth.
_LITTER = frozenset((
    "thumbs.db", "desktop.ini", "@eadir", "#recycle", "$recycle.bin", "lost+found",
    "system volume information", "__macosx", "__pycache__",
))  # fmt: skip
DEEPEST = 30
_PLURALS = {"pipe or device": "pipes or devices", "file without a suffix": "files without a suffix"}


def is_litter(name: str) -> bool:
    """Whether a file or folder is hidden (`.DS_Store`, `._0.png`), or `__MACOSX`, `@eaDir`, ..."""
    return name.startswith(".") or name.lower() in _LITTER


@dataclass(kw_only=True)
class Folder:
    """A folder with what is in it, without litter.

    Attributes:
        folders: the folders directly in it, by name, in natural order.
        kind: what is looked for, for messages: "images", "sounds" or "texts".
        images: those files directly in it, in order.
        others: how many other files are directly in it, by suffix or by kind (`"broken link"`).
    """

    path: Path
    kind: str = "images"
    folders: dict[str, Folder] = field(default_factory=dict)
    images: list[Path] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)

    def all_images(self) -> list[Path]:
        """Its images and those of all folders in it."""
        return self.images + [p for f in self.folders.values() for p in f.all_images()]

    def all_others(self) -> Counter[str]:
        return sum((f.all_others() for f in self.folders.values()), Counter(self.others))

    @property
    def has_images(self) -> bool:
        return bool(self.images) or any(f.has_images for f in self.folders.values())

    @property
    def with_images(self) -> dict[str, Folder]:
        """The folders directly in it that have images at some depth."""
        return {name: folder for name, folder in self.folders.items() if folder.has_images}


def scan(root: Path, suffixes: frozenset[str] | None = None, kind: str = "images") -> Folder:
    """Read the names in a folder; no file is opened.

    Args:
        suffixes: which files to look for (default: images).
        kind: what these files are, for messages.
    """
    return _scan(root, readable_suffixes() if suffixes is None else suffixes, kind, ())


def left_out(others: Counter[str]) -> str:
    """`"3 .heic (Pillow does not read them here; convert them to JPEG), 2 broken links"`."""
    hint = " (Pillow does not read them here; convert them to JPEG)"
    return ", ".join(
        f"{count} {printable(_plural(kind, count))}{hint if kind in CAMERA_FORMATS else ''}"
        for kind, count in others.most_common()
    )


def _plural(kind: str, count: int) -> str:
    """`pipes or devices`, `broken links`; a suffix stays as it is."""
    if count == 1 or kind.startswith("."):
        return kind
    return _PLURALS.get(kind, f"{kind}s")


def natural(name: str) -> tuple[int, int, str]:
    """A sort key that puts 2 before 10, so that folders named by numbers are in their order."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def _scan(path: Path, suffixes: frozenset[str], kind: str, above: tuple[Path, ...]) -> Folder:
    """Scan one folder; `above` are the folders that it lies in, with links resolved."""
    if len(above) > DEEPEST:
        raise ValueError(f"{printable(path)}: folders are nested more than {DEEPEST} deep")
    folder = Folder(path=path, kind=kind)
    above = (*above, path.resolve())
    with os.scandir(path) as entries:
        visible = sorted((e for e in entries if not is_litter(e.name)), key=lambda e: e.name)
    for entry in sorted(visible, key=lambda e: natural(e.name)):
        # A link may lead to a folder that it lies in.
        if entry.is_dir() and Path(entry.path).resolve() not in above:
            folder.folders[entry.name] = _scan(Path(entry.path), suffixes, kind, above)
    for entry in visible:
        if entry.is_dir():
            continue
        suffix = Path(entry.name).suffix.lower()
        # Reading a pipe or a device might never end.
        if not entry.is_file():
            folder.others["broken link" if entry.is_symlink() else "pipe or device"] += 1
        elif suffix in suffixes:
            folder.images.append(Path(entry.path))
        else:
            folder.others[suffix or "file without a suffix"] += 1
    return folder
