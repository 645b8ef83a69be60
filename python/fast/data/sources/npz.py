"""Read an `.npz`: images or features as arrays, images as encoded bytes, or several inputs."""

from __future__ import annotations

import io
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from fast.data.sources.archive import Archive
from fast.data.sources.names import TRAIN, role_of, training_and_held_out
from fast.data.sources.types import EncodedImages, NamedData, Split, labelled, numbered_classes
from fast.data.trees import length
from fast.errors import printable, some

# x, x_train, y_test, x_train.input_ids, ...
_MEMBER = re.compile(r"(x|y|jpeg|offset)(?P<suffix>_[^.]+)?(\..+)?")


def read_npz(path: Path, unlabelled: bool = False) -> NamedData:
    """The arrays of an `.npz`.

    Args:
        unlabelled: there may be no labels.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    with Archive(path) as archive:
        classes = _class_names(archive) if "classes" in archive.names else None
        has_labels = not unlabelled or any(name.startswith("y") for name in archive.names)
        suffixes = list(
            dict.fromkeys(m["suffix"] or "" for n in archive.names if (m := _MEMBER.fullmatch(n)))
        )
        roles = {suffix: TRAIN if suffix == "" else role_of(suffix) for suffix in suffixes}
        training, held_out = training_and_held_out(roles)
        train, val = max(training, default=None), next(iter(held_out), None)
        splits = {
            part: _split(archive, suffix, classes, has_labels)
            for part, suffix in (("train", train), ("val", val))
            if suffix is not None
        }
        if not splits:
            raise ValueError(
                f"{path}: has no data; expected x_train and y_train (and x_val, y_val or _test), "
                f"or x and y; got {some(sorted(archive.names), 10) or 'nothing'}"
            )
        unused = archive.unused()
    if not has_labels:
        classes = ()
    elif classes is None:
        classes = numbered_classes(list(splits.values()), str(path))
    return NamedData(
        name=str(path),
        splits=splits,
        classes=classes,
        held_out=f"x{printable(val)}" if len(splits) == 2 else "",
        notes=(f"arrays that are not used: {some(unused, 6)}",) if unused else (),
        has_labels=has_labels,
    )


def _split(
    archive: Archive, suffix: str, classes: tuple[str, ...] | None, has_labels: bool
) -> Split:
    path, names = archive.path, archive.names
    plain, packed, several = f"x{suffix}", f"jpeg{suffix}", f"x{suffix}."
    inputs: Any
    if plain in names:
        inputs = _check_array(archive.read(plain), f"{path}: {printable(plain)}")
    elif packed in names:
        inputs = _packed_images(archive, suffix)
    else:
        inputs = {
            name.removeprefix(several): _check_array(
                archive.read(name), f"{path}: {printable(name)}"
            )
            for name in names
            if name.startswith(several)
        }
        if not inputs:
            raise ValueError(f"{path}: has labels y{printable(suffix)} but no {printable(plain)}")
        counts = {printable(name): len(value) for name, value in inputs.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"{path}: inputs {printable(several)}* differ in length: {counts}")
    where = f"{path}: y{printable(suffix)}"
    if not has_labels:
        return labelled(inputs, np.zeros(length(inputs), np.int64), where)
    if f"y{suffix}" not in names:
        raise ValueError(f"{path}: has {printable(plain)} but no labels y{printable(suffix)}")
    labels = archive.read(f"y{suffix}")
    return labelled(inputs, labels, where, len(classes) if classes else None)


def _class_names(archive: Archive) -> tuple[str, ...]:
    values = archive.read("classes")
    if values.ndim != 1 or values.dtype.kind not in "USiu":
        raise ValueError(
            f"{archive.path}: classes must be a list of names; got {values.dtype} of shape "
            f"{list(values.shape)}"
        )
    names = tuple(
        v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in values.tolist()
    )
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise ValueError(f"{archive.path}: classes has a name more than once: {some(repeated)}")
    return names


def _check_array(x: np.ndarray, where: str) -> np.ndarray:
    if x.ndim < 2 or x.dtype.kind not in "fiub":
        raise ValueError(
            f"{where}: must be images [N, H, W] or [N, H, W, C], or features [N, D]; got "
            f"{x.dtype} of shape {x.shape}"
        )
    if x.dtype == np.uint16 or (x.ndim == 4 and x.dtype.kind in "iu" and x.dtype != np.uint8):
        raise ValueError(
            f"{where}: images must be uint8 (0..255), or float as the network takes them; got "
            f"{x.dtype} of shape {x.shape}"
        )
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        bad = int(np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(axis=1))[0])
        raise ValueError(f"{where}: sample {bad} is not finite")
    return x


def _packed_images(archive: Archive, suffix: str) -> EncodedImages:
    path, shown = archive.path, printable(suffix)
    packed = archive.read(f"jpeg{suffix}")
    if f"offset{suffix}" not in archive.names:
        raise ValueError(f"{path}: has jpeg{shown} but no borders offset{shown}")
    border = archive.read(f"offset{suffix}")
    if packed.ndim != 1 or packed.dtype != np.uint8 or border.ndim != 1:
        raise ValueError(f"{path}: jpeg{shown} must be bytes, uint8 [n], and offset{shown} [N + 1]")
    border = border.astype(np.int64)
    if len(border) < 1 or (np.diff(border) < 0).any() or border[-1] > len(packed) or border[0] < 0:
        raise ValueError(
            f"{path}: offset{shown} must rise from 0 to {len(packed)}, the bytes there are"
        )
    names = [f"{path}: jpeg{shown}[{i}]" for i in range(len(border) - 1)]
    return EncodedImages(
        names=names, open=lambda i: io.BytesIO(packed[border[i] : border[i + 1]].tobytes())
    )
