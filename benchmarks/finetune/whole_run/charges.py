"""Charges each function of FAST with the time that it and the libraries below it took."""

from __future__ import annotations

import cProfile
import pstats
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fast
import fastkernels

NETWORK, OTHERS = "the network", "others"
# The network's own passes: the calls of its modules, and the backward pass.
PASSES = ("_call_impl", "_wrapped_call_impl", "_engine_run_backward")
OURS = tuple(str(Path(package.__file__).parent) for package in (fast, fastkernels))
ROUNDS = 60  # of passing time on to the callers: the longest chain through the libraries

Function = tuple[str, int, str]


def charges(call: Callable[[], Any]) -> dict[str, float]:
    """Processor seconds of a call by function of FAST, "module.py:name"; `NETWORK` among them.

    What a library function took itself goes to its callers, in the shares in which they were
    charged with it, until it comes to a function of FAST or to a layer of a network.
    """
    profiler = cProfile.Profile(time.process_time)
    profiler.enable()
    call()
    profiler.disable()
    stats: dict[Function, Any] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    owed = {function: figures[2] for function, figures in stats.items()}
    total: dict[str, float] = {NETWORK: 0.0}
    for _ in range(ROUNDS):
        passed = dict.fromkeys(stats, 0.0)
        for function, seconds in owed.items():
            name = charged(function)
            callers = stats[function][4]
            if name is None and callers and seconds:
                whole = sum(edge[2] for edge in callers.values())
                for caller, edge in callers.items():
                    share = edge[2] / whole if whole else 1 / len(callers)
                    passed[caller] += seconds * share
            else:
                name = name or OTHERS
                total[name] = total.get(name, 0.0) + seconds
        owed = passed
        if sum(owed.values()) < 1e-3:
            break
    total[OTHERS] = total.get(OTHERS, 0.0) + sum(owed.values())  # of recursion
    return total


def charged(function: Function) -> str | None:
    """Who pays for it; None: its callers."""
    file, _, name = function
    if name in PASSES:
        return NETWORK
    for folder in OURS:
        if file.startswith(folder):
            return f"{Path(file).relative_to(folder)}:{name}"
    return None
