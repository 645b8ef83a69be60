"""Read a Hugging Face data set, from the hub or from a folder written by `save_to_disk`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from fast.data.sources.connection import quick_offline
from fast.data.sources.names import (
    LABELS,
    MEDIA,
    TEXTS,
    role_of,
    training_and_held_out,
    usual_columns,
)
from fast.data.sources.types import (
    EncodedAudio,
    EncodedImages,
    NamedData,
    Split,
    labelled,
    numbered_classes,
)
from fast.errors import first_line, printable, some

UNLABELLED = -1
USUAL_COLUMNS = {"--label-column": LABELS, "--input-column": (*MEDIA, *TEXTS)}


def read_hugging_face(name: str, input_column: str | None, label_column: str | None) -> NamedData:
    datasets, loaded = _load(name)
    if not isinstance(loaded, dict):
        loaded = {"train": loaded}
    training, held_out = training_and_held_out({split: role_of(split) for split in loaded})
    if not training and not held_out:
        raise ValueError(f"{name}: has neither train nor validation; got {some(list(loaded), 10)}")
    features = loaded[(training or held_out)[0]].features
    try:
        label_column = _column("--label-column", label_column, features, datasets.ClassLabel)
        input_column = _column("--input-column", input_column, features, datasets.Image)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    labels = {split: loaded[split][label_column][:] for split in training[:1] + held_out}
    # Benchmarks publish the inputs of their test split, and -1 for its labels.
    has_labels = [s for s in held_out if any(label != UNLABELLED for label in labels[s])]
    candidates = {"train": training, "val": has_labels}
    split_of = {part: names[0] for part, names in candidates.items() if names}
    notes = [
        f"split {printable(split)} is not used"
        + (": its labels are all -1" if split in held_out and split not in has_labels else "")
        for split in loaded
        if split not in split_of.values()
    ]
    classes = getattr(features[label_column], "names", None)
    splits: dict[str, Split] = {}
    for part, split in split_of.items():
        where = f"{name}: split {printable(split)}: "
        splits[part] = labelled(
            _inputs(datasets, loaded[split], input_column, where),
            labels[split],
            where + printable(label_column),
            len(classes) if classes else None,
        )
    if not splits:
        raise ValueError(f"{name}: no split has labels; got {some(list(loaded), 10)}")
    if not classes:
        classes = numbered_classes(list(splits.values()), f"{name}: {printable(label_column)}")
    return NamedData(
        name=name,
        splits=splits,
        classes=tuple(classes),
        held_out=f"split {printable(split_of['val'])}" if len(splits) == 2 else "",
        notes=tuple(notes),
    )


def _load(name: str) -> tuple[Any, Any]:
    """The library `datasets`, and what it loads by this name."""
    try:
        import datasets
    except ImportError as err:
        raise FileNotFoundError(
            f"{name}: no such file or folder (to read Hugging Face data sets: pip install datasets)"
        ) from err
    if int(datasets.__version__.split(".")[0]) < 4:
        # Older versions run the code that comes with a data set.
        raise ImportError(
            f"datasets {datasets.__version__} is too old: pip install --upgrade 'datasets>=4'"
        )
    try:
        if Path(name).expanduser().is_dir():
            return datasets, datasets.load_from_disk(str(Path(name).expanduser()))
        repo, _, config = name.removeprefix("hf:").partition(":")
        with quick_offline():
            return datasets, datasets.load_dataset(repo, config or None)
    except Exception as err:  # the hub client raises its own, httpx's and requests' errors
        raise FileNotFoundError(
            f"{name}: no such file or folder, nor can it be loaded as a Hugging Face data set "
            f"({printable(first_line(err))})"
        ) from err


def _column(option: str, column: str | None, features: Any, kind: type) -> str:
    """The column that the user names; else the first of this type, else one with a usual name."""
    columns = some(list(features), 20)
    if column is not None:
        if column not in features:
            raise ValueError(f"no column {column!r}; {option} can be: {columns}")
        return column
    of_kind = [name for name, feature in features.items() if isinstance(feature, kind)]
    candidates = of_kind or usual_columns(features, USUAL_COLUMNS[option])
    if not candidates:
        raise ValueError(f"say which column to use with {option}: {columns}")
    return candidates[0]


def _inputs(datasets: Any, table: Any, column: str, where: str) -> Any:
    feature = table.features[column]
    if isinstance(feature, (datasets.Image, datasets.Audio)):
        raw = table.cast_column(column, type(feature)(decode=False))

        def open_file(i: int) -> Any:
            cell = raw[i][column]
            if cell is None:
                raise ValueError("the cell is empty")
            return io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"]

        names = [f"{where}{printable(column)}[{i}]" for i in range(len(table))]
        kind = EncodedImages if isinstance(feature, datasets.Image) else EncodedAudio
        return kind(names=names, open=open_file)
    values = list(table[column])
    missing = [i for i, value in enumerate(values) if value is None]
    if missing:
        raise ValueError(
            f"{where}{printable(column)}: empty cells: {len(missing)}, the first in row "
            f"{missing[0]}"
        )
    if values and isinstance(values[0], str):
        return values
    try:
        array = np.asarray(values)
    except ValueError as err:
        raise ValueError(
            f"{where}{printable(column)}: rows differ in length; pad them, or name a column of "
            "texts or images with --input-column"
        ) from err
    if array.dtype.kind not in "fiub":
        raise ValueError(
            f"{where}{printable(column)}: holds {type(values[0]).__name__}; name a column of "
            "texts, images or numbers with --input-column"
        )
    return array
