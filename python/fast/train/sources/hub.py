"""A Hugging Face data set, from the hub or from a folder written by `save_to_disk`."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fast.errors import first_line
from fast.train.sources.types import (
    VAL_NAMES,
    EncodedImages,
    NamedData,
    Split,
    labelled,
    numbered_classes,
)


def read_hugging_face(name: str, input_column: str | None, label_column: str | None) -> NamedData:
    try:
        import datasets
    except ImportError as err:
        raise FileNotFoundError(
            f"{name}: no such file or folder (to read Hugging Face data sets: pip install datasets)"
        ) from err
    if int(datasets.__version__.partition(".")[0]) < 4:
        raise ImportError(
            f"{name}: datasets {datasets.__version__} runs the scripts of data sets: pip install "
            "'datasets>=4'"
        )
    try:
        if Path(name).is_dir():
            loaded = datasets.load_from_disk(name)
        else:
            repo, _, config = name.removeprefix("hf:").partition(":")
            loaded = datasets.load_dataset(repo, config or None)
    except Exception as err:  # the hub client raises its own, httpx's and requests' errors
        raise FileNotFoundError(
            f"{name}: no such file or folder, nor can it be loaded as a Hugging Face data set "
            f"({first_line(err)})"
        ) from err
    if not isinstance(loaded, dict):
        loaded = {"train": loaded}
    parts = {
        "train": loaded.get("train"),
        "val": next((loaded[v] for v in VAL_NAMES if v in loaded), None),
    }
    first = next((part for part in parts.values() if part is not None), None)
    if first is None:
        raise ValueError(f"{name}: has neither train nor validation; got {', '.join(loaded)}")
    features = first.features
    label_column = _column(
        name,
        "--label-column",
        label_column,
        features,
        lambda f: isinstance(f, datasets.ClassLabel),
        ("label", "labels"),
    )
    input_column = _column(
        name,
        "--input-column",
        input_column,
        features,
        lambda f: isinstance(f, datasets.Image),
        ("image", "img", "text", "sentence"),
    )
    classes = getattr(features[label_column], "names", None)
    splits: dict[str, Split] = {}
    for part, table in parts.items():
        if table is None:
            continue
        splits[part] = labelled(
            _hf_inputs(datasets, table, input_column),
            table[label_column],
            f"{name}: {label_column}",
            len(classes) if classes else None,
        )
    if not classes:
        classes = numbered_classes(list(splits.values()), f"{name}: {label_column}")
    return NamedData(name, splits.get("train"), splits.get("val"), tuple(classes))


def _column(
    name: str,
    option: str,
    asked: str | None,
    features: Any,
    fits: Callable[[Any], bool],
    usual: tuple[str, ...],
) -> str:
    if asked is not None:
        if asked not in features:
            raise ValueError(f"{name}: no column {asked!r}; {option} can be: {', '.join(features)}")
        return asked
    found = [c for c, feature in features.items() if fits(feature)] or [
        c for c in usual if c in features
    ]
    if not found:
        raise ValueError(f"{name}: say which column to use with {option}: {', '.join(features)}")
    return found[0]


def _hf_inputs(datasets: Any, table: Any, column: str) -> Any:
    if isinstance(table.features[column], datasets.Image):
        raw = table.cast_column(column, datasets.Image(decode=False))

        def open_image(i: int) -> Any:
            cell = raw[i][column]
            return io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"]

        return EncodedImages([f"{column}[{i}]" for i in range(len(table))], open_image)
    values = list(table[column])
    return values if values and isinstance(values[0], str) else np.asarray(values)
