"""What `compile=True` and other arithmetic (`gemm=`) make of products on a cached batch.

    python -m benchmarks.curvature.narrow.compiled [--networks NAMES] [--save]

Times are medians in gradients of the same network, in processor seconds of one thread, all in one
interleaved run: plain code, and the same code by inductor. `seconds` is the wall time of compiling,
on a shared machine. Errors are those of two products, relative to the same products in float64;
TF32 exists on a GPU only. The network runs on a GPU where there is one.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.common import Record, commit, commits, complete, machine, save, table
from benchmarks.curvature import methods
from benchmarks.curvature.narrow.networks import decoder, encoder, mlp, resnet, short_encoder
from benchmarks.curvature.networks import Problem
from fast.curvature import GGN, Hessian

KINDS = {"ggn": GGN, "hessian": Hessian}
COMPILED = {"MLP": mlp, "2 transformer blocks": short_encoder, "ResNet-20, width 4": resnet}
ROUNDED = {
    "MLP": mlp,
    "12 transformer blocks": encoder,
    "ResNet-20, width 4": resnet,
    "12 GPT-2 blocks": decoder,
}
WARM_UPS = 10


def built(make: Callable[[], Problem]) -> Problem:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, x, y = make()
    return model.eval().to(device), x.to(device), y.to(device)


def compiled(network: str, matrix: str, K: int) -> Record:
    model, x, y = built(COMPILED[network])
    vectors, gradient = methods.probes(model, K), methods.gradient(model, x, y)
    operators = {
        name: KINDS[matrix](model, F.cross_entropy, (x, y), compile=name == "inductor")
        for name in ("plain", "inductor")
    }
    products, started = {}, time.perf_counter()
    for name, operator in operators.items():
        for _ in range(WARM_UPS):
            products[name] = operator @ vectors
        seconds, started = time.perf_counter() - started, time.perf_counter()
    assert methods.difference(products["inductor"], products["plain"]) < 1e-5
    ratios: dict[str, list[float]] = {name: [] for name in operators}
    for _ in range(15):
        one = _seconds(gradient)
        for name, operator in operators.items():
            ratios[name].append(_seconds(lambda o=operator: o @ vectors) / one)  # type: ignore[misc]
    return {"seconds": seconds} | {n: statistics.median(r) for n, r in ratios.items()}


def _seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.process_time() - start


def errors(network: str) -> Record:
    model, x, y = built(ROUNDED[network])
    vectors, row = methods.probes(model, 2), {"network": network}
    for name, kind in KINDS.items():
        exact = copy.deepcopy(model).double(), x.double() if x.is_floating_point() else x
        wide = {n: v.double() for n, v in vectors.items()}
        truth = kind(exact[0], F.cross_entropy, (exact[1], y)) @ wide
        for gemm in ("float32", "tf32", "bfloat16"):
            product = kind(model, F.cross_entropy, (x, y), gemm=gemm) @ vectors
            shown = gemm != "tf32" or x.is_cuda
            cell = f"{methods.difference(product, truth):.0e}" if shown else "-"
            row[f"{name}, {gemm}"] = cell
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", default=",".join(COMPILED), help="which to compile")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/compiled.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rounded = table(map(errors, ROUNDED))
    print("\n".join(rounded), flush=True)
    settings = [
        {"network": network, "matrix": matrix, "K": K}
        for network in (n for n in COMPILED if n in args.networks)
        for matrix in KINDS
        for K in (1, 8)
    ]
    records = complete("compiled", compiled, settings)
    rows = [
        {
            **{k: r[k] for k in ("network", "matrix", "K")},
            "plain": f"{r['plain']:.2f}",
            "inductor": f"{r['inductor']:.2f}",
            "seconds": f"{r['seconds']:.0f}",
        }
        for r in records
    ]
    if args.save:
        lines = [*table(rows), "", *rounded, "", f"{machine()}; {commits(records) or commit()}"]
        save("compiled", [__doc__ or "", *lines])


if __name__ == "__main__":
    main()
