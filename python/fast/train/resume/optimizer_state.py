"""The state of an optimizer as named tensors and JSON values, and back."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from fast import dtensor


def flatten(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Optimizer state as named tensors and JSON values."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            (tensors if isinstance(value, Tensor) else values)[f"state.{index}.{key}"] = value
    groups = []
    for i, group in enumerate(state["param_groups"]):
        plain = {}
        for key, value in group.items():
            if isinstance(value, Tensor):
                tensors[f"group.{i}.{key}"] = value
            elif key != "curvature":  # an input of the run, not state: it is given again on resume
                plain[key] = value
        groups.append(plain)
    return tensors, {"values": values, "groups": groups}


def unflatten(optimizer: Optimizer, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Load what `flatten` returned into an optimizer over the same parameters.

    The tensors are whole; a sharded parameter takes its shard of them.
    """
    own = optimizer.state_dict()["param_groups"]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    groups = [{**mine, **theirs} for mine, theirs in zip(own, record["groups"], strict=True)]
    for key, value in [*tensors.items(), *record["values"].items()]:
        kind, index, name = key.split(".", 2)
        if kind == "state":
            p = params[int(index)]
            if isinstance(value, Tensor) and value.shape == p.shape:
                value = dtensor.as_in(value, p)
            state.setdefault(int(index), {})[name] = value
        else:
            groups[int(index)][name] = value
    for group in groups:
        if isinstance(group.get("betas"), list):
            group["betas"] = tuple(group["betas"])
    optimizer.load_state_dict({"state": state, "param_groups": groups})
