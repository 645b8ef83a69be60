"""Source cards on disk: one safetensors file, with what it is and how it was made as metadata."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fast.files import atomic_file

if TYPE_CHECKING:
    from fast.curvature.card import SourceCard

FORMAT = "fast-source-card-1"


def fingerprint(weights: Tensor) -> str:
    """Hash of a tensor's dtype and values, 16 hex digits."""
    plain = weights.detach().cpu().contiguous()
    digest = hashlib.blake2b(str(plain.dtype).encode(), digest_size=8)
    digest.update(plain.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_card(card: SourceCard, path: Path) -> Path:
    tensors = {}
    for name, entry in card.entries.items():
        tensors[f"{name}:codes"], tensors[f"{name}:scales"] = entry.codes, entry.scales
    skip = ("entries", "_names", "_anchors")
    facts = {f.name: getattr(card, f.name) for f in dataclasses.fields(card) if f.name not in skip}
    facts["calibration"] = dataclasses.asdict(card.calibration)
    metadata = {"format": FORMAT, "card": json.dumps(facts), "about": f"{card}\n{ABOUT}"}
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata)
    return path


ABOUT = """
One uint8 code per weight, one float32 scale per 128: with y = diagonal / scale, a code counts
eighths of an octave of y + 1. No source sample can be read from it: it is a mean of squared
gradients. Read it with fast.SourceCard.load(path)."""


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
            names = facts["fingerprints"]
            tensors = {
                n: (file.get_tensor(f"{n}:codes"), file.get_tensor(f"{n}:scales")) for n in names
            }
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error})") from error
    points = facts["calibration"]["points"]
    facts["calibration"]["points"] = tuple(tuple(p) for p in points)
    return tensors, facts
