"""Turn what a predictor is given into a split: paths, pictures, sounds, texts, or arrays."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fast.data.sources import DataWarning, EncodedAudio, EncodedImages, Split
from fast.data.sources.files import AUDIO_SUFFIXES, TEXT_SUFFIXES, lines_of, text_of
from fast.data.sources.formats import pillow
from fast.data.sources.names import FILES, TEXTS
from fast.data.sources.scan import left_out, scan
from fast.data.sources.table import SUFFIXES as TABLES
from fast.data.sources.table import read_inputs
from fast.data.sources.types import EncodedFiles
from fast.data.trees import kind, length
from fast.errors import printable, warn
from fast.models.preparation import Preparation


def raw_inputs(
    inputs: Any, preparation: Preparation, column: str | None = None
) -> tuple[Split, list[str]]:
    """The inputs as a split, in which the label of each is its number; and what each is called.

    Pictures and sounds may be paths of files, of folders, and of tables of paths. Pictures may also
    be objects of Pillow, uint8 arrays `[N, H, W]`, `[N, H, W, C]` or `[N, C, H, W]`, or a list of
    arrays `[H, W]` or `[H, W, C]`. A text is a string; a `pathlib.Path` leads to a table, to
    a text file, which holds one text in a line, or to a folder of text files, each of which is one
    text. Whatever the network takes may also be given as tensors or arrays that are ready for it.

    What a folder holds besides is a `DataWarning`, and so is how its texts were read.

    Args:
        column: the column of a table that holds the inputs (default: by its usual names).

    Raises:
        FileNotFoundError: a path leads nowhere.
        ValueError: the network does not take such inputs.
    """
    items = inputs if isinstance(inputs, (list, tuple)) else [inputs]
    if not items:
        raise ValueError("inputs: there are none")
    raw: Any = None
    names: list[str] | None = None
    if preparation.images is not None:
        raw = _encoded_files(items, column, EncodedImages)
        if raw is None:
            raw = _pictures(items, inputs)
            if isinstance(raw, np.ndarray) and (raw.ndim == 2 or preparation.images.channels != 1):
                _refuse_one_picture(raw)
    elif preparation.kind == "sounds":
        raw = _encoded_files(items, column, EncodedAudio)
    elif preparation.kind == "texts":
        raw, names = _texts(items, column)
    if raw is None:
        raw = _arrays(inputs, preparation)
    count = length(raw)
    if not count:
        raise ValueError("inputs: there are none")
    return Split(inputs=raw, labels=np.arange(count)), names or input_names(raw)


def input_names(inputs: Any) -> list[str]:
    """What each input is called."""
    if isinstance(inputs, EncodedFiles):
        return list(inputs.names)
    if isinstance(inputs, list) and all(isinstance(text, str) for text in inputs):
        return list(inputs)
    return [str(i) for i in range(length(inputs))]


def _pictures(items: Sequence[Any], inputs: Any) -> Any:
    """Pictures of Pillow, or arrays of uint8 pixels; None where the inputs are neither."""
    if isinstance(inputs, list) and all(_is_one_picture(item) for item in items):
        items = [pillow().fromarray(item) for item in items]
    if all(hasattr(item, "getbands") for item in items):
        encoded = [_encoded(picture) for picture in items]
        names = [getattr(p, "filename", "") or f"picture {i}" for i, p in enumerate(items)]
        return EncodedImages(names=names, open=lambda i: io.BytesIO(encoded[i]))
    values = inputs.numpy() if isinstance(inputs, Tensor) else inputs
    if isinstance(values, np.ndarray) and values.dtype == np.uint8:
        return values
    return None


def _is_one_picture(item: Any) -> bool:
    """Whether these are the pixels `[H, W]` or `[H, W, C]` of a picture."""
    if not (isinstance(item, np.ndarray) and item.dtype == np.uint8):
        return False
    return item.ndim == 2 or (item.ndim == 3 and item.shape[-1] in (3, 4))


def _refuse_one_picture(values: np.ndarray) -> None:
    """Raise ValueError where pixels `[H, W, C]` or `[C, H, W]` would be taken for grey pictures
    `[N, H, W]`."""
    if _is_one_picture(values):
        raise ValueError(
            f"inputs: {list(values.shape)} is one picture: give a list of pictures, [array]"
        )
    if values.ndim == 3 and len(values) == 3:
        raise ValueError(
            f"inputs: {list(values.shape)} is one picture in colours, array[None], or three grey "
            "ones, array[:, None]: say which"
        )


def _encoded_files(items: Sequence[Any], column: str | None, encoded: type[EncodedFiles]) -> Any:
    """The files that paths stand for; None where the inputs are no paths.

    A file that is named is tried, whatever its name ends in; in a folder the suffix decides.
    """
    if not all(isinstance(item, (str, os.PathLike)) for item in items):
        return None
    files = [file for item in items for file in _files(Path(item).expanduser(), column, encoded)]
    return encoded(names=files, open=files.__getitem__)


def _files(path: Path, column: str | None, encoded: type[EncodedFiles]) -> list[str]:
    if path.is_dir():
        sounds = encoded is EncodedAudio
        return _in_folder(path, *((AUDIO_SUFFIXES, "sounds") if sounds else (None, "images")))
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.suffix.lower() == ".npz":
        raise ValueError(
            f"{path}: holds arrays: fast evaluate reads it, and predict(array) in Python"
        )
    if path.suffix.lower() not in TABLES:
        return [str(path)]
    held = read_inputs(path, column, FILES)
    if not isinstance(held, EncodedFiles):
        raise ValueError(f"{path}: the column holds no names of files; name another (--column)")
    return list(held.names)


def _in_folder(path: Path, suffixes: frozenset[str] | None, kind: str) -> list[str]:
    """The files of a kind in a folder, at any depth; a warning counts its other files.

    Args:
        suffixes, kind: see `scan`.

    Raises:
        ValueError: there are none.
    """
    folder = scan(path, suffixes, kind)
    others = left_out(folder.all_others())
    if not folder.has_images:
        has = f"; it has {others}" if others else ""
        raise ValueError(f"{printable(path)}: there are no {kind} in this folder{has}")
    if others:
        warn(
            f"{printable(path)}: files that are not read as {kind} are left out: {others}",
            DataWarning,
        )
    return [str(file) for file in folder.all_images()]


def _texts(items: Sequence[Any], column: str | None) -> tuple[list[str] | None, list[str] | None]:
    """The texts, and those in the files that paths lead to, with their names; None where the
    inputs are neither."""
    if not all(isinstance(item, (str, os.PathLike)) for item in items):
        return None, None
    texts: list[str] = []
    names: list[str] = []
    for item in items:
        path = None if isinstance(item, str) else Path(item).expanduser()
        if path is not None and path.is_dir():
            files = _in_folder(path, TEXT_SUFFIXES, "texts")
            warn(
                f"{printable(path)}: each file in it is one text ({len(files)}); a file that is "
                "named itself has one text a line",
                DataWarning,
            )
            texts += [text_of(Path(file)) for file in files]
            names += files
        else:
            read = [item] if path is None else _texts_in(path, column)
            texts += read
            names += read
    return texts, names


def _texts_in(path: Path, column: str | None) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file or folder; texts are read from files, one a line, from folders "
            "of files, and from tables"
        )
    if path.suffix.lower() not in TABLES:
        return lines_of(path)
    held = read_inputs(path, column, TEXTS)
    if not isinstance(held, list):
        raise ValueError(f"{path}: the column holds no texts; name another (--column)")
    return held


def _arrays(inputs: Any, preparation: Preparation) -> Any:
    """Inputs that are ready for the network, as tensors or arrays."""
    if isinstance(inputs, (Tensor, np.ndarray, Mapping)):
        return inputs
    if isinstance(inputs, (tuple, list)) and inputs and isinstance(inputs[0], (Tensor, np.ndarray)):
        return tuple(torch.as_tensor(x) for x in inputs)
    wanted = {
        "images": "paths, pictures of Pillow, uint8 arrays, or tensors as the network takes them",
        "sounds": "paths of sound files, or tensors as the network takes them",
        "texts": "texts, paths of text files, or what the tokenizer gives",
        "arrays": "tensors as the network takes them: how they were made of pictures or texts was "
        "not told to fast.finetune",
    }
    shown = printable(repr(inputs)[:60]) if isinstance(inputs, str) else kind(inputs)
    raise ValueError(f"inputs must be {wanted[preparation.kind]}; got {shown}")


def _encoded(picture: Any) -> bytes:
    """A picture of Pillow as the bytes of a file without loss, which is read like any other."""
    stream = io.BytesIO()
    exif = picture.getexif()
    picture.save(stream, "TIFF" if picture.mode in ("CMYK", "F", "LAB") else "PNG", exif=exif)
    return stream.getvalue()
