"""An `.npz`: images or features as arrays, images as encoded bytes, or several named inputs."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from fast.train.sources.types import (
    VAL_NAMES,
    EncodedImages,
    NamedData,
    Split,
    labelled,
    numbered_classes,
)


def read_npz(path: Path) -> NamedData:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (zipfile.BadZipFile, EOFError, ValueError, OSError) as err:
        raise ValueError(f"{path}: not a readable .npz of plain arrays ({err})") from err

    classes = tuple(str(c) for c in arrays["classes"]) if "classes" in arrays else None
    train = _npz_split(path, arrays, "_train", classes) or _npz_split(path, arrays, "", classes)
    val = next(
        (s for s in (_npz_split(path, arrays, f"_{v}", classes) for v in VAL_NAMES) if s), None
    )
    if train is None and val is None:
        raise ValueError(
            f"{path}: has no data; expected x_train and y_train (and x_val, y_val or _test), or x "
            f"and y; got {', '.join(sorted(arrays)) or 'nothing'}"
        )
    if classes is None:
        classes = numbered_classes([s for s in (train, val) if s], str(path))
    return NamedData(str(path), train, val, classes)


def _npz_split(
    path: Path, arrays: dict[str, np.ndarray], suffix: str, classes: tuple[str, ...] | None
) -> Split | None:
    plain, packed, several = f"x{suffix}", f"jpeg{suffix}", f"x{suffix}."
    inputs: Any
    if plain in arrays:
        inputs = _check_array(arrays[plain], f"{path}: {plain}")
    elif packed in arrays:
        inputs = _packed_images(path, arrays, suffix)
    else:
        inputs = {
            name.removeprefix(several): _check_array(value, f"{path}: {name}")
            for name, value in arrays.items()
            if name.startswith(several)
        }
        if not inputs:
            return None
        counts = {name: len(value) for name, value in inputs.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"{path}: inputs {several}* differ in length: {counts}")
    if f"y{suffix}" not in arrays:
        raise ValueError(f"{path}: has {plain} but no labels y{suffix}")
    return labelled(
        inputs, arrays[f"y{suffix}"], f"{path}: y{suffix}", len(classes) if classes else None
    )


def _check_array(x: np.ndarray, where: str) -> np.ndarray:
    if x.ndim < 2 or x.dtype.kind not in "fiub":
        raise ValueError(
            f"{where}: must be images [N, H, W] or [N, H, W, C], or features [N, D]; got "
            f"{x.dtype} of shape {x.shape}"
        )
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        bad = int(np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(axis=1))[0])
        raise ValueError(f"{where}: sample {bad} is not finite")
    return x


def _packed_images(path: Path, arrays: dict[str, np.ndarray], suffix: str) -> EncodedImages:
    packed = arrays[f"jpeg{suffix}"]
    if f"offset{suffix}" not in arrays:
        raise ValueError(f"{path}: has jpeg{suffix} but no borders offset{suffix}")
    border = arrays[f"offset{suffix}"].astype(np.int64)
    if len(border) < 1 or (np.diff(border) < 0).any() or border[-1] > len(packed) or border[0] < 0:
        raise ValueError(
            f"{path}: offset{suffix} must rise from 0 to {len(packed)}, the bytes there are"
        )
    names = [f"{path}: jpeg{suffix}[{i}]" for i in range(len(border) - 1)]
    return EncodedImages(names, lambda i: io.BytesIO(packed[border[i] : border[i + 1]].tobytes()))
