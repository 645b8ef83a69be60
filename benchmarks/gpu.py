"""Timing on a GPU, and what the figures of a report belong to.

With `--dry-run` a script goes the same way on the CPU, with tiny sizes: its figures mean nothing,
but it will not stop at its first contact with a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.common import RESULTS, Record, commit

Step = Callable[[], object]
_dry = False


def device() -> str:
    return "cpu" if _dry else "cuda"


def arguments(doc: str | None, rounds: int, output: str) -> argparse.ArgumentParser:
    """A parser with --rounds, --output and --dry-run."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--output", type=Path, default=RESULTS / output)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments; stops where there is no GPU, unless this is a dry run.

    From then on all of a dry run is on the CPU. What it measures is only kept where --output says:
    it is no result.
    """
    global _dry
    args = parser.parse_args()
    _dry = args.dry_run
    if not _dry and not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device; torch finds none")
    if _dry and args.output == parser.get_default("output"):
        args.output = Path(os.devnull)
    return args


def write(report: Record, output: Path) -> None:
    output.write_text(json.dumps(report, indent=1) + "\n")


def graphed(step: Step) -> Step:
    """`step` as a graph: what the device needs, without the host."""
    if _dry:
        return step
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
    if _dry:
        return {name: 1e3 * _seconds(step) for name, step in steps.items()}
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


def _seconds(step: Step) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def copy_bandwidth(rounds: int) -> float:
    """GB/s of a copy of 1 GiB, read and write counted: the yardstick."""
    a, b = (torch.zeros(2**10 if _dry else 2**28, device=device()) for _ in range(2))
    ms = interleaved({"copy": lambda: b.copy_(a)}, rounds)["copy"]
    return 2 * a.nbytes / ms / 1e6


def where() -> Record:
    """What the figures of a report belong to."""
    return {
        "device": "none: a dry run" if _dry else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit(),
    }
