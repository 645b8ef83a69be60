"""Load a checkpoint file into a network, and say what did not match."""

from __future__ import annotations

import pickle
import zipfile
from argparse import Namespace
from collections import Counter
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fast.errors import counted, first_line, printable, some
from fast.tensor_files import load_into, load_tensors

# Keys under which trainers store weights. Averaged weights come first, because those are evaluated.
STATE_KEYS = (
    "state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "net", "checkpoint",
)  # fmt: skip
# What names of files of weights usually end in.
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
# Prefixes that wrappers add to names: DataParallel, torch.compile, Lightning, distillation.
WRAPPERS = frozenset((
    "module", "_orig_mod", "model", "net", "network", "backbone", "base_model", "ema", "student",
    "teacher",
))  # fmt: skip


def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    allow_missing: bool = False,
    missing: list[str] | None = None,
) -> list[str]:
    """Load a safetensors or torch checkpoint in place.

    Stored values are cast to the dtype of the model. A checkpoint may hold the state under a key
    (`state_dict`, `model`, ...), and all of its names may have one prefix more than the network's,
    or one less (`module.`, `_orig_mod.`, `backbone.`).

    Args:
        allow_missing: let tensors that the file lacks stay as they are.
        missing: takes the names of these tensors.

    Returns:
        notes on what did not match.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, shapes differ, the network has none of its tensors, or
            names are missing (beyond batch norm's `num_batches_tracked`) and `allow_missing` is not
            set. The model is then unchanged.
    """
    path = Path(path).expanduser()
    state, notes = read_state(path)
    own = model.state_dict()
    state, more = matched(state, own, path)
    notes += more
    lacks = lacking(state, own)
    others = [n for n in state if n not in own]
    _check_fits(model, state, path)
    if lacks and not allow_missing:
        raise ValueError(
            f"{path}: lacks {len(lacks)} of {len(own)} tensors of the network: {some(lacks, 4)}"
            + (f"; it has others that do not belong: {some(others, 4)}" if others else "")
            + "; --allow-missing leaves them as they are"
        )
    load_into(model, state, strict=False)
    if missing is not None:
        missing += lacks
    if lacks:
        count = len(state) - len(others)
        notes.append(
            f"{path}: {count} of {len(own)} tensors loaded, "
            f"{counted(len(lacks), 'tensor')} missing, left as built: {some(lacks, 4)}"
        )
    if others:
        notes.append(f"{path}: {counted(len(others), 'tensor')} not used: {some(others, 4)}")
    return notes


def lacking(state: Container[str], names: Iterable[str]) -> list[str]:
    """The names that a state lacks, apart from the counts of batch norms, which old ones lack."""
    return [n for n in names if n not in state and not n.endswith("num_batches_tracked")]


def _check_fits(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Raise ValueError where the state has nothing for the network, or tensors that do not fit."""
    parameters = [name for name, _ in model.named_parameters()]
    if parameters and not any(name in state for name in parameters):
        raise ValueError(
            f"{path}: none of its {len(state)} tensors is one of this network's: it has "
            f"{some(list(state))}; the network {some(parameters)}. Rename them, or build the "
            "network that they are of"
        )
    both = [(n, state[n], own) for n, own in model.state_dict().items() if n in state]
    others = [(n, x, own) for n, x, own in both if x.shape != own.shape]
    if others:
        shapes = [
            f"{n} is {tuple(x.shape)} in the file, {tuple(own.shape)} in the network"
            for n, x, own in others
        ]
        rows = {x.shape[0] for _, x, own in others if x.ndim and x.shape[1:] == own.shape[1:]}
        example = f", for example with (num_classes={rows.pop()})" if len(rows) == 1 else ""
        raise ValueError(
            f"{path}: shapes differ: {some(shapes, 4, '; ')}; build the network that the weights "
            f"are of{example}"
        )
    no_floats = [
        f"{n} ({x.dtype})"
        for n, x, own in both
        if own.is_floating_point() and not x.is_floating_point()
    ]
    if no_floats:
        raise ValueError(
            f"{path}: tensors that are no floats: {some(no_floats, 4)}; unpack them first"
        )


def read_state(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict in a file, and notes on which one it is, if the file has several."""
    if path.is_dir():
        inside = sorted(f.name for f in path.iterdir() if f.suffix in SUFFIXES)
        there = f"name one of its files: {some(inside)}" if inside else "name a file of weights"
        raise ValueError(f"weights {printable(path)}: is a folder; {there}")
    if not path.is_file():
        raise FileNotFoundError(f"weights {path}: no such file")
    if path.suffix == ".safetensors":
        return load_tensors(path), []
    if _is_program(path):
        raise ValueError(
            f"{path}: is a TorchScript program; save its weights, if you trust the file: "
            f"torch.save(torch.jit.load({path.name!r}).state_dict(), 'weights.pt')"
        )
    try:
        # timm and many scripts store their options, which are plain values, as a Namespace.
        with torch.serialization.safe_globals([Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as err:
        raise ValueError(
            f"{path}: not a readable checkpoint of plain tensors: it holds Python objects, which "
            "may be code. Save model.state_dict() where it was made; or here, if you trust the "
            f"file, as torch.load({path.name!r}, weights_only=False) gives it"
        ) from err
    except Exception as err:  # torch raises zip, EOF and runtime errors of its own here
        raise ValueError(
            f"{path}: not a readable checkpoint of plain tensors ({printable(first_line(err))}); "
            "weights are read as .safetensors, else with torch.load(weights_only=True)"
        ) from err
    return _unpacked(state, path)


def _is_program(path: Path) -> bool:
    """Whether TorchScript wrote a file: its archive has code, and that of a state dict none."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _unpacked(state: Any, path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict in what a trainer has stored, and notes; see `read_state`."""
    if _is_state(state):
        return state, []
    dicts = {k: v for k, v in state.items() if isinstance(v, dict)} if _is_named(state) else {}
    key = next((key for key in STATE_KEYS if dicts.get(key)), None)
    if key is None:
        states = [k for k, v in dicts.items() if _is_state(v)]
        if len(states) != 1:
            what = f"several: {some(states)}" if states else f"but a {type(state).__name__}"
            raise ValueError(f"{path}: holds no state dict of tensors, {what}")
        key = states[0]
    inner, notes = _unpacked(dicts[key], path)
    others = [k for k, v in dicts.items() if k != key and _is_state(v)]
    if others:
        notes.append(f"{path}: the weights under {key!r} are used, not {some(others)}")
    return inner, notes


def _is_named(state: Any) -> bool:
    return isinstance(state, dict) and all(isinstance(name, str) for name in state)


def _is_state(state: Any) -> bool:
    return bool(state) and _is_named(state) and all(isinstance(v, Tensor) for v in state.values())


def matched(
    state: dict[str, Tensor], own: dict[str, Tensor], path: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """Rename a state as the network names it: a prefix is added or removed where that fits better.

    Args:
        own: the state dict of the network.
        path: where the state comes from, for messages.

    Returns:
        the state, and notes.

    Raises:
        ValueError: two prefixes fit equally well, so that the file has several networks.
    """
    matches = sum(name in own for name in state)
    superfluous, absent = _prefixes(state, own), _prefixes(own, state)
    counts = max(superfluous, absent, key=lambda counts: max(counts.values(), default=0))
    if matches >= max(counts.values(), default=0):
        return state, []
    (best, count), *others = counts.most_common()
    if others and others[0][1] == count:
        raise ValueError(
            f"{path}: holds several networks, {printable(best)} and {printable(others[0][0])}: "
            "store one of them"
        )
    if counts is superfluous:
        return {name.removeprefix(best): v for name, v in state.items()}, []
    return {best + n: v for n, v in state.items()}, [f"{path}: its names lack {printable(best)}"]


def _prefixes(long: dict[str, Tensor], short: dict[str, Tensor]) -> Counter[str]:
    """For each prefix of wrappers, count the names in `long` that are in `short` without it."""
    counts: Counter[str] = Counter()
    for name in long:
        parts = name.split(".")
        for i in range(1, len(parts)):
            if parts[i - 1] not in WRAPPERS:
                break
            if ".".join(parts[i:]) in short:
                counts[".".join(parts[:i]) + "."] += 1
    return counts
