"""The networks in a folder that `Result.save` (or `fast finetune --output`) wrote."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fast.heads.find import Head, HeadLayer, find_head
from fast.heads.replace import announce_classes
from fast.train.checkpoint import load_tensors

SOURCE_NORMS_FILE = "source_norms.safetensors"


@dataclass
class SavedNetworks:
    """Plain networks with the adapted weights; `source` (None: cannot be had, `note` says why) has
    the head, and answers the task, that the network had before."""

    target: nn.Module
    source: nn.Module | None
    note: str = ""


def load_saved(folder: str | Path, model: nn.Module, sample: Any) -> SavedNetworks:
    """Read the networks of a saved run.

    Args:
        folder: with `model.safetensors`, and `source_head.safetensors` beside it; and
            `source_norms.safetensors` where each task had batch norms of its own.
        model: the plain architecture, with a head for any number of classes; becomes the target
            network.
        sample: a batch of inputs, to find the head by.

    Raises:
        FileNotFoundError: no `model.safetensors` there.
        ValueError: the weights are of another network; the message names the first that differ.
    """
    folder = Path(folder)
    file = folder / "model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} has no model.safetensors: not a folder of Result.save or fast finetune"
        )
    head = find_head(model, sample)
    state = load_tensors(file)
    _fit_head(model, head, state, f"{head.name}.", file)
    own = model.state_dict()
    wrong = [n for n in own if n not in state and not n.endswith("num_batches_tracked")]
    wrong += [n for n in state if n not in own or own[n].shape != state[n].shape]
    if wrong:
        raise ValueError(
            f"{file} is of another network: {len(wrong)} tensors differ, first "
            f"{', '.join(wrong[:3])}"
        )
    model.load_state_dict(state, strict=False)
    source_file = folder / "source_head.safetensors"
    if not source_file.is_file():
        return SavedNetworks(model, None, f"{folder} has no source_head.safetensors")
    norms_file = folder / SOURCE_NORMS_FILE
    norms = load_tensors(norms_file) if norms_file.is_file() else {}
    if not norms and _batch_norm_policy(folder) == "per_task":
        why = "the source's batch norm statistics were kept per task, and are not in the folder"
        return SavedNetworks(model, None, f"{folder}: {why}")
    source = copy.deepcopy(model)
    odd = [n for n, t in norms.items() if n not in own or own[n].shape != t.shape]
    if odd:
        raise ValueError(f"{norms_file} is of another network: it has {odd[0]}")
    source.load_state_dict(norms, strict=False)
    old = find_head(source, sample)
    weights = load_tensors(source_file)
    layer = _fit_head(source, old, weights, "", source_file)
    layer.load_state_dict(weights)
    return SavedNetworks(model, source)


def _fit_head(
    model: nn.Module, head: Head, state: dict[str, Tensor], prefix: str, file: Path
) -> HeadLayer:
    """Give `model` a head of the shape that `state` has."""
    weight = state.get(f"{prefix}weight")
    own = head.module.weight
    if weight is None or weight.shape[1:] != own.shape[1:]:
        found = "nothing" if weight is None else list(weight.shape)
        raise ValueError(
            f"{file} does not fit the head {head.name} {list(own.shape)}: it has {found} there"
        )
    bias = f"{prefix}bias" in state
    options: Any = {"bias": bias, "device": own.device, "dtype": own.dtype}
    layer: HeadLayer
    if isinstance(head.module, nn.Conv2d):
        stride: Any = head.module.stride
        layer = nn.Conv2d(weight.shape[1], weight.shape[0], 1, stride, **options)
    else:
        layer = nn.Linear(weight.shape[1], weight.shape[0], **options)
    head.put(layer)
    announce_classes(model, weight.shape[0])
    return layer


def _batch_norm_policy(folder: Path) -> str | None:
    try:
        return json.loads((folder / "config.json").read_text()).get("batch_norm")
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / 'config.json'} is damaged ({error})") from error
