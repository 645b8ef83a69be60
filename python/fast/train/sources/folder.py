"""A folder with a folder of images for each class."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fast.train.labels import count_classes
from fast.train.sources.types import VAL_NAMES, EncodedImages, NamedData, Split

IMAGE_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)


def read_folder(root: Path, numeric_labels: bool) -> NamedData:
    folders = _subfolders(root)
    parts: dict[str, Path | None] = {"train": None, "val": None}
    if "train" in folders or any(name in folders for name in VAL_NAMES):
        parts["train"] = folders.get("train")
        parts["val"] = next((folders[name] for name in VAL_NAMES if name in folders), None)
    else:
        parts["train"] = root

    files: dict[str, list[tuple[str, Path]]] = {}
    for part, folder in parts.items():
        if folder is not None:
            files[part] = _class_files(folder)
    names = sorted({name for name, _ in files.get("train", files.get("val", []))}, key=_natural)
    if numeric_labels and all(name.isdigit() for name in names):
        number = {name: int(name) for name in names}
        samples = sum(map(len, files.values()))
        count = count_classes(max(number.values()), samples, str(root))
        classes = tuple(str(i) for i in range(count))
    else:
        number = {name: i for i, name in enumerate(names)}
        classes = tuple(names)

    splits: dict[str, Split] = {}
    for part, entries in files.items():
        extra = sorted({name for name, _ in entries} - set(number))
        if extra:
            raise ValueError(
                f"{parts[part]}: class folder {extra[0]!r} has no counterpart in {parts['train']}"
            )
        paths = [str(path) for _, path in entries]
        labels = np.array([number[name] for name, _ in entries], dtype=np.int64)
        splits[part] = Split(EncodedImages(paths, paths.__getitem__), labels)
    return NamedData(str(root), splits.get("train"), splits.get("val"), classes)


def _subfolders(root: Path) -> dict[str, Path]:
    found = [p for p in root.iterdir() if p.is_dir() and not p.name.startswith((".", "__"))]
    return {p.name: p for p in sorted(found, key=lambda p: _natural(p.name))}


def _class_files(root: Path) -> list[tuple[str, Path]]:
    folders = _subfolders(root)
    if not folders:
        loose = any(p.suffix.lower() in IMAGE_SUFFIXES for p in root.iterdir())
        raise ValueError(
            f"{root}: has images but no class folders; put each class in a folder of its own"
            if loose
            else f"{root}: is empty; expected a folder of images for each class"
        )
    entries = []
    for name, folder in folders.items():
        paths = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES]
        if not paths:
            raise ValueError(
                f"{folder}: class folder without images "
                f"(looked for {', '.join(sorted(IMAGE_SUFFIXES))})"
            )
        entries += [(name, p) for p in paths]
    return entries


def _natural(name: str) -> tuple[int, int, str]:
    """Sorts 2 before 10; the order of class numbers when folders are named by them."""
    return (0, int(name), "") if name.isdigit() else (1, 0, name)
