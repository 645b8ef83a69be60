"""Read tables (CSV, Parquet, data frames) with a column of files, texts or numbers and a label."""

from __future__ import annotations

import csv
import io
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fast.data.labels import SEVERAL
from fast.data.sources.files import check_one_label, decoded, files_of
from fast.data.sources.names import (
    FILES,
    HELD_OUT,
    LABELS,
    SPLITS,
    TEXTS,
    TRAIN,
    class_name,
    role_of,
    training_and_held_out,
    usual_columns,
)
from fast.data.sources.scan import natural
from fast.data.sources.types import NamedData, Split, labelled
from fast.errors import first_line, import_library, printable, some

SUFFIXES = (".csv", ".tsv", ".parquet")
# Longer cells are no labels. csv itself refuses cells of more than 128 KB, which texts may have.
LONGEST_CELL = 1 << 24
DELIMITERS = (",", "\t", ";")
Columns = Mapping[str, Sequence[Any]]


def read_table(
    path: Path, input_column: str | None, label_column: str | None, unlabelled: bool = False
) -> NamedData:
    """A table in a file; its files are beside it, or their paths are absolute.

    Args:
        unlabelled: the table may have no column of labels, if `input_column` is given or the inputs
            have a usual name.
    """
    tables = {"train": _columns(path)}
    if unlabelled and label_column is None and not usual_columns(tables["train"], LABELS):
        column = input_column or next(iter(usual_columns(tables["train"], (*FILES, *TEXTS))), None)
        if column is not None:
            inputs = read_inputs(path, column, ())
            note = f"columns: inputs in {printable(column)}, no labels"
            return NamedData.unlabelled(str(path), inputs, (note,))
    return from_columns(str(path), tables, path.parent, input_column, label_column)


def read_tables(
    root: Path, files: Mapping[str, Path], input_column: str | None, label_column: str | None
) -> NamedData:
    """A folder with a table for each split (`train`, `val`)."""
    tables = {part: _columns(path) for part, path in files.items()}
    return from_columns(str(root), tables, root, input_column, label_column)


def split_tables(root: Path) -> dict[str, Path]:
    """The tables in a folder whose names are those of splits, by split (`train`, `val`)."""
    files = (p for p in sorted(root.iterdir()) if p.suffix.lower() in SUFFIXES and p.is_file())
    training, held_out = training_and_held_out({path: role_of(path.stem) for path in files})
    if len(training) != 1:
        return {}
    return {"train": training[0]} | ({"val": held_out[0]} if held_out else {})


def from_columns(
    name: str,
    tables: Mapping[str, Columns],
    root: Path,
    input_column: str | None,
    label_column: str | None,
) -> NamedData:
    """Data from a table for each split, or from one with a column that says the split of a row.

    Args:
        root: folder that paths are relative to.
        input_column, label_column: None lets them be guessed, and a note says the guess.

    Raises:
        ValueError: a column is not there, or cannot be guessed; cells are empty; a row has several
            labels; or files are missing.
    """
    first = tables["train"]
    inputs, label = _chosen(name, first, input_column, label_column)
    notes = []
    if input_column is None or label_column is None:
        notes.append(f"columns: inputs in {printable(inputs)}, labels in {printable(label)}")
    held_out = "the table of its split" if "val" in tables else ""
    if len(tables) == 1:
        tables, split_notes = _by_split(first, {inputs, label})
        notes += split_notes
        held_out = split_notes[0] if "val" in tables else ""
    for part, table in tables.items():
        for column in (inputs, label):
            if column not in table:
                raise ValueError(f"{name}: the table of {part} has no column {column!r}")
    values = {part: _labels(name, label, table[label]) for part, table in tables.items()}
    classes = sorted({v for cells in values.values() for v in cells}, key=natural)
    number = {value: i for i, value in enumerate(classes)}
    splits: dict[str, Split] = {}
    for part, table in tables.items():
        unknown = set(values[part]) - set(values["train"])
        if unknown:
            raise ValueError(f"{name}: classes of {part} are not in train: {some(sorted(unknown))}")
        where = f"{name}: {printable(inputs)}"
        numbers = np.array([number[value] for value in values[part]], dtype=np.int64)
        splits[part] = labelled(_inputs(where, table[inputs], root), numbers, where, len(classes))
    check_one_label(name, splits, classes)
    return NamedData(
        name=name,
        splits=splits,
        classes=tuple(classes),
        held_out=held_out,
        sorted_names=True,
        notes=tuple(notes),
    )


def _by_split(table: Columns, used: set[str]) -> tuple[dict[str, Columns], list[str]]:
    """The rows of each split, where a column names it, and notes on how, and on rows left out."""
    named = usual_columns([c for c in table if c not in used], SPLITS)
    if not named:
        return {"train": table}, []
    column = printable(named[0])
    cells = [str(value).strip() for value in table[named[0]]]
    roles = [role_of(cell) for cell in cells]
    held_out = next((role for role in HELD_OUT if role in roles), None)
    if TRAIN not in roles or held_out is None:
        values = some(sorted(set(cells)), 5)
        return {"train": table}, [f"column {column} is no split into train and val: {values}"]
    rows = {
        part: [i for i, r in enumerate(roles) if r == role]
        for part, role in (("train", TRAIN), ("val", held_out))
    }
    parts: dict[str, Columns] = {
        part: {c: [v[i] for i in index] for c, v in table.items()} for part, index in rows.items()
    }
    notes = [f"split by column {column}"]
    unused = Counter(c for c, r in zip(cells, roles, strict=True) if r not in (TRAIN, held_out))
    for value, count in sorted(unused.items()):
        notes.append(f"rows whose {column} is {printable(value) or 'empty'} are not used: {count}")
    return parts, notes


def read_inputs(path: Path, column: str | None, usual: Sequence[str]) -> Any:
    """The inputs in a table: files, texts or numbers.

    Args:
        column: the one that holds them; None: the first whose name is among `usual`.

    Raises:
        ValueError: the table cannot be read, has no such column, or names files that are not there.
    """
    table = _columns(path)
    names = [column] if column is not None else usual_columns(table, usual)
    if not names or names[0] not in table:
        wanted = "none of the usual columns of inputs" if column is None else f"no column {column}"
        raise ValueError(
            f"{path}: has {wanted}; it has {some(list(table), 10)}: name the one that holds the "
            "inputs (column=)"
        )
    return _inputs(f"{path}: {printable(names[0])}", table[names[0]], path.parent)


def column_names(path: Path) -> list[str]:
    """The names of a table's columns; none where the path is no table that can be read."""
    if path.suffix.lower() not in SUFFIXES or not path.is_file():
        return []
    try:
        return list(_columns(path))
    except (ImportError, ValueError):  # who reads its cells says what is wrong
        return []


def _columns(path: Path) -> Columns:
    """The columns of a file by name; all cells of a CSV file are strings."""
    if path.suffix.lower() == ".parquet":
        return _parquet(path)
    rows = _rows(path)
    if len(rows) < 2:
        raise ValueError(f"{path}: has no rows; the first line holds the names of the columns")
    names = [name.strip() for name in rows[0]]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: two columns have one name: {some(names)}")
    for i, row in enumerate(rows[1:]):
        if len(row) != len(names):
            raise ValueError(
                f"{path}: {_row(i)}, has {len(row)} cells, and there are {len(names)} columns; put "
                'cells with commas into "quotes"'
            )
    return dict(zip(names, zip(*rows[1:], strict=True), strict=True))


def _rows(path: Path) -> list[list[str]]:
    """The cells of a CSV file by rows, without empty rows.

    Cells are separated by commas; if the first line has none, by tabs or semicolons, as
    spreadsheets write them.
    """
    csv.field_size_limit(min(LONGEST_CELL, sys.maxsize))
    try:
        text = decoded(path)
        first = text.lstrip().partition("\n")[0]
        between = next((mark for mark in DELIMITERS if mark in first), ",")
        if path.suffix.lower() == ".tsv":
            between = "\t"
        return [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=between) if row]
    except (OSError, csv.Error) as error:
        raise ValueError(f"{path}: not a readable table ({first_line(error)})") from error


def _parquet(path: Path) -> Columns:
    parquet = import_library("pyarrow.parquet", f"{path}: reading Parquet needs")
    from pyarrow import ArrowException

    try:
        return parquet.read_table(path).to_pydict()
    except (OSError, ArrowException) as error:
        raise ValueError(f"{path}: not a readable table ({first_line(error)})") from error


def _chosen(
    name: str, table: Columns, input_column: str | None, label_column: str | None
) -> tuple[str, str]:
    """The columns of inputs and labels: those that the user names, else those with usual names. If
    one of two columns is clear, the other is, too."""
    columns = [str(column) for column in table]
    chosen = {"--input-column": input_column, "--label-column": label_column}
    usual = {"--input-column": (*FILES, *TEXTS), "--label-column": LABELS}
    for option, column in chosen.items():
        if column is not None and column not in columns:
            raise ValueError(f"{name}: no column {column!r}; {option} can be: {some(columns, 20)}")
    for option in reversed(chosen):
        if chosen[option] is None:
            free = [c for c in columns if c not in chosen.values()]
            chosen[option] = next(iter(usual_columns(free, usual[option])), None)
    free = [c for c in columns if c not in chosen.values()]
    for option, column in chosen.items():
        if column is None:
            if not free:
                what = "inputs" if option == "--input-column" else "labels"
                raise ValueError(f"{name}: has no column of {what}, only {some(columns, 20)}")
            if len(free) != 1 or len(columns) != 2:
                raise ValueError(
                    f"{name}: say which column to use with {option}: {some(free, 20)} (of a file, "
                    "the first line holds the names of the columns)"
                )
            chosen[option] = free[0]
    inputs, label = chosen.values()
    assert inputs is not None
    assert label is not None
    return inputs, label


def _labels(name: str, column: str, cells: Sequence[Any]) -> list[str]:
    """Labels as text: 1, "1" and 1.0 are one class."""
    empty = [i for i, cell in enumerate(cells) if cell is None or _is_blank(cell) or cell != cell]
    if empty:
        raise ValueError(
            f"{name}: {printable(column)}: empty cells: {len(empty)} of {len(cells)}, the first "
            f"in {_row(empty[0])}; drop those rows"
        )
    several = [cell for cell in cells if _is_list(cell)]
    if several:
        raise ValueError(
            f"{name}: {printable(column)}: a row has several labels ({printable(several[0])}); "
            f"{SEVERAL}"
        )
    return [_text(cell) for cell in cells]


def _row(i: int) -> str:
    return f"row {i}, counted from 0 without the names"


def _is_blank(cell: Any) -> bool:
    return isinstance(cell, str) and not cell.strip()


def _is_list(cell: Any) -> bool:
    if isinstance(cell, str):
        return cell.startswith("[") and cell.endswith("]")
    return isinstance(cell, (list, tuple, np.ndarray))


def _text(cell: Any) -> str:
    if isinstance(cell, (float, np.floating)) and float(cell).is_integer():
        return str(int(cell))
    return class_name(str(cell).strip())


def _inputs(where: str, cells: Sequence[Any], root: Path) -> Any:
    """The files that the cells name; else the cells themselves, as texts or numbers."""
    if not isinstance(cells[0], str):
        try:
            return np.asarray(list(cells), np.float32).reshape(len(cells), -1)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: holds neither files nor texts nor numbers") from error
    return files_of(where, [str(cell) for cell in cells], root)
