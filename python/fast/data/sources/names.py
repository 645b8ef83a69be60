"""The names that published data sets have for their splits, and tables for their columns."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypeVar

Name = TypeVar("Name")
TRAIN = "train"
# Held-out splits, the best first: the first one that a data set has is used.
HELD_OUT = ("val", "eval", "test")
# Splits without labels.
REST = "rest"
# Columns of tables, the likeliest first; MEDIA are those that may hold a picture or sound itself.
LABELS = (
    "label", "labels", "class", "target", "category", "y", "classid", "class_id", "class_name",
)  # fmt: skip
MEDIA = ("image", "img", "audio")
FILES = (
    "path", "file", "filename", "file_name", "filepath", "file_path", *MEDIA, "image_path",
    "audio_path", "input",
)  # fmt: skip
TEXTS = ("text", "sentence", "review", "content", "question", "body", "input")
SPLITS = ("split", "set", "subset")
_WORDS = {
    TRAIN: "train training trn trainval",
    "val": "val valid validation validate validating dev devel development holdout heldout",
    "eval": "eval evaluation evaluate",
    "test": "test testing tst",
    REST: "pred predict prediction unlabeled unlabelled unsupervised",
}
_ROLES = {word: role for role, words in _WORDS.items() for word in words.split()}
# Words that a name may have besides: `training_set`, `val-images`.
_FILLERS = frozenset(
    ["set", "sets", "data", "dataset", "split", "folder", "images", "image", "imgs", "img"]
)
_GLUED = re.compile(rf"({'|'.join(sorted(_ROLES, key=len, reverse=True))})({'|'.join(_FILLERS)})")


def role_of(name: str) -> str | None:
    """`Training_Set` -> `train`, `seg_test` -> `test`, `dev` -> `val`, any other name -> None."""
    return _read(name)[0]


def roles_of(names: Iterable[str]) -> dict[str, str]:
    """The role of each name that is the name of a split.

    It may have one more word if two names share that word: `seg_train` and `seg_test` are splits,
    `train_station` and `test_tube` are not.
    """
    read = {name: _read(name) for name in names}
    common = Counter(other for role, other in read.values() if role is not None)
    return {
        name: role
        for name, (role, other) in read.items()
        if role is not None and (not other or common[other] > 1)
    }


def training_and_held_out(roles: Mapping[Name, str | None]) -> tuple[list[Name], list[Name]]:
    """The training splits, and the held-out ones, the best first.

    Args:
        roles: the role of each split, as `role_of` says; None for what is no split.
    """
    training = [name for name, role in roles.items() if role == TRAIN]
    held_out = [name for best in HELD_OUT for name, role in roles.items() if role == best]
    return training, held_out


def class_name(text: str) -> str:
    """The name of a class as it is compared: an umlaut may be written as one character or, as by
    macOS, as two, which look the same."""
    return unicodedata.normalize("NFC", text)


def usual_columns(columns: Iterable[str], names: Iterable[str]) -> list[str]:
    """The columns whose names are among `names`, in the order of `names`; `File Path` counts as
    `file_path`."""
    places = {_underscored(column): column for column in reversed(list(columns))}
    return [places[name] for name in names if name in places]


def _underscored(name: str) -> str:
    return "_".join(name.lower().replace("-", " ").split())


def _read(name: str) -> tuple[str | None, str]:
    """The role of a name, and the other word in it."""
    words = re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    if words in (["hold", "out"], ["held", "out"]):
        return "val", ""
    words = [part for word in words for part in _unglued(word)]
    roles = [_ROLES[word] for word in words if word in _ROLES]
    others = [word for word in words if word not in _ROLES and word not in _FILLERS]
    if len(roles) != 1 or len(others) > 1:
        return None, ""
    return roles[0], " ".join(others)


def _unglued(word: str) -> list[str]:
    """`trainset` -> `train`, `set`."""
    match = _GLUED.fullmatch(word)
    return list(match.groups()) if match else [word]
