"""What tells one job from another: hashes of its network and data, for runs that are resumed."""

from __future__ import annotations

import hashlib
from typing import Any

from torch import Tensor, nn

from fast.curvature.answers import SourceInputs
from fast.curvature.card import SourceCard
from fast.curvature.card_file import fingerprint
from fast.inputs import leaves
from fast.train.data import Data


def model_identity(model: nn.Module) -> str:
    """Hash of all weights and buffers, by name."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in model.state_dict().items():
        digest.update(f"{name} {list(value.shape)} {fingerprint(value)}\n".encode())
    return digest.hexdigest()


def data_identity(data: Any) -> str | None:
    """Hash of inputs and labels in memory; of a data set, of the labels that it records.

    A data set's samples are not read: they may be drawn at random.

    Args:
        data: `Data`, `SourceInputs`, a function that measures, or None.
    """
    if data is None:
        return None
    if isinstance(data, SourceInputs):
        data = Data("source_inputs", inputs=data.inputs, labels=data.labels)
    if not isinstance(data, Data):
        return "a function"
    digest = hashlib.blake2b(digest_size=8)
    if data.inputs is not None:
        for x in leaves(data.inputs):
            digest.update(f"{list(x.shape)} {fingerprint(x)}\n".encode())
        if data.labels is not None:
            digest.update(fingerprint(data.labels).encode())
        return digest.hexdigest()
    targets = data.recorded_targets()
    if isinstance(targets, Tensor):
        targets = targets.tolist()
    known = None if targets is None else list(targets)
    batches = None if data.loader is None else len(data.loader)
    digest.update(f"{data.num_samples} {batches} {known}".encode())
    return digest.hexdigest()


def card_identity(card: SourceCard) -> str:
    """Of which weights a card is, and from what it was estimated."""
    facts = [sorted(card.fingerprints.items()), card.num_samples, card.labels, card.temperature]
    return hashlib.blake2b(f"{facts} {card.mean!r}".encode(), digest_size=8).hexdigest()
