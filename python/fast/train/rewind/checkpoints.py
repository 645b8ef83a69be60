"""Read two checkpoints of one architecture into one network that answers both tasks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fast.errors import some
from fast.heads import Head, fold_head, set_batch_norm, task_head, unwrap
from fast.heads.find import layer_like
from fast.heads.replace import put_head
from fast.models.saved.description import announced_classes, classes_beside
from fast.models.saved.files import WEIGHT_FILES
from fast.models.weights import lacking, load_weights, matched, read_state
from fast.tensor_files import load_into

Checkpoint = nn.Module | Mapping[str, Tensor] | str | Path


def base_network(base: Checkpoint, model: nn.Module | None) -> nn.Module:
    """A copy of the network before it was fine-tuned.

    Args:
        base: the network, its state dict, or a file that holds one.
        model: the architecture, where `base` is not a network.

    Raises:
        TypeError: `base` is no checkpoint.
        ValueError: there is no architecture, or the weights do not fit it.
    """
    if isinstance(base, nn.Module):
        return _plain(base)
    if not isinstance(model, nn.Module):
        raise ValueError(
            "model must be given, the network that the weights are of, as base is no network "
            f"but a {type(base).__name__}: fast.rewind(base, tuned, ..., model=resnet20())"
        )
    network = _plain(model)
    if isinstance(base, (str, Path)):
        load_weights(network, weight_file(base, "base"))
        return network
    state = _state(base, network, "base")
    _check_fits(state, network.state_dict(), "base")
    load_into(network, state, strict=False)
    return network


def tuned_state(tuned: Checkpoint, network: nn.Module, head: Head) -> tuple[dict[str, Tensor], str]:
    """The weights after fine-tuning, under the names that they have in `network`.

    The head may have had another name.

    Returns:
        the state, and a note on what was guessed; empty where nothing was.

    Raises:
        TypeError: `tuned` is no checkpoint.
        ValueError: it belongs to another architecture.
    """
    state = _state(tuned, network, "tuned")
    own = network.state_dict()
    prefix = f"{head.name}."
    places = tuple(f"{name}." for _, _, name in head.places)
    _check_fits(state, {n: x for n, x in own.items() if not n.startswith(places)}, "tuned")
    note = ""
    if f"{prefix}weight" not in state:
        state, note = _renamed_head(state, own, head)
    weight = state[f"{prefix}weight"]
    like = head.module.weight
    if weight.dim() != like.dim() or weight.shape[1:] != like.shape[1:]:
        raise ValueError(
            f"tuned: its head {head.name} is {tuple(weight.shape)}, base's {tuple(like.shape)}: "
            "both must take the same features"
        )
    return state, note


def classes_of_checkpoint(tuned: Checkpoint) -> list[str] | None:
    """The names of the classes that come with a checkpoint; None where none do."""
    if isinstance(tuned, nn.Module):
        return announced_classes(tuned)
    return classes_beside(tuned) if isinstance(tuned, (str, Path)) else None


def both(network: nn.Module, state: dict[str, Tensor], sample: Any, head: Head) -> nn.Module:
    """Let `network` answer the task of `state`, and inside `fast.source_task` its own.

    Each task has its own head and batch norms; all else is shared, and has the weights of `state`.
    """
    prefix = f"{head.name}."
    of_head = {n.removeprefix(prefix): x for n, x in state.items() if n.startswith(prefix)}
    classes = len(of_head["weight"])
    set_batch_norm(network, "per_task")
    put_head(network, classes, sample=sample, max_entropy=False, head=head.name)
    new = task_head(network)
    assert new is not None
    new.linear = layer_like(head.module, classes, bias="bias" in of_head)
    new.linear.load_state_dict(of_head)
    rest = {n: x for n, x in state.items() if not n.startswith(prefix)}
    load_into(network, rest, strict=False)
    return network


def weight_file(path: str | Path, name: str) -> Path:
    """The file of the weights: the path itself, or the file in this folder.

    Args:
        name: base or tuned, for messages.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        files = [path / file for file in WEIGHT_FILES if (path / file).is_file()]
        if not files:
            raise FileNotFoundError(f"{name} {path}: has neither {' nor '.join(WEIGHT_FILES)}")
        return files[0]
    if not path.is_file():
        raise FileNotFoundError(f"{name} {path}: no such file")
    return path


def _plain(model: nn.Module) -> nn.Module:
    """A copy of the network without the modules that FAST, PEFT or a wrapper has added."""
    model = copy.deepcopy(unwrap(model))
    merge = getattr(model, "merge_and_unload", None)
    if callable(merge):  # LoRA by PEFT
        model = merge()
    return fold_head(model)


def _state(checkpoint: Checkpoint, network: nn.Module, name: str) -> dict[str, Tensor]:
    """The state dict of a checkpoint, under the names that it has in `network`."""
    if isinstance(checkpoint, nn.Module):
        state, where = _plain(checkpoint).state_dict(), Path(name)
    elif isinstance(checkpoint, Mapping):
        state, where = dict(checkpoint), Path(name)
        if not state or not all(isinstance(x, Tensor) for x in state.values()):
            raise TypeError(f"{name}: a state dict holds tensors, by their names")
    elif isinstance(checkpoint, (str, Path)):
        where = weight_file(checkpoint, name)
        state, _ = read_state(where)
    else:
        raise TypeError(
            f"{name} must be a network, a state dict or a file; got {type(checkpoint).__name__}"
        )
    state, _ = matched(state, network.state_dict(), where)
    check_finite(state, name)
    return state


def check_finite(state: Mapping[str, Tensor], name: str) -> None:
    """Raise ValueError where weights of the checkpoint `name` are NaN or infinite."""
    bad = [n for n, x in state.items() if x.is_floating_point() and not x.isfinite().all()]
    if bad:
        raise ValueError(f"{name}: weights that are NaN or infinite: {some(bad)}")


def _check_fits(state: dict[str, Tensor], own: dict[str, Tensor], name: str) -> None:
    missing = lacking(state, own)
    shapes = [
        f"{n} is {tuple(state[n].shape)}, base's {tuple(x.shape)}"
        for n, x in own.items()
        if n in state and state[n].shape != x.shape
    ]
    if missing or shapes:
        what = f"lacks {some(missing, 4)}" if missing else some(shapes, 4, "; ")
        raise ValueError(
            f"{name}: is of another architecture: {what}. Both must be of one network; only the "
            "heads may differ"
        )


def _renamed_head(
    state: dict[str, Tensor], own: dict[str, Tensor], head: Head
) -> tuple[dict[str, Tensor], str]:
    """The state with its head under the name that the network's head has."""
    features = head.module.weight.shape[1:]
    weights = [
        n
        for n, x in state.items()
        if n not in own and n.endswith("weight") and x.shape[1:] == features
    ]
    if len(weights) != 1:
        what = f"several could be it: {some(weights)}" if weights else "nothing could be it"
        raise ValueError(
            f"tuned: has no {head.name}.weight, which is the head of the network, and {what}; "
            f"rename its head's weight to {head.name}.weight"
        )
    old = weights[0].removesuffix("weight")
    names = {f"{old}{part}": f"{head.name}.{part}" for part in ("weight", "bias")}
    note = f"tuned: its {old}weight is taken for the head, {head.name}.weight"
    return {names.get(n, n): x for n, x in state.items()}, note
