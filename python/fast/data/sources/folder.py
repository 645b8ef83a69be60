"""Read a folder that has a folder of images for each class, in the layouts of published data sets.

Contents decide what a folder is, not names alone: a split holds folders of images, a class holds
images. A folder that could be either is an error.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fast.data.labels import count_classes
from fast.data.sources.files import KINDS, samples_of, suffixes_in
from fast.data.sources.names import class_name, roles_of, training_and_held_out
from fast.data.sources.scan import Folder, left_out, natural, scan
from fast.data.sources.types import NamedData, Split
from fast.errors import printable, some


@dataclass(kw_only=True)
class Layout:
    """Folders of class folders, by split (`train`, `val`), and notes on what is not used."""

    parts: dict[str, Folder]
    notes: list[str] = field(default_factory=list)


def read_folder(root: Path, numeric_labels: bool, unlabelled: bool = False) -> NamedData:
    """A folder of class folders, or of splits that hold some.

    Args:
        numeric_labels, unlabelled: see `load_data`.
    """
    whole = scan(root)
    suffixes = None if whole.has_images else suffixes_in(whole)
    if suffixes is not None:
        whole = scan(root, suffixes, KINDS[suffixes])
    if unlabelled and whole.has_images and not _in_classes(whole):
        paths = [str(path) for path in whole.all_images()]
        return NamedData.unlabelled(str(root), samples_of(paths))
    layout = _layout(whole)
    parts = layout.parts
    files = {part: _class_files(folder) for part, folder in parts.items()}
    number, classes = _numbers(root, files, numeric_labels)
    splits: dict[str, Split] = {}
    for part, entries in files.items():
        extra = sorted(set(entries) - set(number), key=natural)
        if extra:
            raise ValueError(
                f"{printable(parts[part].path)}: class folder {printable(extra[0])!r} has no "
                f"counterpart in {printable(parts['train'].path)}"
            )
        paths = [str(path) for name in entries for path in entries[name]]
        labels = np.repeat([number[name] for name in entries], list(map(len, entries.values())))
        splits[part] = Split(inputs=samples_of(paths), labels=labels.astype(np.int64))
    held_out = parts["val"].path.relative_to(root) if "train" in parts and "val" in parts else ""
    return NamedData(
        name=str(root),
        splits=splits,
        classes=classes,
        held_out=f"folder {printable(held_out)}" if held_out else "",
        sorted_names=True,
        notes=(*layout.notes, *_left_out(parts, "images" if suffixes is None else "samples")),
    )


def _numbers(
    root: Path, files: dict[str, dict[str, list[Path]]], numeric_labels: bool
) -> tuple[dict[str, int], tuple[str, ...]]:
    """The label of each class folder, and the names of all classes.

    Args:
        files: the files of each class, by split.
        numeric_labels: see `load_data`.
    """
    names = sorted(files.get("train", files.get("val", {})), key=natural)
    if not (numeric_labels and all(name.isdecimal() for name in names)):
        return {name: i for i, name in enumerate(names)}, tuple(names)
    number = {name: int(name) for name in names}
    if len(set(number.values())) < len(names):
        raise ValueError(f"{root}: two class folders have the same number: {some(names, 20)}")
    samples = sum(len(paths) for entries in files.values() for paths in entries.values())
    count = count_classes(max(number.values()), samples, str(root))
    return number, tuple(str(i) for i in range(count))


def _left_out(parts: dict[str, Folder], samples: str) -> list[str]:
    """Notes on what the class folders hold besides the files of their classes.

    Args:
        samples: what those files are called.
    """
    notes = []
    others = sum((folder.all_others() for folder in parts.values()), Counter())
    if others:
        notes.append(f"files that are not read as {samples} are left out: {left_out(others)}")
    for part, folder in parts.items():
        if any(_holds_classes(f) for f in folder.folders.values()):
            notes.append(
                f"{part}: class folders hold folders, whose {folder.kind} are taken together"
            )
        if folder.images:
            notes.append(
                f"{folder.kind} beside the class folders that are left out: {len(folder.images)}"
            )
    return notes


def has_classes(path: Path) -> bool:
    """Whether a folder has class folders, and not just one of samples, or one for each split."""
    return _in_classes(scan(path))


def _in_classes(root: Folder) -> bool:
    flat = [name for name, folder in root.with_images.items() if not _holds_classes(folder)]
    roles = roles_of(root.with_images)
    return len(flat) < len(root.with_images) or len([n for n in flat if n not in roles]) > 1


def _layout(root: Folder) -> Layout:
    """Tell splits from classes; raises ValueError where the folders could be either."""
    roles = roles_of(root.with_images)
    splits = {name for name in roles if _holds_classes(root.folders[name])}
    if splits:
        return _splits(root, roles, splits)
    if roles and len(roles) == len(root.with_images):
        raise ValueError(
            f"{_at(root)}: {some(list(roles))} has {root.kind} but no class folders; put each "
            "class in a folder of its own, or rename what is a class"
        )
    inner = _wrapped(root)
    return _layout(inner) if inner is not None else Layout(parts={"train": root})


def _splits(root: Folder, roles: dict[str, str], splits: set[str]) -> Layout:
    """The layout of a folder of splits.

    Args:
        roles: the folders with a split's name, and what that says.
        splits: those of them that hold class folders.
    """
    inside = {name: _unwrapped(root.folders[name]) for name in root.with_images}
    beside = [name for name in inside if name not in roles]
    shared = any(_alike(inside[a], inside[b]) for a in splits for b in inside if a != b)
    if beside and not shared and len(roles) == 1:
        raise ValueError(
            f"{_at(root)}: cannot tell whether {some(sorted(splits))} is a split or a class beside "
            f"{some(beside)}: rename it, or put the classes into train/"
        )
    trains, held_out = training_and_held_out(
        {name: roles[name] for name in roles if name in splits}
    )
    if len(trains) > 1:
        raise ValueError(
            f"{_at(root)}: {some(trains)} are all names of a training split; leave one of them"
        )
    used = {"train": trains[:1], "val": held_out[:1]}
    used_names = {part: names[0] for part, names in used.items() if names}
    if not used_names:
        raise ValueError(f"{_at(root)}: {some(sorted(splits))} is no training or validation split")
    notes = []
    for name, folder in root.folders.items():
        if name not in used_names.values():
            loose = ", not in class folders" if name in roles and name not in splits else ""
            count = len(folder.all_images())
            notes.append(f"folder {printable(name)} is not used ({count} {root.kind}{loose})")
    if root.images:
        notes.append(f"{root.kind} beside the folders that are not used: {len(root.images)}")
    return Layout(parts={part: inside[name] for part, name in used_names.items()}, notes=notes)


def _check_classes(root: Folder) -> None:
    """Raise ValueError where the folders in `root` are no classes, or may be splits."""
    if not root.folders:
        others = f" (it has {left_out(root.others)})" if root.others else ""
        raise ValueError(
            f"{_at(root)}: has {root.kind} but no class folders; put each class in a folder of its "
            "own"
            if root.images
            else f"{_at(root)}: is empty; expected a folder of {root.kind} for each class{others}"
        )
    nested = [name for name, folder in root.with_images.items() if _holds_classes(folder)]
    inside = {name: _unwrapped(root.folders[name]) for name in nested}
    for i, a in enumerate(nested):
        for b in nested[:i]:
            if _alike(inside[a], inside[b]):
                both = sorted(set(inside[a].with_images) & set(inside[b].with_images), key=natural)
                raise ValueError(
                    f"{_at(root)}: {printable(b)} and {printable(a)} both hold folders "
                    f"{some(both)}: are they splits, or classes? Name splits train and val; move "
                    f"the {root.kind} of a class into one folder; or name one of the two as the "
                    "data"
                )
        copied = sorted(set(inside[a].with_images) & set(root.with_images), key=natural)
        if copied:
            raise ValueError(
                f"{_at(root)}: {printable(a)} holds {some(copied)} once more; remove the copy, or "
                f"name {_at(root.folders[a])} as the data"
            )


def _class_files(root: Folder) -> dict[str, list[Path]]:
    """The images of each class, by its name."""
    _check_classes(root)
    for folder in root.folders.values():
        if not folder.has_images:
            others = left_out(folder.all_others())
            raise ValueError(
                f"{_at(folder)}: class folder without {root.kind}"
                + (f": it has {others}" if others else "")
                + "; fill it, or remove it; or name the one folder that holds the classes"
            )
    files: dict[str, list[Path]] = {}
    for name, folder in root.folders.items():
        files.setdefault(class_name(name), []).extend(folder.all_images())
    return files


def _holds_classes(folder: Folder) -> bool:
    """Whether a folder holds no images itself, but folders of images."""
    return not folder.images and bool(folder.with_images)


def _wrapped(root: Folder) -> Folder | None:
    """The one folder in `root` that holds everything; None where there is none."""
    if root.images or len(root.folders) != 1:
        return None
    (inner,) = root.folders.values()
    return inner if _holds_classes(inner) else None


def _unwrapped(folder: Folder) -> Folder:
    while (inner := _wrapped(folder)) is not None:
        folder = inner
    return folder


def _alike(a: Folder, b: Folder) -> bool:
    """Whether two folders hold folders of the same names, as splits of one data set do."""
    both = len(set(a.with_images) & set(b.with_images))
    return both > 0 and 2 * both >= min(len(a.with_images), len(b.with_images))


def _at(folder: Folder) -> str:
    return printable(folder.path)
