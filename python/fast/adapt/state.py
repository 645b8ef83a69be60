"""Nested states of tensors and plain values: compare two, take out the tensors, shard them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fast import dtensor
from fast.adapt.config import AdaptConfig
from fast.data.dataset import Data
from fast.data.source_inputs import SourceInputs
from fast.models.identity import data_identity

State = dict[str, Any]
RUN = "run"  # the part of a state that says what is adapted, and how
HASH = "(hash)"
TRAINING_DATA = f"training data {HASH}"


def run_facts(config: AdaptConfig, data: Data, source: SourceInputs | None) -> State:
    """The options that decide what is computed, and hashes of the data, by names for messages."""
    return {
        **config.computed(),
        "training samples": data.num_samples,
        TRAINING_DATA: data_identity(data),
        f"source inputs {HASH}": data_identity(source) or "none",
    }


def differences(before: State, now: State) -> str:
    """How two runs differ, as `lr was 0.1, is 0.2`; empty where they do not.

    Hashes are named where nothing else differs: that of a loader depends on its batches, say.
    """
    changed = [name for name, value in before.items() if value != now.get(name)]
    plain = [name for name in changed if not name.endswith(HASH)]
    return ", ".join(
        f"{name} was {_shown(before[name])}, is {_shown(now.get(name))}"
        for name in plain or changed
    )


def _shown(value: object) -> str:
    return "the default" if value is None else repr(value)


def check_state(state: Any, own: State, path: str = "state") -> None:
    """Raise ValueError where `state` does not have the form of `own`; the message names the entry.

    Dicts must have the same keys, and tensors the same shapes and dtypes. Plain values may differ,
    but for the `format`, and for what says which run it is.
    """
    if isinstance(state, dict) and state.get("format", own.get("format")) != own.get("format"):
        raise ValueError(
            f"{path} has format {state['format']}, and this version reads {own.get('format')}: "
            "finish the run with the version that it began with"
        )
    if not isinstance(state, dict) or set(state) != set(own):
        names = sorted(map(str, set(state) ^ set(own))) if isinstance(state, dict) else ["all"]
        raise ValueError(
            f"{path} is of another adaptation: {', '.join(names[:3])} on one side only; make the "
            "Adaptation with the same arguments"
        )
    for key, value in own.items():
        where, other = f"{path}.{key}", state[key]
        if key == RUN:
            if changes := differences(dict(other), value):
                raise ValueError(f"{path} is of another run: {changes}")
        elif isinstance(value, dict):
            check_state(other, value, where)
        elif isinstance(value, Tensor):
            form = (list(value.shape), value.dtype)
            theirs = (list(other.shape), other.dtype) if isinstance(other, Tensor) else other
            if form != theirs:
                raise ValueError(f"{where} is {theirs}, and must be {form}: of another network")
        elif isinstance(other, (Tensor, dict)):
            raise ValueError(f"{where} is a {type(other).__name__}, and must be a plain value")


def split_state(state: State, path: str) -> tuple[State, dict[str, Tensor]]:
    """The plain values of a nested state, and its tensors by dotted names."""
    plain: State = {}
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        name = f"{path}.{key}"
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, dict):
            plain[key], inner = split_state(value, name)
            tensors |= inner
        else:
            plain[key] = value
    return plain, tensors


def sharded_as(state: State, own: State) -> State:
    """The state with its whole tensors sharded wherever the tensors of `own` are."""
    return {
        key: sharded_as(state[key], value)
        if isinstance(value, dict)
        else dtensor.as_in(state[key], value)
        for key, value in own.items()
    }


def joined_state(plain: State, tensors: dict[str, Tensor], own: State, path: str) -> State:
    """Put together the state that `split_state` took apart.

    Args:
        own: a state of the same form, which shows where the tensors were.

    Raises:
        KeyError: a tensor or a part of the state is missing.
    """
    state: State = dict(plain)
    for key, value in own.items():
        name = f"{path}.{key}"
        if isinstance(value, Tensor):
            state[key] = tensors[name]
        elif isinstance(value, dict):
            state[key] = joined_state(plain[key], tensors, value, name)
    return state
