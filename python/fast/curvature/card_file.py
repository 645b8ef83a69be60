"""Source cards on disk: one safetensors file, with what it is and how it was made as metadata."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fast.files import atomic_file

if TYPE_CHECKING:
    from fast.curvature.card import SourceCard

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
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata)
    return path


ABOUT = """
One 7-bit code per weight, high bit first and packed without gaps, and one float32 scale per 128:
with y = diagonal / scale, a code counts quarters of an octave of y + 1. No source sample can be
read from it: it is a mean of squared gradients. Read it with fast.SourceCard.load(path)."""


def load_card(path: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Any]]:
    """(name -> codes and scales, the card's other fields)."""
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
            facts = json.loads(metadata["card"])
            tensors = {
                n: (_unpacked(file.get_tensor(f"{n}:codes"), shape), file.get_tensor(f"{n}:scales"))
                for n, shape in facts.pop("shapes").items()
            }
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error})") from error
    points = facts["calibration"]["points"]
    facts["calibration"]["points"] = tuple(tuple(p) for p in points)
    return tensors, facts


def _packed(codes: Tensor) -> Tensor:
    """Even uint8 codes as 7 bits each."""
    bits = np.unpackbits(codes.flatten().numpy()[:, None], axis=1)[:, :7]
    return torch.from_numpy(np.packbits(bits))


def _unpacked(packed: Tensor, shape: list[int]) -> Tensor:
    count = math.prod(shape)
    bits = np.unpackbits(packed.numpy(), count=7 * count).reshape(count, 7)
    return torch.from_numpy(np.packbits(bits, axis=1)).view(shape)
