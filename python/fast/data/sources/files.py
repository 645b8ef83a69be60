"""Read samples that are files: pictures and sounds stay files, texts are read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fast.data.labels import SEVERAL
from fast.data.sources.formats import readable_suffixes
from fast.data.sources.names import class_name, roles_of, training_and_held_out
from fast.data.sources.scan import Folder, natural, scan
from fast.data.sources.types import (
    EncodedAudio,
    EncodedFiles,
    EncodedImages,
    NamedData,
    Split,
    labelled,
)
from fast.errors import counted, printable, some

TEXT_SUFFIXES = frozenset((".txt", ".md"))
# Besides .wav these need the package soundfile.
AUDIO_SUFFIXES = frozenset((".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif"))
KINDS = {AUDIO_SUFFIXES: "sounds", TEXT_SUFFIXES: "texts"}
# A longer file is no sample.
LONGEST_TEXT = 10 << 20
# Characters of a text that a message shows.
SHOWN = 40
# How many samples of an archive a hash of samples takes.
HASHED = 64
# How UTF-16 begins, in either order of its bytes.
UTF_16 = (b"\xff\xfe", b"\xfe\xff")


def suffixes_in(root: Folder) -> frozenset[str] | None:
    """The suffixes of sounds or texts, whichever a folder without images holds; else None."""
    there = set(root.all_others())
    return next((kind for kind in KINDS if there & kind), None)


def samples_of(paths: Sequence[str]) -> Any:
    """The inputs of a split that has these files, all of one kind."""
    suffix = Path(paths[0]).suffix.lower()
    if suffix in AUDIO_SUFFIXES:
        return EncodedAudio(names=paths, open=list(paths).__getitem__)
    if suffix in TEXT_SUFFIXES:
        return [text_of(Path(path)) for path in paths]
    return EncodedImages(names=paths, open=list(paths).__getitem__)


def files_of(where: str, cells: Sequence[str], root: Path) -> Any:
    """The samples in the files that the cells of a table name; other cells are texts themselves.

    Raises:
        ValueError: the cells look like names of files, and some files are not there.
    """
    kinds = AUDIO_SUFFIXES | TEXT_SUFFIXES | readable_suffixes()
    if not all(Path(cell).suffix.lower() in kinds for cell in cells):
        return list(cells)
    paths = [root / cell for cell in cells]
    missing = [cell for cell, path in zip(cells, paths, strict=True) if not path.is_file()]
    if missing:
        raise ValueError(
            f"{where}: {counted(len(missing), 'file is', 'files are')} not there: "
            f"{some(missing, 5)}; paths are absolute, or from {printable(root)}"
        )
    return samples_of([str(path) for path in paths])


def check_one_label(name: str, splits: Mapping[str, Split], classes: Sequence[str]) -> None:
    """Raise ValueError where the rows of a table give a picture or sound different labels."""
    label_of: dict[str, int] = {}
    for split in splits.values():
        if not isinstance(split.inputs, EncodedFiles):
            return
        for file, label in zip(split.inputs.names, split.labels.tolist(), strict=True):
            if label_of.setdefault(file, label) != label:
                both = some([classes[label_of[file]], classes[label]])
                raise ValueError(f"{name}: {printable(file)} has several labels, {both}; {SEVERAL}")


def repeated_samples(data: NamedData, *, folds: bool = False) -> list[str]:
    """Notes on samples that are there more than once: texts, and files under whatever names.

    Args:
        folds: the training samples will be held out in turn.
    """
    splits = [*data.splits.values()]
    what, names, pairs = _repeats(splits)
    labels = [label for split in splits for label in split.labels.tolist()]
    trained = len(data.splits.get("train", ()))
    held_out = [(i, j) for i, j in pairs if j < trained <= i]
    strange = [(i, j) for i, j in pairs if labels[i] != labels[j]]
    notes = []
    if held_out:
        there = f"held-out {what} that are trained on, too: {_equal(names, held_out)}"
        notes.append(f"{there}; what is measured of them is not held out")
    if pairs and folds:
        one = what.removesuffix("s")
        there = f"{what} that repeat another: {_equal(names, pairs)}"
        notes.append(f"{there}; drop them, or a {one} may be both trained on and held out")
    if strange:
        notes.append(f"{what} that are in another class, too: {_equal(names, strange)}")
    return notes


def shared_samples(own: Split, others: Split, where: str) -> str:
    """A note on those of `others` that `own`, which is in `where`, has under whatever names; empty
    if there are none."""
    what, names, pairs = _repeats([own, others])
    shared = [(i, j) for i, j in pairs if j < len(own) <= i]
    return f"{what} that are in {printable(where)}, too: {_equal(names, shared)}" if shared else ""


def _repeats(splits: Sequence[Split]) -> tuple[str, list[str], list[tuple[int, int]]]:
    """What the samples are, the name of each, and pairs of places: a sample that is there before,
    and where it is first. Arrays are not compared."""
    groups: Sequence[Sequence[int]]
    if all(_are_files(split.inputs) for split in splits):
        what, names = "files", [name for split in splits for name in split.inputs.names]
        groups = _same_contents(names)
    elif all(isinstance(split.inputs, list) for split in splits):
        texts = [text.strip() for split in splits for text in split.inputs]
        what, names = "texts", [repr(_shortened(text)) for text in texts]
        groups = _grouped(range(len(texts)), texts, str)
    else:
        return "", [], []
    return what, names, [(i, group[0]) for group in groups for i in group[1:]]


def _equal(names: Sequence[str], pairs: Sequence[tuple[int, int]]) -> str:
    equal = [names[i] if names[i] == names[j] else f"{names[i]} is {names[j]}" for i, j in pairs]
    return f"{len(equal)} ({some(equal)})"


def samples_hash(data: NamedData) -> str:
    """A hash that tells whether two data sets have the same samples with the same classes.

    Of files it takes names and sizes, and not the folders that they lie in: data that were moved
    have the same hash. Of what is inside an archive it takes some samples.
    """
    digest = hashlib.blake2b(repr(data.classes).encode(), digest_size=16)
    for part in ("train", "val"):
        if part not in data.splits:
            digest.update(b"none")
            continue
        split = data.splits[part]
        digest.update(np.ascontiguousarray(split.labels).data)
        digest.update(_contents(split.inputs))
    return digest.hexdigest()


def _contents(inputs: Any) -> bytes:
    """What `samples_hash` takes of the inputs of a split."""
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(inputs, EncodedFiles):
        few = np.linspace(0, len(inputs) - 1, HASHED, dtype=int).tolist()
        for i in range(len(inputs)) if _are_files(inputs) else few:
            file = _opened(inputs, i)
            if isinstance(file, str):
                size = os.path.getsize(file) if os.path.exists(file) else None
                digest.update(f"{os.path.basename(file)!r} {size}".encode())
            elif file is not None:
                digest.update(file.read())
    elif isinstance(inputs, list):
        digest.update(repr(inputs).encode())
    else:
        for array in inputs.values() if isinstance(inputs, dict) else (inputs,):
            digest.update(f"{array.shape} {array.dtype}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


def _are_files(inputs: Any) -> bool:
    return isinstance(inputs, EncodedFiles) and isinstance(_opened(inputs, 0), str)


def _opened(inputs: EncodedFiles, i: int) -> Any:
    """The name of a file, or a stream; None for what cannot be read, as whoever decodes it says."""
    try:
        return inputs.open(i)
    except (ValueError, OSError):
        return None


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def _same_contents(files: Sequence[str]) -> Sequence[Sequence[int]]:
    """The places of files that have the same contents, a list for each such group.

    Few files are read as a whole: those whose sizes and first 4 KB are the same, too.
    """
    groups: list[Sequence[int]] = [range(len(files))]
    for key in (os.path.getsize, partial(_digest, most=4096), _digest):
        groups = [same for group in groups for same in _grouped(group, files, key)]
    return groups


def _grouped(
    group: Sequence[int], samples: Sequence[str], key: Callable[[str], object]
) -> list[list[int]]:
    """The parts of two or more in which `key` is the same. A file that cannot be read is in none,
    and neither is what is empty: whoever reads it says so."""
    by_key: dict[object, list[int]] = {}
    for i in group:
        with suppress(OSError):
            by_key.setdefault(key(samples[i]), []).append(i)
    by_key.pop(0, None)
    by_key.pop("", None)
    return [same for same in by_key.values() if len(same) > 1]


def _digest(file: str, most: int = -1) -> bytes:
    with open(file, "rb") as stream:
        return hashlib.blake2b(stream.read(most), digest_size=16).digest()


def lines_of(path: Path) -> list[str]:
    """The texts of a file that has one in each line."""
    return [line.strip() for line in text_of(path).splitlines() if line.strip()]


def text_of(path: Path) -> str:
    """The text in a file.

    Raises:
        ValueError: the file is too large, or neither UTF-8 nor UTF-16.
    """
    if path.stat().st_size > LONGEST_TEXT:
        raise ValueError(f"{printable(path)}: more than 10 MB: no text to classify")
    return decoded(path).strip()


def decoded(path: Path) -> str:
    """What is written in a file, in UTF-8 or UTF-16.

    Raises:
        ValueError: it is in neither.
    """
    data = path.read_bytes()
    try:
        return data.decode("utf-16" if data[:2] in UTF_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        name = printable(path)
        raise ValueError(
            f"{name}: is not UTF-8, but perhaps Windows-1252 or Latin-1: save it as UTF-8 (in "
            f"Excel: CSV UTF-8), or: iconv -f WINDOWS-1252 -t UTF-8 {name} > utf8{path.suffix}"
        ) from error


def read_lines(root: Path) -> NamedData | None:
    """A folder with a text file for each class and a sample in each line, or with such a folder for
    each split; None if it is neither."""
    top = scan(root, TEXT_SUFFIXES)
    parts = {"train": top}
    if not top.images:
        training, held_out = training_and_held_out(roles_of(top.folders))
        if not training:
            return None
        parts = {"train": top.folders[training[0]]}
        if held_out:
            parts["val"] = top.folders[held_out[0]]
    for part in parts.values():
        # Text files beside pictures say where objects are in these.
        if len(part.images) < 2 or part.folders or part.others.keys() & readable_suffixes():
            return None
    classes = sorted({class_name(path.stem) for path in parts["train"].images}, key=natural)
    splits: dict[str, Split] = {}
    for name, part in parts.items():
        texts: list[str] = []
        labels: list[int] = []
        for path in part.images:
            name_of = class_name(path.stem)
            if name_of not in classes:
                raise ValueError(f"{printable(path)}: has no counterpart among {some(classes)}")
            lines = lines_of(path)
            texts += lines
            labels += [classes.index(name_of)] * len(lines)
        splits[name] = labelled(texts, np.array(labels, np.int64), str(part.path), len(classes))
    return NamedData(
        name=str(root),
        splits=splits,
        classes=tuple(classes),
        held_out=f"folder {printable(parts['val'].path.name)}" if "val" in parts else "",
        sorted_names=True,
        notes=("each file is a class, and each line in it a sample",),
    )
