"""Source cards on disk: one safetensors file, with what it is and how it was made as metadata."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fast.curvature.card.facts import CardError, read_facts
from fast.errors import first_line
from fast.files import atomic_file
from fastkernels.codes import CODE_BLOCK

if TYPE_CHECKING:
    from fast.curvature.card.card import SourceCard

FORMAT = "fast-source-card-2"


def fingerprint(weights: Tensor) -> str:
    """Hash of a tensor's dtype and values, 16 hex digits."""
    plain = weights.detach().cpu().contiguous()
    digest = hashlib.blake2b(str(plain.dtype).encode(), digest_size=8)
    digest.update(plain.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_card(card: SourceCard, path: Path) -> Path:
    tensors = {}
    for name, entry in card.entries.items():
        tensors[f"{name}:codes"], tensors[f"{name}:scales"] = _packed(entry.codes), entry.scales
    skip = ("entries", "_names", "_anchors")
    facts: dict[str, Any] = {
        f.name: getattr(card, f.name) for f in dataclasses.fields(card) if f.name not in skip
    }
    facts["calibration"] = dataclasses.asdict(card.calibration)
    facts["shapes"] = {name: list(entry.codes.shape) for name, entry in card.entries.items()}
    metadata = {"format": FORMAT, "card": json.dumps(facts), "about": f"{card}\n{ABOUT}"}
    metadata["checksum"] = _checksum(tensors, metadata)
    with atomic_file(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"source card {path}: cannot be written ({first_line(error)})") from error
    return path


ABOUT = """
One 7-bit code per weight, high bit first and packed without gaps, and one float32 scale per 128:
with y = diagonal / scale, a code counts quarters of an octave of y + 1. No source sample can be
read from it: it is a mean of squared gradients. Read it with fast.SourceCard.load(path)."""


def load_card(path: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Any]]:
    """(name -> codes and scales, the card's other fields), all of them checked.

    A card without a checksum, as they were written before there was one, is read with a warning.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, no card, or with anything in it that no card says.
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
            stored = {key: file.get_tensor(key) for key in keys}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or no safetensors file ({first_line(error)})"
        ) from error
    except CardError as error:
        raise ValueError(f"source card {path}: {error}; estimate it anew") from error
    checksum = metadata.pop("checksum", None)
    if checksum is None:
        warnings.warn(
            f"source card {path} has no checksum, as it was written by an older version: save it "
            "again, and damage will be seen",
            stacklevel=3,
        )
    elif checksum != _checksum(stored, metadata):
        raise ValueError(f"source card {path}: damaged (its checksum differs); estimate it anew")
    for name in shapes:
        scales = stored[f"{name}:scales"]
        if not bool((scales.isfinite() & (scales >= 0)).all()):
            raise ValueError(f"source card {path}: scales of {name!r} are negative or not finite")
    tensors = {
        name: (_unpacked(stored[f"{name}:codes"], shape), stored[f"{name}:scales"])
        for name, shape in shapes.items()
    }
    return tensors, facts


def _check_sizes(file: Any, shapes: dict[str, list[int]]) -> None:
    """That what is stored is what the shapes ask for, before anything is read or allocated."""
    expected = {}
    for name, shape in shapes.items():
        count = math.prod(shape)
        expected[f"{name}:codes"] = ("U8", [-(-7 * count // 8)])
        expected[f"{name}:scales"] = ("F32", [-(-count // CODE_BLOCK)])
    keys = set(file.keys())
    if wrong := sorted(keys ^ expected.keys()):
        there = "more" if wrong[0] in keys else "missing"
        raise CardError(f"tensor {wrong[0]!r} is {there} than the card's shapes name")
    for key, (dtype, shape) in expected.items():
        stored = file.get_slice(key)
        found = (stored.get_dtype(), stored.get_shape())
        if found != (dtype, shape):
            raise CardError(f"tensor {key!r} is {found[0]} {found[1]}, not {dtype} {shape}")


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Of everything in a file but itself, 32 hex digits."""
    digest = hashlib.blake2b(json.dumps(sorted(metadata.items())).encode(), digest_size=16)
    for key in sorted(tensors):
        digest.update(f"{key}{list(tensors[key].shape)}".encode())
        digest.update(tensors[key].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _packed(codes: Tensor) -> Tensor:
    """Even uint8 codes as 7 bits each."""
    bits = np.unpackbits(codes.flatten().numpy()[:, None], axis=1)[:, :7]
    return torch.from_numpy(np.packbits(bits))


def _unpacked(packed: Tensor, shape: list[int]) -> Tensor:
    count = math.prod(shape)
    bits = np.unpackbits(packed.numpy(), count=7 * count).reshape(count, 7)
    return torch.from_numpy(np.packbits(bits, axis=1)).view(shape)
