"""The shapes and types of a network's inputs as plain values, and made-up inputs that have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Signature = Any  # {"shape": [3, 8, 8], "dtype": "float32"}, or a list or mapping of such


def signature_of(batch: Any) -> Signature:
    """The shape of one sample of a batch, and its type, for each input of the network."""
    if isinstance(batch, Mapping):
        return {str(name): signature_of(x) for name, x in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [signature_of(x) for x in batch]
    if not isinstance(batch, Tensor):
        return None
    return {"shape": list(batch.shape[1:]), "dtype": str(batch.dtype).removeprefix("torch.")}


def example(signature: Signature, samples: int = 2, name: str = "") -> Any:
    """Make up inputs of this signature: noise for numbers, 0 for token ids, 1 for masks.

    Args:
        samples: the number of samples.
        name: the name of the input, which says whether it is a mask.

    Raises:
        ValueError: there is no signature.
    """
    if signature is None:
        raise ValueError(
            "the shapes of the network's inputs are not known: pass sample=, a batch of inputs, "
            "to fast.load(...).export in Python"
        )
    if isinstance(signature, list):
        return tuple(example(part, samples, name) for part in signature)
    if not _is_leaf(signature):
        return {key: example(part, samples, key) for key, part in signature.items()}
    shape, dtype = [samples, *signature["shape"]], getattr(torch, signature["dtype"])
    if dtype.is_floating_point:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return (torch.ones if "mask" in name else torch.zeros)(shape, dtype=dtype)


def _is_leaf(signature: Any) -> bool:
    return set(signature) == {"shape", "dtype"} and isinstance(signature["dtype"], str)
