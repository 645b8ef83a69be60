"""The update on a GPU: GB/s of every variant of Triton and CUDA C++, beside torch and a plain copy.

    python -m benchmarks.kernels.gpu_update [--sets resnet50 bert_base] [--variants "whole fp32"]

Bytes are counted once for each stream read and once for each written; the norm pass of clipping
counts the gradients once more. Methods take turns inside each round, each behind a pass over a
buffer larger than the L2; times are CUDA events around captured graphs (and around eager calls, to
show what the host costs), medians. Every variant's result is checked against the reference first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import fastkernels
from benchmarks import gpu
from benchmarks.common import Record
from benchmarks.gpu import Step
from benchmarks.kernels.shapes import SETS as SHAPES
from benchmarks.kernels.shapes import Shapes
from fastkernels.codes import code_scales
from fastkernels.op import ENVIRONMENT

BF16, CODES, F32 = torch.bfloat16, torch.uint8, torch.float32
SETS: dict[str, Callable[[], Shapes]] = {**SHAPES, "one_100m": lambda: [(100_000_000,)]}
TINY: Shapes = [(3, 5), (700,), (16385,)]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The dtypes of what a step keeps beside the parameters, and what else it computes.

    Attributes:
        exact: parameters are bf16 with remainders, otherwise float32.
    """

    moments: torch.dtype = F32
    anchor: torch.dtype | None = None
    curvature: torch.dtype | None = None
    clip: bool = False
    stats: bool = False
    exact: bool = False


VARIANTS = {
    "adamw": Variant(),
    "anchor": Variant(anchor=F32),
    "anchor+curvature+stats": Variant(anchor=F32, curvature=F32, stats=True),
    "whole fp32": Variant(anchor=F32, curvature=F32, clip=True, stats=True),
    "whole bf16": Variant(moments=BF16, anchor=BF16, curvature=BF16, clip=True, stats=True),
    "whole 8-bit": Variant(moments=CODES, anchor=BF16, curvature=CODES, clip=True, stats=True),
    "whole bf16 exact": Variant(
        moments=BF16, anchor=BF16, curvature=CODES, clip=True, stats=True, exact=True
    ),
}


class Case:
    """Tensors of one variant on one set of shapes, and a step of them."""

    def __init__(self, shapes: Shapes, variant: Variant) -> None:
        moment, anchor, curvature = variant.moments, variant.anchor, variant.curvature
        torch.manual_seed(0)
        sizes = [torch.Size(s).numel() for s in shapes]
        device = gpu.device()
        dtype = BF16 if variant.exact else F32

        def filled(kind: torch.dtype, scale: float = 1.0) -> list[torch.Tensor]:
            if kind == CODES:
                return [torch.randint(1, 200, (n,), dtype=CODES, device=device) for n in sizes]
            return [(torch.rand(n, device=device) * scale).to(kind) for n in sizes]

        def scales(kind: torch.dtype | None) -> list[torch.Tensor]:
            if kind != CODES:
                return []
            return [torch.full((code_scales(n),), 1e-8, device=device) for n in sizes]

        self.params, self.grads = filled(dtype), filled(dtype)
        moments = [filled(moment), filled(moment)]
        self.steps = [torch.zeros((), device=device) for _ in sizes]
        hyper = [[1e-3, 0.9, 0.999, 1e-8, 0.01, 0.1, 0.0]]
        self.stats = torch.zeros(4, dtype=torch.float64, device=device) if variant.stats else None
        self.arguments = (
            self.params, self.grads, *moments, self.steps,
            torch.tensor(hyper, dtype=torch.float64, device=device), [0] * len(sizes),
        )  # fmt: skip
        self.options = {
            "anchors": filled(anchor) if anchor else [],
            "curvature": filled(curvature, 10.0) if curvature else [],
            "curvature_scales": scales(curvature),
            "exp_avg_scales": scales(moment),
            "exp_avg_sq_scales": scales(moment),
            "remainders": [p.to(torch.int16).zero_() for p in self.params] if variant.exact else [],
            "max_grad_norm": 1.0 if variant.clip else None,
            "stats": self.stats,
        }
        p, g, m = dtype.itemsize, dtype.itemsize, moment.itemsize
        read_only = sum(x.itemsize for x in (anchor, curvature) if x)
        split = 4 if variant.exact else 0
        coded = 4 / 128
        per_block = coded * (4 * (moment == CODES) + (curvature == CODES))
        each = 2 * p + g * (2 if variant.clip else 1) + 4 * m + read_only + split + per_block
        self.bytes = each * sum(sizes)

    def step(self) -> None:
        fastkernels.anchored_adamw_(*self.arguments, **self.options)


def force(backend: str) -> None:
    os.environ[ENVIRONMENT] = backend


def wrong(shapes: Shapes, variant: Variant, backend: str) -> str:
    """Where `backend` differs from the reference after two steps, or "".

    On small tensors and the largest, parameters have to agree within a fiftieth of lr (bfloat16: a
    hundredth of themselves), and the figures within a thousandth.
    """
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


def torch_steps(shapes: Shapes) -> dict[str, Step]:
    """torch's own AdamW, capturable, without clip, anchor or norms."""
    steps: dict[str, Step] = {}
    for name in ("fused", "foreach"):
        params = [torch.nn.Parameter(torch.rand(s, device=gpu.device())) for s in shapes]
        for p in params:
            p.grad = torch.rand_like(p)
        graphs = gpu.device() == "cuda"
        optimizer = torch.optim.AdamW(params, lr=1e-3, capturable=graphs, **{name: True})
        steps[f"torch {name}"] = optimizer.step
    return steps


def measure(
    name: str, shapes: Shapes, variants: list[str], backends: list[str], rounds: int, copy: float
) -> Iterator[Record]:
    """The rows of each variant as they come."""
    count = sum(torch.Size(s).numel() for s in shapes)
    for label in variants:
        variant = VARIANTS[label]
        steps: dict[str, Step] = torch_steps(shapes)
        cases, errors = {}, {}
        for backend in backends:
            errors[backend] = wrong(shapes, variant, backend)
            force(backend)
            cases[backend] = Case(shapes, variant)
            steps[backend] = cases[backend].step
        eager: dict[str, float] = {}
        for backend, step in steps.items():
            force(backend if backend in cases else backends[0])
            eager |= gpu.interleaved({backend: step}, max(5, rounds // 5))
        graphs = {}
        for backend, step in steps.items():
            force(backend if backend in cases else backends[0])
            graphs[backend] = gpu.graphed(step)
        for method, ms in gpu.interleaved(graphs, rounds).items():
            size = cases[method].bytes if method in cases else 28.0 * count
            gbs = size / ms / 1e6
            row: Record = {"set": name, "variant": label, "method": method, "parameters": count}
            row |= {"ms": ms, "ms_eager": eager[method], "gb_per_s": gbs, "of_copy": gbs / copy}
            row["wrong"] = errors.get(method, "")
            yield row
            print(f"{name:9} {label:24} {method:14} {ms:8.3f} ms (eager {eager[method]:8.3f}) "
                  f"{gbs:7.0f} GB/s {gbs / copy:5.1%} of copy {row['wrong'][:60]}",
                  flush=True)  # fmt: skip
        del steps, cases, graphs
        torch.cuda.empty_cache()


def main() -> None:
    parser = gpu.arguments(__doc__, rounds=50, output="gpu_update.json")
    parser.add_argument(
        "--sets", nargs="+", choices=SETS, default=["resnet50", "bert_base", "one_25m"]
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    args = gpu.parse(parser)
    rows = fastkernels.explain()
    backends = sorted({r.backend for r in rows if r.device == gpu.device() and r.available
                       and r.op == "anchored_adamw_"} - {"reference"})  # fmt: skip
    copy = gpu.copy_bandwidth(args.rounds)
    report = gpu.where() | {"rounds": args.rounds, "copy_gb_per_s": copy, "results": []}
    print(f"{report['device']}: copy {copy:.0f} GB/s; backends {', '.join(backends)}")
    for name in args.sets:
        shapes = TINY if args.dry_run else SETS[name]()
        for row in measure(name, shapes, args.variants, backends, args.rounds, copy):
            report["results"].append(row)
            gpu.write(report, args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
