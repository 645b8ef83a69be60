"""The update on a GPU: GB/s of every variant of Triton and CUDA C++, beside torch and a plain copy.

    python benchmarks/gpu_update.py [--rounds 50] [--sets resnet50 bert_base] [--output FILE]

Bytes are counted once for each stream read and once for each written; the norm pass of clipping
counts the gradients once more. Methods take turns inside each round, each behind a pass over a
buffer larger than the L2; times are CUDA events around captured graphs (and around eager calls, to
show what the host costs), medians. Every variant's result is checked against the reference first.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastkernels
from benchmarks.common import RESULTS
from benchmarks.kernels.shapes import SETS as SHAPES
from benchmarks.kernels.shapes import Shapes
from fastkernels.codes import code_scales
from fastkernels.op import ENVIRONMENT

Step = Callable[[], object]
BF16, CODES, F32 = torch.bfloat16, torch.uint8, torch.float32


SETS: dict[str, Callable[[], Shapes]] = {
    **SHAPES,
    "one_100m": lambda: [(100_000_000,)],
}

# name: (moment, anchor, curvature dtypes; norm clip; stats; bf16 parameters with remainders)
VARIANTS: dict[str, tuple[Any, Any, Any, bool, bool, bool]] = {
    "adamw": (F32, None, None, False, False, False),
    "anchor": (F32, F32, None, False, False, False),
    "anchor+curvature+stats": (F32, F32, F32, False, True, False),
    "whole fp32": (F32, F32, F32, True, True, False),
    "whole bf16": (BF16, BF16, BF16, True, True, False),
    "whole 8-bit": (CODES, BF16, CODES, True, True, False),
    "whole bf16 exact": (BF16, BF16, CODES, True, True, True),
}


class Case:
    """Tensors of one variant on one set of shapes, and a step of them."""

    def __init__(self, shapes: Shapes, variant: str) -> None:
        moment, anchor, curvature, clip, stats, exact = VARIANTS[variant]
        torch.manual_seed(0)
        sizes = [torch.Size(s).numel() for s in shapes]
        dtype = BF16 if exact else F32

        def filled(kind: torch.dtype, scale: float = 1.0) -> list[torch.Tensor]:
            if kind == CODES:
                return [torch.randint(1, 200, (n,), dtype=CODES, device="cuda") for n in sizes]
            return [(torch.rand(n, device="cuda") * scale).to(kind) for n in sizes]

        def scales(kind: torch.dtype | None) -> list[torch.Tensor]:
            if kind != CODES:
                return []
            return [torch.full((code_scales(n),), 1e-8, device="cuda") for n in sizes]

        self.params, self.grads = filled(dtype), filled(dtype)
        moments = [filled(moment), filled(moment)]
        self.steps = [torch.zeros((), device="cuda") for _ in sizes]
        hyper = [[1e-3, 0.9, 0.999, 1e-8, 0.01, 0.1, 0.0]]
        self.stats = torch.zeros(4, dtype=torch.float64, device="cuda") if stats else None
        self.arguments = (
            self.params, self.grads, *moments, self.steps,
            torch.tensor(hyper, dtype=torch.float64, device="cuda"), [0] * len(sizes),
        )  # fmt: skip
        self.options = {
            "anchors": filled(anchor) if anchor else [],
            "curvature": filled(curvature, 10.0) if curvature else [],
            "curvature_scales": scales(curvature),
            "exp_avg_scales": scales(moment),
            "exp_avg_sq_scales": scales(moment),
            "remainders": [p.to(torch.int16).zero_() for p in self.params] if exact else [],
            "max_grad_norm": 1.0 if clip else None,
            "stats": self.stats,
        }
        p, g, m = dtype.itemsize, dtype.itemsize, moment.itemsize
        read_only = sum(x.itemsize for x in (anchor, curvature) if x)
        split = 4 if exact else 0
        coded = 4 / 128
        per_block = coded * (4 * (moment == CODES) + (curvature == CODES))
        each = 2 * p + g * (2 if clip else 1) + 4 * m + read_only + split + per_block
        self.bytes = each * sum(sizes)

    def step(self) -> None:
        fastkernels.anchored_adamw_(*self.arguments, **self.options)


def force(backend: str) -> None:
    os.environ[ENVIRONMENT] = backend


def wrong(shapes: Shapes, variant: str, backend: str) -> str:
    """What `backend` does otherwise than the reference, or "": parameters have to agree within a
    fiftieth of lr (bfloat16: of themselves), and figures, on small tensors and the largest."""
    by_size = sorted(shapes, key=lambda s: torch.Size(s).numel())
    some = [*by_size[:40], by_size[-1]]
    cases = []
    for name in (backend, "reference"):
        force(name)
        case = Case(some, variant)
        for _ in range(2):
            case.step()
        cases.append(case)
    rtol = 1e-2 if cases[0].params[0].dtype == BF16 else 0.0
    try:
        for ours, theirs in zip(cases[0].params, cases[1].params, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=2e-5)
        if cases[0].stats is not None:
            torch.testing.assert_close(cases[0].stats, cases[1].stats, rtol=1e-3, atol=0)
    except AssertionError as error:
        return " ".join(str(error).split())
    return ""


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


def torch_steps(shapes: Shapes) -> dict[str, Step]:
    """torch's own AdamW, capturable, without clip, anchor or norms."""
    steps: dict[str, Step] = {}
    for name in ("fused", "foreach"):
        params = [torch.nn.Parameter(torch.rand(s, device="cuda")) for s in shapes]
        for p in params:
            p.grad = torch.rand_like(p)
        optimizer = torch.optim.AdamW(params, lr=1e-3, capturable=True, **{name: True})
        steps[f"torch {name}"] = optimizer.step
    return steps


def copy_bandwidth(rounds: int) -> float:
    """GB/s of a copy of 1 GiB, read and write counted: the yardstick."""
    a, b = (torch.zeros(2**28, device="cuda") for _ in range(2))
    ms = interleaved({"copy": lambda: b.copy_(a)}, rounds)["copy"]
    return 2 * a.nbytes / ms / 1e6


def measure(name: str, backends: list[str], rounds: int, copy: float) -> list[dict[str, Any]]:
    shapes = SETS[name]()
    count = sum(torch.Size(s).numel() for s in shapes)
    rows: list[dict[str, Any]] = []
    for variant in VARIANTS:
        steps: dict[str, Step] = torch_steps(shapes)
        cases, errors = {}, {}
        for backend in backends:
            errors[backend] = wrong(shapes, variant, backend)
            force(backend)
            cases[backend] = Case(shapes, variant)
            steps[f"{backend}"] = cases[backend].step
        eager: dict[str, float] = {}
        for backend, step in steps.items():
            force(backend if backend in cases else "triton")
            eager |= interleaved({backend: step}, max(5, rounds // 5))
        graphs = {}
        for backend, step in steps.items():
            force(backend if backend in cases else "triton")
            graphs[backend] = graphed(step)
        for method, ms in interleaved(graphs, rounds).items():
            size = cases[method].bytes if method in cases else 28.0 * count
            gbs = size / ms / 1e6
            row = {"set": name, "variant": variant, "method": method, "parameters": count}
            row |= {"ms": ms, "ms_eager": eager[method], "gb_per_s": gbs, "of_copy": gbs / copy}
            row["wrong"] = errors.get(method, "")
            rows.append(row)
            print(f"{name:9} {variant:24} {method:14} {ms:8.3f} ms (eager {eager[method]:8.3f}) "
                  f"{gbs:7.0f} GB/s {gbs / copy:5.1%} of copy {row['wrong'][:60]}",
                  flush=True)  # fmt: skip
        del steps, cases, graphs
        torch.cuda.empty_cache()
    return rows


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def where() -> dict[str, Any]:
    """What the figures of a report belong to."""
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument(
        "--sets", nargs="+", choices=SETS, default=["resnet50", "bert_base", "one_25m"]
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu_update.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_update.py needs a CUDA device; torch finds none")
    rows = fastkernels.explain()
    backends = sorted({r.backend for r in rows if r.device == "cuda" and r.available
                       and r.op == "anchored_adamw_"} - {"reference"})  # fmt: skip
    copy = copy_bandwidth(options.rounds)
    print(f"{torch.cuda.get_device_name()}: copy {copy:.0f} GB/s; backends {', '.join(backends)}")
    report = where() | {
        "rounds": options.rounds,
        "copy_gb_per_s": copy,
        "results": [],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for name in options.sets:
        report["results"] += measure(name, backends, options.rounds, copy)
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
