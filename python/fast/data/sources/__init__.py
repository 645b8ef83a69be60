"""Read labelled data by name: folders of classes, tables, an .npz, a Hugging Face data set.

The samples come back raw: uint8 images, files, strings, float features. The network decides how
they are prepared; `fast.data.images` and `fast.data.audio` do it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fast.data.sources.files import TEXT_SUFFIXES, lines_of, read_lines
from fast.data.sources.folder import has_classes, read_folder
from fast.data.sources.hub import read_hugging_face
from fast.data.sources.npz import read_npz
from fast.data.sources.table import SUFFIXES, from_columns, read_table, read_tables, split_tables
from fast.data.sources.types import (
    EncodedAudio,
    EncodedImages,
    FileReport,
    NamedData,
    Split,
    fold_rows,
    stratified_split,
)
from fast.errors import printable, some, warn

__all__ = [
    "DataWarning",
    "EncodedAudio",
    "EncodedImages",
    "FileReport",
    "NamedData",
    "Split",
    "fold_rows",
    "has_columns",
    "load_data",
    "stratified_split",
]


class DataWarning(UserWarning):
    """Something in the data is not used."""


_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(:.+)?")


def has_columns(name: str) -> bool:
    """Whether this names a table: a file, a folder with some, or a Hugging Face data set."""
    path = Path(name).expanduser()
    if path.is_dir():
        return is_saved_table(path) or bool(split_tables(path))
    suffix = path.suffix.lower()
    return suffix in SUFFIXES or (suffix != ".npz" and not path.exists())


def is_saved_table(path: Path) -> bool:
    """Whether `save_to_disk` of the `datasets` library wrote this folder."""
    return any((path / f"dataset_{part}.json").exists() for part in ("dict", "info"))


def load_data(
    name: Any,
    *,
    input_column: str | None = None,
    label_column: str | None = None,
    numeric_labels: bool = False,
    unlabelled: bool = False,
) -> NamedData:
    """Read the data set called `name`.

    A folder: `CLASS/*.jpg` (or `*.wav`, `*.txt`), or `train/CLASS/*.jpg` with `val/` or `test/`,
    under these names or others that data sets are published with (`Training/`, `dev/`,
    `seg_test/`); one folder may hold all of it. Hidden files and those that systems leave behind
    are ignored.

    An `.npz`: `x_train`, `y_train` with `x_val`, `y_val` (or `_test`), or `x`, `y`; `classes` may
    hold the names of the classes. `x` is uint8 images, or what the network takes as it is; several
    inputs are `x_train.input_ids`, ...; encoded images are bytes `jpeg_train`, cut at
    `offset_train` `[N + 1]`.

    A table, `.csv`, `.tsv` or `.parquet`, or a pandas data frame: a column of files (from the
    table's folder), texts or numbers, one of labels, and perhaps one that says `train` or `val`.
    A folder may have one for each split: `train.csv`, `test.csv`. A folder of text files without
    folders has a class in each file, and a sample in each line.

    Anything else is a Hugging Face data set: a folder written by `save_to_disk`, or `OWNER/NAME` or
    `hf:NAME`, with `:CONFIG` where it has several.

    Args:
        input_column, label_column: columns of a table or a Hugging Face data set (default: by
            their types and usual names).
        numeric_labels: class folders that are named by integers have these as their labels, so that
            a folder may hold some of the classes of a source task.
        unlabelled: there may be no labels: a folder of samples without class folders, an `.npz`
            without `y`, a table without a column of labels, a text file with a sample in each
            line.

    Returns:
        what was read. Each of its `notes` on what was left out is also a `DataWarning`.

    Raises:
        FileNotFoundError: there is no such file, and no such data set.
        ValueError: the data cannot be used; the message names the file and what is wrong.
    """
    if hasattr(name, "to_dict"):
        columns = {"train": name.to_dict("list")}
        data = from_columns("the data frame", columns, Path(), input_column, label_column)
    else:
        data = _read(name, input_column, label_column, numeric_labels, unlabelled)
    notes = data.notes + _alike_names(data.classes) + _blank_texts(data)
    data = replace(data, notes=notes)
    for note in data.notes:
        warn(f"{data.name}: {note}", DataWarning)
    return data


def _alike_names(classes: Sequence[str]) -> tuple[str, ...]:
    """A note on names of classes that differ in capitals or spaces alone."""
    spelt: dict[str, list[str]] = {}
    for name in classes:
        spelt.setdefault("".join(name.split()).casefold(), []).append(name)
    alike = [" and ".join(map(printable, names)) for names in spelt.values() if len(names) > 1]
    return (f"classes of nearly the same name, each for itself: {some(alike)}",) if alike else ()


def _blank_texts(data: NamedData) -> tuple[str, ...]:
    """A note on texts that are empty."""
    inputs = [split.inputs for split in data.splits.values()]
    texts = [text for x in inputs if isinstance(x, list) for text in x]
    empty = sum(not text.strip() for text in texts)
    return (f"texts that are empty: {empty} of {len(texts)}",) if empty else ()


def _read(
    name: str,
    input_column: str | None,
    label_column: str | None,
    numeric_labels: bool,
    unlabelled: bool,
) -> NamedData:
    path = Path(name).expanduser()
    if path.is_dir():
        if is_saved_table(path):
            return read_hugging_face(name, input_column, label_column)
        tables = split_tables(path)
        if tables and not has_classes(path):
            return read_tables(path, tables, input_column, label_column)
        return read_lines(path) or read_folder(path, numeric_labels, unlabelled)
    if path.suffix.lower() == ".npz":
        return read_npz(path, unlabelled)
    if path.suffix.lower() in SUFFIXES and path.exists():
        return read_table(path, input_column, label_column, unlabelled)
    if unlabelled and path.suffix.lower() in TEXT_SUFFIXES and path.exists():
        return NamedData.unlabelled(name, lines_of(path))
    if path.exists():
        raise ValueError(
            f"{name}: unknown file type {path.suffix!r}; give a folder of class folders, an .npz, "
            "a .csv or .parquet, or the name of a Hugging Face data set"
        )
    # Asking the hub for a misspelt file costs 23 s of back-off without a network.
    if not name.startswith("hf:") and not _HUB_NAME.fullmatch(name):
        raise FileNotFoundError(
            f"{name}: no such file or folder (a Hugging Face data set is OWNER/NAME, or hf:NAME)"
        )
    return read_hugging_face(name, input_column, label_column)
