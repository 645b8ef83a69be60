"""The least time of K products that vendor matrix products leave: theirs alone, and nothing else.

The matrix products that a call makes are noted, and made again with nothing between them: on
tensors of the same shapes and strides, with results in memory that is there already. They are timed
beside the products and one gradient, in the same process and in processor seconds, so that the
ratios survive a busy machine.

    python -m benchmarks.curvature.gemms_alone [--rounds 7] [--save gemms-alone]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import commit, machine, save
from benchmarks.curvature.bench_hvp import LARGEST, LINEAR
from benchmarks.curvature.methods import METHODS, gradient, probes
from benchmarks.curvature.networks import build

NAMES = ("mm", "bmm", "addmm", "baddbmm", "baddbmm_", "_linear_pointwise")
# Products of a new operator are recorded, then traced, and run as code from the third on.
WARM_UP = 3
GRADIENTS = 3  # they are timed for each time of the products


class _Noted(TorchDispatchMode):
    """Notes the matrix products that are made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func._schema.name.partition("::")[2] in NAMES:
            described = pytree.tree_map_only(Tensor, _Layout, (args, kwargs or {}))
            self.calls.append((func, *described))
        return func(*args, **(kwargs or {}))


class _Layout:
    """A tensor without its memory."""

    def __init__(self, t: Tensor):
        self.key = t.shape, t.stride(), t.dtype


def gemms_of(run: Callable[[], object]) -> Callable[[], None]:
    """What makes the matrix products of `run` again, and nothing else."""
    with _Noted() as noted:
        run()
    buffers: dict[Any, Tensor] = {}

    def buffer(place: int, layout: _Layout) -> Tensor:
        key = place, *layout.key
        if key not in buffers:
            shape, stride, dtype = layout.key
            size = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
            buffers[key] = torch.full((size,), 0.01, dtype=dtype).as_strided(shape, stride)
        return buffers[key]

    calls = []
    for func, args, kwargs in noted.calls:
        leaves, tree = pytree.tree_flatten((args, kwargs))
        filled = [buffer(i, t) if isinstance(t, _Layout) else t for i, t in enumerate(leaves)]
        calls.append((func, *pytree.tree_unflatten(filled, tree)))

    @torch.no_grad()
    def again() -> None:
        for func, args, kwargs in calls:
            func(*args, **kwargs)

    return again


def measure(case: str, kind: str, count: int, rounds: int) -> dict[str, float]:
    """Medians in gradients per product, and the share of a gradient that is matrix products."""
    model, x, y = build(case)
    products = METHODS[kind]["fast"](model, x, y, probes(model, count))
    for _ in range(WARM_UP):
        products()
    one_gradient = gradient(model, x, y)
    runs = {
        "gradient": one_gradient,
        "gradient's GEMMs": gemms_of(one_gradient),
        "products": products,
        "GEMMs alone": gemms_of(products),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            for _ in range(GRADIENTS if name.startswith("gradient") else 1):
                start = time.process_time()
                run()
                seconds[name].append(time.process_time() - start)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    one = median["gradient"]
    return {
        "products": median["products"] / (count * one),
        "GEMMs alone": median["GEMMs alone"] / (count * one),
        "share": median["GEMMs alone"] / median["products"],
        "share of the gradient": median["gradient's GEMMs"] / one,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=7, help="times of each (default 7)")
    parser.add_argument("--save", help="name of the table in benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "| network, matrix, K | gradients per product | its matrix products alone | their share "
        "| their share of a gradient |",
        "| --- | --- | --- | --- | --- |",
    ]
    for case in LINEAR:
        for kind in METHODS:
            row = measure(case, kind, LARGEST[case], options.rounds)
            lines.append(
                f"| {case}, {kind}, {LARGEST[case]} | {row['products']:.2f} "
                f"| {row['GEMMs alone']:.2f} | {row['share']:.0%} "
                f"| {row['share of the gradient']:.0%} |"
            )
    lines += ["", f"{machine()}; commit {commit()}; medians of {options.rounds} rounds."]
    print("\n".join(lines))
    if options.save:
        save(options.save, lines)


if __name__ == "__main__":
    main()
