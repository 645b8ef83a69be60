"""Checkpoints: safetensors for the tensors, JSON for the rest, complete or not there at all.

A checkpoint is a folder `checkpoint-00000150` of three files. It is written under another name and
renamed when it is complete, and only then is the one before it removed: a run killed in the middle
of a save goes on from the checkpoint before.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from fast.files import atomic_folder

PREFIX = "checkpoint-"
FORMAT = 1


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Save tensors of any layout; tied ones are stored once for each name."""
    save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Raises ValueError, with the file's name, where the file is truncated or no safetensors."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error})") from error


def _flatten(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Optimizer state as named tensors and JSON values."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}

    def put(key: str, value: Any) -> None:
        if isinstance(value, Tensor):
            tensors[key] = value
        elif isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
            for i, v in enumerate(value):
                put(f"{key}.{i}", v)
        else:
            values[key] = value

    for index, entries in state["state"].items():
        for key, value in entries.items():
            put(f"state.{index}.{key}", value)
    groups = []
    for i, group in enumerate(state["param_groups"]):
        plain = {}
        for key, value in group.items():
            if isinstance(value, Tensor):
                tensors[f"group.{i}.{key}"] = value
            elif key != "curvature":  # weights of the job, not state: given again on resume
                plain[key] = value
        groups.append(plain)
    return tensors, {"values": values, "groups": groups}


def _unflatten(optimizer: Optimizer, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    own = optimizer.state_dict()["param_groups"]
    state: dict[int, dict[str, Any]] = {}
    groups = [{**mine, **saved} for mine, saved in zip(own, record["groups"], strict=True)]
    for key, value in [*tensors.items(), *record["values"].items()]:
        kind, index, name = key.split(".", 2)
        if kind == "state":
            state.setdefault(int(index), {})[name] = value
        else:
            groups[int(index)][name] = value
    for group in groups:
        if isinstance(group.get("betas"), list):
            group["betas"] = tuple(group["betas"])
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"rng.cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors["rng.numpy"] = torch.from_numpy(keys.astype(np.int64))  # type: ignore[union-attr]
    version, words, gauss = random.getstate()
    return tensors, {
        "numpy": [name, position, has_gauss, cached],
        "python": [version, list(words), gauss],
    }


def _set_random_state(tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    torch.set_rng_state(tensors["rng.cpu"])
    for i in range(torch.cuda.device_count()):
        if f"rng.cuda.{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"rng.cuda.{i}"], i)
    name, position, has_gauss, cached = values["numpy"]
    keys = tensors["rng.numpy"].numpy().astype(np.uint32)
    np.random.set_state((name, keys, position, has_gauss, cached))
    version, words, gauss = values["python"]
    random.setstate((version, tuple(words), gauss))


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    record: dict[str, Any],
    others: dict[str, Tensor] | None = None,
) -> Path:
    """Save a training state, then remove the checkpoints before it.

    Args:
        folder: of the run.
        record: anything else that JSON can hold; `load_checkpoint` returns it.
        others: further tensors; `load_checkpoint` fills those that it is given.

    Returns:
        the new checkpoint's folder.
    """
    target = folder / f"{PREFIX}{step:08d}"
    if target.exists():
        shutil.rmtree(target)
    state_tensors, state_values = _flatten(optimizer)
    rng_tensors, rng_values = _random_state()
    with atomic_folder(target) as temporary:
        save_tensors(dict(model.state_dict()), temporary / "model.safetensors")
        save_tensors(
            state_tensors | rng_tensors | (others or {}), temporary / "training.safetensors"
        )
        meta = {"format": FORMAT, "step": step, "optimizer": state_values, "rng": rng_values}
        (temporary / "state.json").write_text(json.dumps({**meta, "record": record}))
    for old in list_checkpoints(folder):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)
    return target


def clear_unfinished(folder: Path) -> None:
    """Remove what a run that was killed in the middle of a save has left."""
    for path in folder.glob(f".{PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(p for p in folder.glob(f"{PREFIX}*") if (p / "state.json").is_file())


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    job: dict[str, Any],
    others: dict[str, Tensor] | None = None,
) -> tuple[int, Any]:
    """Restore the newest checkpoint of a run into `model`, `optimizer` and the random generators.

    Args:
        job: facts that must equal those that were saved as `record["job"]`.
        others: the further tensors, filled in place.

    Returns:
        the step it was saved after, and the record saved with it.

    Raises:
        FileNotFoundError: no complete checkpoint there.
        ValueError: a truncated file, or a checkpoint of another model, optimizer or job; nothing is
            changed then.
    """
    found = list_checkpoints(folder)
    if not found:
        raise FileNotFoundError(f"no checkpoint to resume from in {folder}")
    path = found[-1]
    try:
        meta = json.loads((path / "state.json").read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path / 'state.json'} is truncated ({error})") from error
    weights = load_tensors(path / "model.safetensors")
    training = load_tensors(path / "training.safetensors")
    _check_same_model(model, weights, path)
    _check_same_optimizer(optimizer, meta["optimizer"]["groups"], path)
    for name, value in meta["record"]["job"].items():
        if name in job and job[name] != value:  # those of other versions are not known here
            raise ValueError(f"{path} is of another job: {name} {value!r}, here {job[name]!r}")
    model.load_state_dict(weights)
    rng = {k: v for k, v in training.items() if k.startswith("rng.")}
    for key, value in (others or {}).items():
        value.copy_(training.pop(key))
    state = {k: v for k, v in training.items() if k not in rng}
    _unflatten(optimizer, state, meta["optimizer"])
    _set_random_state(rng, meta["rng"])
    return meta["step"], meta["record"]


def _check_same_optimizer(optimizer: Optimizer, saved: list[dict[str, Any]], path: Path) -> None:
    sizes = [len(g["params"]) for g in optimizer.param_groups]
    if sizes != (found := [len(g["params"]) for g in saved]):
        raise ValueError(
            f"{path} was saved with {found} trained parameters per group, the model has {sizes}: "
            "freeze the same layers"
        )


def _check_same_model(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    own = model.state_dict()
    wrong = [k for k in own if k not in weights] + [k for k in weights if k not in own]
    wrong += [k for k in own if k in weights and own[k].shape != weights[k].shape]
    if wrong:
        raise ValueError(
            f"{path} is a checkpoint of another model: {len(wrong)} entries differ, "
            f"first {', '.join(wrong[:3])}"
        )
