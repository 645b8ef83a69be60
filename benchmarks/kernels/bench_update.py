"""The regularised update against torch's optimizers, other libraries' and what users write.

    pytest --benchmark                             resnet50, one tensor of 25M, 2000 tensors of 1k
    pytest --benchmark -m ""                       also BERT-base, and what takes minutes to compile
    pytest --benchmark -k "resnet50 and ours"      some; torch's fused AdamW is always among them
    OMP_NUM_THREADS=1 pytest --benchmark           one thread

Every method is held to a float64 step before it is timed. The methods of a set run in turn, round
by round, on the same tensors; ratios are medians of the ratios within a round.
`--benchmark-max-time` is the time of a set per method, `--benchmark-min-rounds` the least rounds.
`python -m benchmarks.report` makes a table of the JSON (`--benchmark-json`).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from benchmarks.kernels import peers
from benchmarks.kernels.handwritten import USERS
from benchmarks.kernels.interleaved import Rounds
from benchmarks.kernels.methods import Method, Missing, ours, torch_compile, torchs
from benchmarks.kernels.shapes import SETS, Shapes
from benchmarks.kernels.streams import StreamWalk, compiler
from benchmarks.kernels.tensors import LR, Tensors, Update, checked

BASE = "torch fused"
ANCHOR, CURVATURE = Update(pull="proximal"), Update(pull="proximal", curvature=True)
WHOLE = Update(pull="proximal", curvature=True, clip=True)
BF16 = {k: torch.bfloat16 for k in ("state_dtype", "anchor_dtype", "curvature_dtype")}
BYTES = BF16 | {k: torch.uint8 for k in ("state_dtype", "curvature_dtype")}

METHODS: dict[str, Callable[[Tensors], Method]] = {
    BASE: torchs(fused=True),
    "torch foreach": torchs(foreach=True),
    "torch for-loop": torchs(foreach=False),
    "torch.compile of foreach": torch_compile,
    "DeepSpeed CPUAdam": peers.deepspeed,
    "torchao _AdamW": peers.torchao("_AdamW", 1e-3),
    "torchao AdamW8bit": peers.torchao("AdamW8bit", peers.EIGHT_BIT),
    "bitsandbytes AdamW": peers.bitsandbytes(32, 1e-3),
    **USERS,
    "ours: AdamW": ours(Update()),
    "ours: + anchor": ours(ANCHOR),
    "ours: + anchor + curvature + norms": ours(CURVATURE),
    "ours: whole job": ours(WHOLE),
    "ours: AdamW, bf16 state": ours(Update(), 2e-2, state_dtype=torch.bfloat16),
    "ours: whole job, bf16 state": ours(WHOLE, 2e-2, **BF16),
    "ours: whole job, 8-bit state": ours(WHOLE, peers.EIGHT_BIT, **BYTES),
}
SLOW = {"torch.compile of foreach", "torchao _AdamW", "torchao AdamW8bit"}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A set that was measured: `floors` names the floor of each method, and `reasons` says why one
    is missing."""

    tensors: Tensors
    methods: dict[str, Method]
    rounds: Rounds
    floors: dict[str, str]
    errors: dict[str, float]
    first_calls: dict[str, float]
    reasons: dict[str, str]


def check(tensors: Tensors, method: Method) -> tuple[float, float]:
    """Largest error of a weight after one step, as a share of lr; seconds of the first call."""
    tensors.refresh()
    method.reset()
    truth, norm = tensors.expected(method.update), tensors.grad_norm()
    begin = time.perf_counter()
    method.step()
    seconds = time.perf_counter() - begin
    pairs = zip(tensors.values, truth, strict=True)
    error = max((checked(w) - x).abs().max().item() for w, x in pairs) / LR
    assert error <= method.tolerance, f"wrong by {error:.1e} lr after one step"
    method.check(norm)
    return error, seconds


def floor(method: Method) -> tuple[str, Callable[[], object]]:
    """What touches the same memory and computes nothing, and its name."""
    walks, names = [], []
    for streams in method.passes:
        widths = [tensors[0].element_size() for tensors, _ in streams]
        written = [w for _, w in streams]
        walks.append(StreamWalk(streams))
        names.append(" ".join(f"{w}{'rw' if rw else 'r'}" for w, rw in zip(widths, written)))  # noqa: B905
    threads = torch.get_num_threads()
    return "floor: " + ", ".join(names), lambda: [walk.run(threads) for walk in walks]


def measure(shapes: Shapes, names: list[str], seconds: float, least: int) -> Measurement:
    tensors = Tensors(shapes)
    methods: dict[str, Method] = {}
    errors, first_calls, reasons, floors = {}, {}, {}, {}
    steps: dict[str, Callable[[], object]] = {}
    for name in dict.fromkeys([BASE, *names]):
        try:
            method = METHODS[name](tensors)
        except Missing as missing:
            reasons[name] = str(missing)
            continue
        errors[name], first_calls[name] = check(tensors, method)
        methods[name], steps[name] = method, method.step
        if compiler():
            floors[name], walk = floor(method)
            steps.setdefault(floors[name], walk)
    for step in steps.values():
        step()
    rounds = Rounds(steps, seconds * len(steps), least)
    return Measurement(
        tensors=tensors,
        methods=methods,
        rounds=rounds,
        floors=floors,
        errors=errors,
        first_calls=first_calls,
        reasons=reasons,
    )


@pytest.fixture(
    scope="module",
    params=[pytest.param(s, marks=pytest.mark.slow if s == "bert_base" else ()) for s in SETS],
)
def group(request: pytest.FixtureRequest) -> Iterator[tuple[str, Measurement]]:
    calls = [getattr(item, "callspec", None) for item in request.session.items]
    names = [
        c.params["name"]
        for c in calls
        if c and c.params.get("group") == request.param and "name" in c.params
    ]
    seconds = float(request.config.getoption("benchmark_max_time"))
    least = int(request.config.getoption("benchmark_min_rounds"))
    yield request.param, measure(SETS[request.param](), names, seconds, least)
    gc.collect()


class Clock:
    """Plays measured times back to pytest-benchmark, which has no interleaved rounds of its own."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, 0
        self.durations: list[float] = []

    def load(self, durations: list[float]) -> None:
        self.calls, self.durations = 0, durations

    def __call__(self) -> float:
        if self.calls // 2 >= len(self.durations):
            return time.perf_counter()
        self.now += self.durations[self.calls // 2] if self.calls % 2 else 0.0
        self.calls += 1
        return self.now


clock = Clock()


@pytest.mark.filterwarnings("default")
@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in METHODS]
)
def bench_update(benchmark: Any, group: tuple[str, Measurement], name: str) -> None:
    label, measurement = group
    if name in measurement.reasons:
        pytest.skip(measurement.reasons[name])
    rounds, method = measurement.rounds, measurement.methods[name]
    elements = measurement.tensors.elements
    walls, threads = rounds.wall(name), torch.get_num_threads()
    benchmark.group = f"update, {label}, {threads} threads"
    clock.load(walls)
    benchmark.pedantic(lambda: None, rounds=len(walls), iterations=1)

    streams = [(t[0].element_size(), written) for p in method.passes for t, written in p]
    read = sum(width for width, _ in streams)
    bytes_moved = read + sum(width for width, written in streams if written)
    seconds = benchmark.stats.stats.median
    info = benchmark.extra_info
    info |= {
        "set": label,
        "method": name,
        "threads": threads,
        "tensors": len(measurement.tensors.params),
        "elements": elements,
        "bytes_read": read,
        "bytes_moved": bytes_moved,
        "gb_read_per_s": read * elements / seconds / 1e9,
        "gb_moved_per_s": bytes_moved * elements / seconds / 1e9,
        "to_fused": rounds.ratio(name, BASE),
        "cpu_ms": rounds.cpu(name) * 1e3,
        "cpu_to_fused": rounds.cpu_ratio(name, BASE),
        "error_lr": measurement.errors[name],
        "first_call_s": measurement.first_calls[name],
        "rounds": len(rounds.all),
        "quiet_rounds": rounds.quiet_count,
        "only_quiet": rounds.only_quiet,
        "others": rounds.others(),
    }
    if name in measurement.floors:
        base = measurement.floors[name]
        info |= {"floor": base, "floor_ms": sorted(rounds.wall(base))[len(walls) // 2] * 1e3}
        info |= {"to_floor": rounds.ratio(name, base), "cpu_to_floor": rounds.cpu_ratio(name, base)}
