"""What the kernels of the update are compiled to for an H100: counted, without a GPU.

    python -m benchmarks.kernels.instructions [--before COMMIT]

For every variant of `gpu_update` and both GPU backends: the instructions that one element costs in
the loop over whole tiles, registers, spills, the widths of the accesses, and the warps that share a
multiprocessor. `--before` counts the kernels of another commit beside those of this one.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Record
from benchmarks.kernels import sass
from benchmarks.kernels.gpu_update import VARIANTS, Variant

ROOT = Path(__file__).parents[2]
ARCH = 90
RULES = ("adamw", "sgd")
# What a copy of 4.25 TB/s leaves time for, on 132 multiprocessors that issue four instructions of
# 32 threads at 1.7 GHz: instructions per byte.
PER_BYTE = 132 * 4 * 32 * 1.7e9 / 4.25e12
POINTERS = {
    "rows": "*i64", "grads": "*i64", "chunks": "*i64", "hyper": "*fp64", "seed": "*i64",
    "control": "*fp64", "grad_scale": "*fp32", "found_inf": "*fp32", "partial": "*fp64",
    "max_norm": "*fp64", "stats": "*fp64",
}  # fmt: skip


def streams(rule: str, v: Variant) -> list[torch.dtype | None]:
    """The dtypes of parameter, gradient, two moments, anchor and curvature."""
    param = torch.bfloat16 if v.exact else torch.float32
    second = v.moments if rule == "adamw" else None
    return [param, param, v.moments, second, v.anchor, v.curvature]


def sizes(rule: str, v: Variant) -> tuple[list[int], list[int]]:
    """The bytes per element of the streams that are read, and of those that are written."""
    p, _, m, second, *_ = streams(rule, v)
    written = [x.itemsize for x in (p, m, second) if x] + [2] * v.exact
    read = [x.itemsize for x in streams(rule, v) if x] + [2] * v.exact
    return read, written


def accesses(rule: str, v: Variant, elements: int) -> sass.Accesses:
    """The accesses of a thread that has so many consecutive elements of every stream."""
    wanted: sass.Accesses = Counter()
    for name, widths in zip(("LDG", "STG"), sizes(rule, v), strict=True):
        for size in widths:
            width = min(16, size * elements)
            wanted[name, 8 * width] += size * elements // width
    return wanted


def offline(kernel: Any, constants: dict[str, Any], options: dict[str, Any],
            pointers: dict[str, str] = POINTERS) -> Any:  # fmt: skip
    """A Triton kernel for sm_90, compiled without a device."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in pointers
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return compile_kernel(source, target=GPUTarget("cuda", ARCH, 32), options=options)


def triton_kernel(rule: str, v: Variant) -> tuple[bytes, str, int, int]:
    """(cubin, kernel, threads of a block, elements of a thread)."""
    from fastkernels.ops.update import triton as op
    from fastkernels.ops.update.plan import DTYPES

    types = bytes(DTYPES.index(t) for t in streams(rule, v))
    kind = op.kind_of(types, v.exact, True)
    constants = {**op.RULES[f"anchored_{rule}_"], "COLUMNS": 7, **kind._asdict()}
    compiled = offline(
        op.update_kernel, constants | {"CLIP": v.clip, "STATS": v.stats}, kind.options
    )
    threads = 32 * compiled.metadata.num_warps
    return compiled.asm["cubin"], "update_kernel", threads, kind.BLOCK // threads


@functools.cache
def cuda_cubins(csrc: Path) -> list[bytes]:
    """Every CUDA source, compiled for sm_90."""
    flags = ["-std=c++17", "-O3", "-fmad=false", f"-arch=sm_{ARCH}", f"-I{csrc / 'include'}"]
    cubins = []
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted((csrc / "cuda").glob("*.cu")):
            target = Path(folder, f"{source.stem}.cubin")
            subprocess.run(
                [str(shutil.which("nvcc")), *flags, "-cubin", str(source), "-o", str(target)],
                check=True,
            )
            cubins.append(target.read_bytes())
    return cubins


def cuda_kernel(rule: str, v: Variant, csrc: Path) -> tuple[bytes, str, int, int]:
    """As `triton_kernel`. A kernel is known by its mangled name."""
    name = {"adamw": "AdamW", "sgd": "Sgd"}[rule]
    for cubin in cuda_cubins(csrc):
        for kernel in sass.usage(cubin):
            if re.search(rf"update_kernel.*{name}Ef", kernel):
                return cubin, kernel, 128, 4
    raise LookupError(f"no CUDA kernel for {rule}, {v}")


def count(backend: str, rule: str, label: str, csrc: Path) -> Record:
    """A row of the table."""
    v = VARIANTS[label]
    found = triton_kernel(rule, v) if backend == "triton" else cuda_kernel(rule, v, csrc)
    cubin, name, threads, elements = found
    code, used = sass.disassemble(cubin)[name], sass.usage(cubin)[name]
    wanted = accesses(rule, v, elements)
    way = sass.shortest_pass(code, wanted)
    moved = sum(map(sum, sizes(rule, v)))
    per_element = way.instructions / elements if way else None
    return {
        "backend": backend,
        "rule": rule,
        "variant": label,
        "per_element": per_element,
        "of_issue": per_element and per_element / (PER_BYTE * moved),
        "registers": used.registers,
        "spilled": used.stack + used.local,
        "barriers": way and way.barriers,
        "warps": used.warps(threads),
        "accesses": {f"{name}.{bits}": n for (name, bits), n in sorted(wanted.items())},
    }


def rows(csrc: Path, backends: list[str]) -> Iterator[Record]:
    for backend in backends:
        for rule in RULES:
            for label in VARIANTS:
                row = count(backend, rule, label, csrc)
                print(row, file=sys.stderr, flush=True)
                yield row


def rows_at(revision: str, backends: list[str]) -> list[Record]:
    """The rows of another commit, by this module on that commit's kernels."""
    with tempfile.TemporaryDirectory() as folder:
        git = ["git", "-C", str(ROOT), "archive", revision, "csrc", "fastkernels"]
        archive = subprocess.run(git, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        shutil.copytree(ROOT / "benchmarks", Path(folder, "benchmarks"))
        shutil.copytree(ROOT / "python", Path(folder, "python"))
        path = os.pathsep.join([folder, str(Path(folder, "python"))])
        command = [sys.executable, "-m", __spec__.name, "--json", "--backends", *backends]
        done = subprocess.run(command, check=True, cwd=folder, stdout=subprocess.PIPE,
                              env=os.environ | {"PYTHONPATH": path})  # fmt: skip
        return list(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", help="a commit to compare with")
    parser.add_argument("--backends", nargs="+", default=["triton", "cuda"])
    parser.add_argument("--json", action="store_true", help="print the rows, and keep nothing")
    args = parser.parse_args()
    if reason := sass.missing():
        raise SystemExit(reason)
    now = list(rows(ROOT / "csrc", args.backends))
    if args.json:
        print(json.dumps(now))
        return
    before = rows_at(args.before, args.backends) if args.before else []
    print(before, now)


if __name__ == "__main__":
    main()
