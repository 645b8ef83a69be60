"""Timing on a GPU, and what the figures of a report belong to."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.common import RESULTS, Record, commit

Step = Callable[[], object]


def arguments(doc: str | None, rounds: int, output: str) -> argparse.ArgumentParser:
    """A parser with --rounds and --output."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--output", type=Path, default=RESULTS / output)
    return parser


def need_cuda() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device; torch finds none")


def write(report: Record, output: Path) -> None:
    output.write_text(json.dumps(report, indent=1) + "\n")


def graphed(step: Step) -> Step:
    """`step` as a graph: what the device needs, without the host."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def interleaved(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, in turns."""
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 3):
        for name, step in steps.items():
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            step()
            end.record()
            end.synchronize()
            if i >= 3:
                times[name].append(begin.elapsed_time(end))
    return {name: statistics.median(t) for name, t in times.items()}


def copy_bandwidth(rounds: int) -> float:
    """GB/s of a copy of 1 GiB, read and write counted: the yardstick."""
    a, b = (torch.zeros(2**28, device="cuda") for _ in range(2))
    ms = interleaved({"copy": lambda: b.copy_(a)}, rounds)["copy"]
    return 2 * a.nbytes / ms / 1e6


def where() -> Record:
    """What the figures of a report belong to."""
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit(),
    }
