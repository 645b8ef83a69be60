"""What is given to a predictor, as a split: paths, pictures, texts, or arrays."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fast.data.sources import EncodedImages, Split
from fast.data.sources.scan import scan
from fast.data.sources.table import rows_of
from fast.data.trees import kind, length
from fast.errors import printable, some
from fast.models.preparation import Preparation

# Columns of a table that hold inputs, the likeliest first.
COLUMNS = {
    "images": ("path", "file", "filename", "file_name", "filepath", "image", "img", "name"),
    "texts": ("text", "sentence", "content", "review", "question", "body"),
}
TABLES = (".csv", ".tsv")


def raw_inputs(inputs: Any, preparation: Preparation, column: str | None = None) -> Split:
    """Inputs with their number for a label.

    Pictures may be paths of files and folders, `.csv` tables of paths, pictures of Pillow, or uint8
    arrays. Texts are strings; a `pathlib.Path` of a `.csv` or of a text file holds many, one in a
    line. What the network takes as it is may be tensors or arrays.

    Raises:
        FileNotFoundError: a path leads nowhere.
        ValueError: these are no inputs of this network.
    """
    if preparation.kind == "images":
        found = _pictures(inputs, column)
    elif preparation.kind == "texts":
        found = _texts(inputs, column)
    else:
        found = None
    if found is None:
        found = _arrays(inputs, preparation)
    count = length(found)
    if not count:
        raise ValueError("inputs: there are none")
    return Split(inputs=found, labels=np.arange(count))


def input_names(inputs: Any) -> list[str]:
    """What each input is called."""
    if isinstance(inputs, EncodedImages):
        return list(inputs.names)
    if isinstance(inputs, list) and all(isinstance(text, str) for text in inputs):
        return list(inputs)
    return [str(i) for i in range(length(inputs))]


def _pictures(inputs: Any, column: str | None) -> Any:
    items = inputs if isinstance(inputs, (list, tuple)) else [inputs]
    if items and all(isinstance(item, (str, os.PathLike)) for item in items):
        files = [file for item in items for file in _files(Path(item).expanduser(), column)]
        names = [str(file) for file in files]
        return EncodedImages(names=names, open=names.__getitem__)
    if items and all(hasattr(item, "getbands") for item in items):
        encoded = [_encoded(picture) for picture in items]
        names = [getattr(p, "filename", "") or f"picture {i}" for i, p in enumerate(items)]
        return EncodedImages(names=names, open=lambda i: io.BytesIO(encoded[i]))
    values = inputs.numpy() if isinstance(inputs, Tensor) else inputs
    if isinstance(values, np.ndarray) and values.dtype == np.uint8:
        return values
    return None


def _files(path: Path, column: str | None) -> list[Path]:
    """The picture files that a path stands for; a file that is named is tried, whatever its name
    ends in."""
    if path.is_dir():
        found = scan(path)
        files = found.all_images()
        if not files:
            raise ValueError(f"{path}: there are no images in this folder")
        return files
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.suffix.lower() in TABLES:
        return [path.parent / name for name in _column(path, "images", column)]
    return [path]


def _texts(inputs: Any, column: str | None) -> list[str] | None:
    items = inputs if isinstance(inputs, (list, tuple)) else [inputs]
    if not items or not all(isinstance(item, (str, os.PathLike)) for item in items):
        return None
    texts: list[str] = []
    for item in items:
        if isinstance(item, str):
            texts.append(item)
            continue
        path = Path(item).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        if path.suffix.lower() in TABLES:
            texts += _column(path, "texts", column)
        else:
            texts += [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    return texts


def _column(path: Path, kind: str, column: str | None) -> list[str]:
    """One column of a table."""
    rows = rows_of(path)
    header = rows[0] if len(rows) > 1 else []
    wanted = (column,) if column else COLUMNS[kind]
    places = {name.strip().lower(): i for i, name in enumerate(header)}
    place = next((places[w.lower()] for w in wanted if w.lower() in places), None)
    if place is None:
        raise ValueError(
            f"{path}: has no column {some(list(wanted), 3)}; it has {some(header, 10) or 'none'}: "
            "name the one that holds the inputs (column=, --column)"
        )
    return [row[place] if place < len(row) else "" for row in rows[1:]]


def _arrays(inputs: Any, preparation: Preparation) -> Any:
    """Inputs as the network takes them."""
    if isinstance(inputs, (Tensor, np.ndarray, Mapping)):
        return inputs
    if isinstance(inputs, (tuple, list)) and inputs and isinstance(inputs[0], (Tensor, np.ndarray)):
        return tuple(torch.as_tensor(x) for x in inputs)
    wanted = {
        "images": "paths, pictures of Pillow, uint8 arrays, or tensors as the network takes them",
        "texts": "texts, paths of text files, or what the tokenizer gives",
        "arrays": "tensors as the network takes them: how they were made of pictures or texts was "
        "not told to fast.finetune",
    }
    shown = printable(repr(inputs)[:60]) if isinstance(inputs, str) else kind(inputs)
    raise ValueError(f"inputs must be {wanted[preparation.kind]}; got {shown}")


def _encoded(picture: Any) -> bytes:
    """A picture of Pillow as a file without loss, which is then read like any other."""
    stream = io.BytesIO()
    exif = picture.getexif()
    picture.save(stream, "TIFF" if picture.mode in ("CMYK", "F", "LAB") else "PNG", exif=exif)
    return stream.getvalue()
