"""Random generators: find those that data hold, seed them, save their states as JSON."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch

from fast.data.reachable import GENERATORS, Generator, reachable

MT19937_WORDS, PHILOX_BUFFER = 624, 4


def find_generators(**roots: Any) -> dict[str, Generator]:
    """Path -> generator, for all that can be reached from data, a transform or a network."""
    return {
        path: value
        for path, value in reachable(**roots)
        if isinstance(value, GENERATORS) and not isinstance(value, random.SystemRandom)
    }


def state_of(generator: Generator) -> Any:
    """The state of a generator, as JSON has it."""
    if isinstance(generator, torch.Generator):
        return _plain(generator.get_state().numpy())
    if isinstance(generator, np.random.Generator):
        return _plain(generator.bit_generator.state)
    if isinstance(generator, np.random.RandomState):
        return _plain(generator.get_state(legacy=False))
    return _plain(generator.getstate())


def set_state(generator: Generator, state: Any) -> None:
    """Put a generator into a state.

    Raises:
        ValueError, TypeError, KeyError: this is no state of a generator of this kind. (numpy does
            not check the position in it, and would read beyond its memory.)
    """
    value = _restored(state)
    if isinstance(generator, torch.Generator):
        generator.set_state(torch.from_numpy(value))
    elif isinstance(generator, random.Random):
        generator.setstate(value)
    else:
        _check(value)
        if isinstance(generator, np.random.Generator):
            generator.bit_generator.state = value
        else:
            generator.set_state(value)


def reseed(generator: Generator, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        bits.state = type(bits)(seed).state
    else:
        generator.seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch, numpy and `random`, and restore their states after the block.

    Data sets that augment draw from any of the three.
    """
    with held(_of_process().values()):
        seed_process(seed)
        yield


def seed_process(seed: int) -> None:
    """Seed torch, numpy and `random`."""
    torch.manual_seed(seed)  # GPUs that are first used later, too
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def held(generators: Iterable[Generator]) -> Iterator[None]:
    """Restore the states of these generators after the block."""
    states = [(g, state_of(g)) for g in generators]
    try:
        yield
    finally:
        for generator, state in states:
            set_state(generator, state)


def process_generators() -> dict[str, Any]:
    """The states of the process-wide generators: torch's on each device, numpy's and `random`'s."""
    return {name: state_of(generator) for name, generator in _of_process().items()}


def set_process_generators(states: dict[str, Any]) -> None:
    """Restore what `process_generators` returned.

    Raises:
        ValueError, TypeError, KeyError: these are no states.
    """
    for name, generator in _of_process().items():
        if name in states or not name.startswith("cuda"):
            set_state(generator, states[name])


def _of_process() -> dict[str, Generator]:
    gpus = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    return {
        "torch": torch.default_generator,
        "numpy": cast(Any, np.random.get_state).__self__,
        "python": cast(Any, random.getstate).__self__,
    } | {f"cuda:{i}": generator for i, generator in enumerate(gpus)}


def _check(state: dict[str, Any]) -> None:
    inner = state["state"]
    if state["bit_generator"] == "MT19937":
        key, position = inner["key"], inner["pos"]
        if key.shape != (MT19937_WORDS,) or not 0 <= position <= MT19937_WORDS:
            raise ValueError(f"no state of MT19937: {key.shape} words, position {position}")
    elif "buffer_pos" in state and not 0 <= state["buffer_pos"] <= PHILOX_BUFFER:
        raise ValueError(f"no state of Philox: position {state['buffer_pos']}")


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {"array": value.tobytes().hex(), "dtype": str(value.dtype)}
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return {"tuple": [_plain(v) for v in value]}
    return value.item() if isinstance(value, np.generic) else value


def _restored(value: Any) -> Any:
    if isinstance(value, dict) and "array" in value:
        if value["dtype"] not in ("uint8", "uint32", "uint64"):
            raise ValueError(f"no state of a generator: {value['dtype']}")
        return np.frombuffer(bytes.fromhex(value["array"]), value["dtype"]).copy()
    if isinstance(value, dict) and "tuple" in value:
        return tuple(_restored(v) for v in value["tuple"])
    return {k: _restored(v) for k, v in value.items()} if isinstance(value, dict) else value
