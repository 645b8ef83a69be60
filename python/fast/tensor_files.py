"""Tensors in safetensors files; apart from `fast.files`, which does without torch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fast.files import atomic_file


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Save tensors of any memory layout as safetensors; tied ones are stored once for each name.

    Raises:
        OSError: the file cannot be written, as on a full disk.
    """
    plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    try:
        save_file(plain, path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written ({error})") from error


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Save tensors in place of what is at `path`, whole or not at all; see `save_tensors`."""
    with atomic_file(path) as temporary:
        save_tensors(tensors, temporary)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file, by name.

    Raises:
        ValueError: the file is truncated or is not a safetensors file; the message names it.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or not a safetensors file ({error})") from error


def load_into(model: nn.Module, tensors: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """Load tensors into a network, as of the versions that its modules have.

    A state dict says these, and a file of tensors does not. torchvision's MNASNet loads no state
    without one.

    Args:
        strict: the names have to be those of the network.
    """
    state: Any = OrderedDict(tensors)
    own: Any = model.state_dict()
    state._metadata = own._metadata
    model.load_state_dict(state, strict=strict)
