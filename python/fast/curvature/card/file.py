"""Source cards on disk: one safetensors file, with what it is and how it was made as metadata."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fast import dtensor
from fast.curvature.card.codes import Codes, num_scales, packed_size
from fast.curvature.card.facts import CardError, read_facts
from fast.errors import first_line, warn
from fast.files import atomic_file

FORMAT = "fast-source-card-2"
ABOUT = """
One 7-bit code per weight, high bit first and packed without gaps, and one float32 scale per 128:
with y = diagonal / scale, a code counts quarters of an octave of y + 1. No source sample can be
read from it: it is a mean of squared gradients. Read it with fast.SourceCard.load(path)."""


def fingerprint(weights: Tensor) -> str:
    """Hash of a tensor's dtype and values, 16 hex digits; of a sharded one those of all ranks, each
    of which has to ask for it."""
    plain = dtensor.whole(weights.detach()).cpu().contiguous()
    digest = hashlib.blake2b(str(plain.dtype).encode(), digest_size=8)
    digest.update(plain.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_card(
    path: Path, *, entries: Mapping[str, Codes], facts: Mapping[str, Any], summary: str
) -> Path:
    """Write a card, whole or not at all.

    Args:
        entries: parameter -> its diagonal.
        facts: the card's other fields, as `read_facts` takes them, without `shapes`.
        summary: a few lines for those who read the metadata by eye.

    Raises:
        OSError: the file cannot be written.
    """
    tensors = {}
    for name, entry in entries.items():
        tensors[f"{name}:codes"], tensors[f"{name}:scales"] = entry.packed(), entry.scales
    shapes = {name: list(entry.codes.shape) for name, entry in entries.items()}
    metadata = {
        "format": FORMAT,
        "card": json.dumps({**facts, "shapes": shapes}),
        "about": f"{summary}\n{ABOUT}",
    }
    metadata["checksum"] = _checksum(tensors, metadata)
    with atomic_file(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"source card {path}: cannot be written ({first_line(error)})") from error
    return path


def read_card(path: Path) -> tuple[dict[str, Codes], dict[str, Any]]:
    """Entries and facts of a card, as `write_card` takes them, all of them checked.

    A card without a checksum, as older versions wrote them, is read with a warning.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or damaged, is no card, or holds what no card holds.
    """
    if not path.is_file():
        raise FileNotFoundError(f"source card {path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(
                    f"{path} is no source card (format {metadata.get('format')!r}, not "
                    f"{FORMAT!r}): fast.SourceCard.estimate(model, data).save(path) writes one"
                )
            facts = read_facts(metadata.get("card", ""))
            shapes = facts.pop("shapes")
            _check_sizes(file, shapes)
            keys = file.keys()
            tensors = {key: file.get_tensor(key) for key in keys}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or no safetensors file ({first_line(error)})"
        ) from error
    except CardError as error:
        raise ValueError(f"source card {path}: {error}; estimate it anew") from error
    checksum = metadata.pop("checksum", None)
    if checksum is None:
        warn(
            f"source card {path} has no checksum, as it was written by an older version: save it "
            "again, and damage will be seen",
        )
    elif checksum != _checksum(tensors, metadata):
        raise ValueError(f"source card {path}: damaged (its checksum differs); estimate it anew")
    entries = {}
    for name, shape in shapes.items():
        scales = tensors[f"{name}:scales"]
        if not bool((scales.isfinite() & (scales >= 0)).all()):
            raise ValueError(f"source card {path}: scales of {name!r} are negative or not finite")
        entries[name] = Codes.unpacked(tensors[f"{name}:codes"], scales, shape)
    return entries, facts


def _check_sizes(file: Any, shapes: dict[str, list[int]]) -> None:
    """Raise CardError unless the stored tensors have the sizes that the shapes ask for.

    Nothing is read or allocated before that is known.
    """
    sizes = {}
    for name, shape in shapes.items():
        count = math.prod(shape)
        sizes[f"{name}:codes"] = ("U8", [packed_size(count)])
        sizes[f"{name}:scales"] = ("F32", [num_scales(count)])
    keys = set(file.keys())
    if wrong := sorted(keys ^ sizes.keys()):
        there = "more" if wrong[0] in keys else "missing"
        raise CardError(f"tensor {wrong[0]!r} is {there} than the card's shapes name")
    for key, (dtype, size) in sizes.items():
        tensor = file.get_slice(key)
        got = (tensor.get_dtype(), tensor.get_shape())
        if got != (dtype, size):
            raise CardError(f"tensor {key!r} is {got[0]} {got[1]}, not {dtype} {size}")


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Hash of everything in a file except the checksum itself, 32 hex digits."""
    digest = hashlib.blake2b(json.dumps(sorted(metadata.items())).encode(), digest_size=16)
    for key in sorted(tensors):
        digest.update(f"{key}{list(tensors[key].shape)}".encode())
        digest.update(tensors[key].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
