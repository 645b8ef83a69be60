"""What the kernels of the update are compiled to for an H100: counted, without a GPU.

    python -m benchmarks.kernels.machine_code.gpu [--before COMMIT]

For every variant of `gpu_update` and both GPU backends: the instructions that one element costs in
the loop over whole tiles, registers, spills, the widths of the accesses, and the warps that share a
multiprocessor. `--before` counts the kernels of another commit beside those of this one.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import importlib.metadata
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

from benchmarks.common import RESULTS, Record, commit, save, table
from benchmarks.kernels.gpu_update import VARIANTS, Variant
from benchmarks.kernels.machine_code import sass

ROOT = Path(__file__).parents[3]
ARCH = 90
RULES = ("adamw", "sgd")
MANGLED = {"adamw": "5AdamW", "sgd": "3Sgd"}
# What a copy of 4.25 TB/s leaves time for, on 132 multiprocessors that issue four instructions of
# 32 threads at 1.7 GHz: instructions per byte.
PER_BYTE = 132 * 4 * 32 * 1.7e9 / 4.25e12
# The head of the table.
HEAD = """\
What the update kernels are compiled to (`python -m benchmarks.kernels.machine_code.gpu --before
COMMIT`).

`instructions` is what one element costs in the loop over whole tiles. Of a kernel that looks types
up while it runs it is the shortest way through the loop with the same accesses, which is too low
(≥), and for compact state unknown (?), because that way decodes nothing. `of the issue slots`: of
those that a copy of as many bytes leaves time for, at 4.25 TB/s, 132 multiprocessors and 1.7 GHz.
`spilled`: bytes of stack and local memory of a thread. `barriers`: of a whole block, for each tile.
`warps`: of a multiprocessor at a time, at most 64. `accesses`: of one thread for each tile, by kind
and bits.
"""
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
    minimum: sass.Accesses = Counter()
    for name, widths in zip(("LDG", "STG"), sizes(rule, v), strict=True):
        for size in widths:
            width = min(16, size * elements)
            minimum[name, 8 * width] += size * elements // width
    return minimum


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
    from fastkernels.ops.update.plan import DTYPES
    from fastkernels.ops.update.triton import kernels, launch

    types = bytes(DTYPES.index(t) for t in streams(rule, v))
    kind = launch.kind_of(types, v.exact, True)
    constants = {**launch.RULES[f"anchored_{rule}_"], "COLUMNS": 7, **kind._asdict()}
    kernel = offline(
        kernels.update_kernel, constants | {"CLIP": v.clip, "STATS": v.stats}, kind.options
    )
    threads = 32 * kernel.metadata.num_warps
    return kernel.asm["cubin"], "update_kernel", threads, kind.BLOCK // threads


@functools.cache
def cuda_cubins(csrc: Path) -> list[bytes]:
    """Every CUDA source, compiled for sm_90."""
    sources = sorted((csrc / "cuda").glob("*.cu"))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(functools.partial(cubin_of, csrc), sources))


def cubin_of(csrc: Path, source: Path) -> bytes:
    """One CUDA source, compiled for sm_90."""
    flags = ["-std=c++17", "-O3", "-fmad=false", f"-arch=sm_{ARCH}"]
    flags += [f"-I{csrc / 'include'}", f"-I{csrc / 'cuda'}"]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "out.cubin")
        command = [str(shutil.which("nvcc")), *flags, "-cubin", str(source), "-o", str(target)]
        subprocess.run(command, check=True)
        return target.read_bytes()


def numbers(rule: str, v: Variant) -> list[int]:
    """csrc's Dtype of parameter, gradient, moments, anchor and curvature."""
    from fastkernels.ops.update.plan import DTYPES

    param, grad, moment, _, anchor, curvature = (DTYPES.index(t) for t in streams(rule, v))
    return [param, grad, moment, anchor, curvature]


def is_kernel(name: str, rule: str, v: Variant) -> bool:
    """Whether a mangled name is that of the kernel that was compiled for a variant."""
    p, g, m, a, f = numbers(rule, v)
    types = rf"DtypeE{p}ELS\d_{g}ELb{int(v.exact)}ELS\d_{m}ELS\d_{a}ELS\d_{f}E"
    return bool(re.search(rf"update_kernelINS_{MANGLED[rule]}Ef.*Fixed.*{types}", name))


def takes_any(name: str, rule: str) -> bool:
    """Whether a mangled name is that of a kernel that looks up types while it runs."""
    return f"update_kernelINS_{MANGLED[rule]}Ef" in name and "Fixed" not in name


def cuda_kernel(rule: str, v: Variant, csrc: Path) -> tuple[bytes, str, int, int]:
    """As `triton_kernel`; where a variant has no kernel of its own, the one for any."""
    kernels = [(cubin, name) for cubin in cuda_cubins(csrc) for name in sass.usage(cubin)]
    own = [k for k in kernels if is_kernel(k[1], rule, v)]
    cubin, name = next(iter(own or [k for k in kernels if takes_any(k[1], rule)]))
    return cubin, name, 128, 4


def count(kernel: tuple[bytes, str, int, int], rule: str, v: Variant) -> Record:
    """What a variant's kernel costs."""
    cubin, name, threads, elements = kernel
    resources = sass.usage(cubin)[name]
    minimum = accesses(rule, v, elements)
    way = sass.shortest_pass(sass.disassemble(cubin)[name], minimum)
    num_bytes = sum(map(sum, sizes(rule, v)))
    per_element = way.instructions / (elements * way.times) if way else None
    return {
        "bytes": num_bytes,
        "least": takes_any(name, rule),
        "per_element": per_element,
        "of_issue": per_element and per_element / (PER_BYTE * num_bytes),
        "registers": resources.registers,
        "spilled": resources.stack + resources.local,
        "barriers": way and way.barriers,
        "warps": resources.warps(threads),
        "accesses": {f"{kind}.{bits}": n for (kind, bits), n in sorted(minimum.items())},
    }


def rows(csrc: Path, backends: list[str]) -> Iterator[Record]:
    for backend in backends:
        for rule in RULES:
            for label, v in VARIANTS.items():
                if backend == "triton":
                    kernel = triton_kernel(rule, v)
                else:
                    kernel = cuda_kernel(rule, v, csrc)
                row = {"backend": backend, "rule": rule, "variant": label}
                row |= count(kernel, rule, v)
                if row["least"] and {t for t in streams(rule, v) if t} != {torch.float32}:
                    row |= {"per_element": None, "of_issue": None}
                print(row, file=sys.stderr, flush=True)
                yield row


def rows_at(revision: str, backends: list[str]) -> list[Record]:
    """The rows of another commit's kernels, by this module."""
    with tempfile.TemporaryDirectory() as folder:
        git = ["git", "-C", str(ROOT), "archive", revision, "csrc", "fastkernels", "python"]
        archive = subprocess.run(git, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        shutil.copytree(ROOT / "benchmarks", Path(folder, "benchmarks"))
        path = os.pathsep.join([folder, str(Path(folder, "python"))])
        command = [sys.executable, "-m", "benchmarks.kernels.machine_code.gpu", "--json"]
        command += ["--backends", *backends]
        environment = os.environ | {"PYTHONPATH": path}
        done = subprocess.run(
            command, check=True, cwd=folder, stdout=subprocess.PIPE, env=environment
        )
        return list(json.loads(done.stdout))


def versions() -> str:
    """What compiled the kernels."""
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"V[\d.]+", said)
    return f"triton {importlib.metadata.version('triton')}, nvcc {release[0] if release else ''}"


def lines(now: list[Record], before: list[Record]) -> Iterator[Record]:
    """Cells of the table, with what was before in front of an arrow."""
    for row in now:
        key = ("backend", "rule", "variant")
        old = next((r for r in before if all(r[k] == row[k] for k in key)), None)

        def cell(field: str, form: str = "{}", row: Record = row, old: Record | None = old) -> str:
            sign = "≥ " if old and old["least"] and field in ("per_element", "of_issue") else ""
            values = ["?" if r[field] is None else form.format(r[field]) for r in (old, row) if r]
            if sign and values[0] != "?":
                values[0] = sign + values[0]
            return values[-1] if len(set(values)) == 1 else " → ".join(values)

        yield {
            "backend": row["backend"],
            "rule": row["rule"],
            "variant": row["variant"],
            "bytes": row["bytes"],
            "instructions": cell("per_element", "{:.1f}"),
            "of the issue slots": cell("of_issue", "{:.0%}"),
            "registers": cell("registers"),
            "spilled": cell("spilled"),
            "barriers": cell("barriers"),
            "warps": cell("warps"),
            "accesses of a thread": ", ".join(f"{n} {a}" for a, n in row["accesses"].items()),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", help="a commit to compare with")
    parser.add_argument("--backends", nargs="+", default=["triton", "cuda"])
    parser.add_argument("--json", action="store_true", help="print the rows, and keep nothing")
    args = parser.parse_args()
    if reason := sass.missing():
        raise SystemExit(reason)
    if "cuda" in args.backends and not shutil.which("nvcc"):
        raise SystemExit("nvcc is not on PATH: --backends triton does without")
    now = list(rows(ROOT / "csrc", args.backends))
    if args.json:
        print(json.dumps(now))
        return
    before = rows_at(args.before, args.backends) if args.before else []
    where = {"compilers": versions(), "commit": commit(), "before": args.before}
    report = where | {"rows": now, "rows_before": before}
    (RESULTS / "instructions.json").write_text(json.dumps(report, indent=1) + "\n")
    text = [HEAD, *table(lines(now, before)), "", f"sm_{ARCH}; {versions()}; commit {commit()}"]
    text[-1] += f", before it {args.before}." if args.before else "."
    save("instructions", text)


if __name__ == "__main__":
    main()
