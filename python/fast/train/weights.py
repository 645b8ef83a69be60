"""Load a checkpoint file into a network, and say what did not match."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn


def load_weights(model: nn.Module, path: str | Path, *, allow_missing: bool = False) -> list[str]:
    """Load a safetensors or torch checkpoint in place; returns notes on what did not match.

    Stored values are cast to the dtype of the model. A checkpoint may hold the state under
    `state_dict`, `model` or `model_state_dict`, and its names may start with `module.`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, shapes differ, or names are missing (beyond batch norm's
            `num_batches_tracked`) and `allow_missing` is not set. The model is then unchanged.
    """
    path = Path(path).expanduser()
    state = _read_state(path)
    own = model.state_dict()
    if not set(state) & set(own) and any(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    missing = [n for n in own if n not in state and not n.endswith("num_batches_tracked")]
    unexpected = [n for n in state if n not in own]
    shapes = [
        f"{n} is {tuple(state[n].shape)} in the file, {tuple(own[n].shape)} in the network"
        for n in own
        if n in state and state[n].shape != own[n].shape
    ]
    if shapes:
        raise ValueError(
            f"{path}: shapes differ: {_some(shapes, '; ')}; build the network that the weights are "
            "of, for example with (num_classes=...)"
        )
    if missing and not allow_missing:
        raise ValueError(
            f"{path}: lacks {len(missing)} of {len(own)} tensors of the network: {_some(missing)}"
            + (f"; it has others that do not belong: {_some(unexpected)}" if unexpected else "")
            + "; --allow-missing leaves them as they are"
        )
    model.load_state_dict(state, strict=False)
    notes = []
    if missing:
        notes.append(f"{path}: {len(missing)} tensors missing, left as built: {_some(missing)}")
    if unexpected:
        notes.append(f"{path}: {len(unexpected)} tensors not used: {_some(unexpected)}")
    return notes


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"weights {path}: no such file")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as err:
            raise ValueError(f"{path}: truncated or not a safetensors file ({err})") from err
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # torch raises pickle, zip, EOF and runtime errors of its own here
        reason = (str(err).splitlines() or [type(err).__name__])[0]
        raise ValueError(
            f"{path}: not a readable checkpoint of plain tensors ({reason}); weights are read as "
            ".safetensors, else with torch.load(weights_only=True)"
        ) from err
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: holds no state dict of tensors, but a {type(state).__name__}")
    return state


def _some(names: list[str], separator: str = ", ") -> str:
    return separator.join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
