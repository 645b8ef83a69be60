"""What the update kernels are compiled to stays what benchmarks/results/instructions.json says."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections import Counter

import pytest

from benchmarks.common import RESULTS, Record
from benchmarks.kernels.gpu_update import VARIANTS
from benchmarks.kernels.machine_code import gpu, sass
from fastkernels.backends import triton
from helpers import ROOT

pytestmark = pytest.mark.skipif(bool(sass.missing()), reason=sass.missing() or "-")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or triton.interpreting(),
    reason="triton is not installed, or interprets (TRITON_INTERPRET=1)",
)
RECORDED = json.loads((RESULTS / "instructions.json").read_text())["rows"]
# By how much another compiler than the recorded one may exceed its counts.
SLACK = 1.15
# A CUDA source with the kernels of these variants alone.
QUICK = ("whole fp32", "whole 8-bit")
SOURCE = """
#include "update.cuh"
namespace fast {
template __global__ void update_kernel<AdamW, float, Fixed<
    Dtype::f32, Dtype::f32, false, Dtype::f32, Dtype::f32, Dtype::f32>>(CudaUpdateArgs, int64_t);
template __global__ void update_kernel<AdamW, float, Fixed<
    Dtype::f32, Dtype::f32, false, Dtype::codes8, Dtype::bf16, Dtype::codes8>>(
        CudaUpdateArgs, int64_t);
}
"""


def rows(backend: str) -> list[object]:
    """The recorded rows of a backend, by name; the quick ones run by default."""
    found = [r for r in RECORDED if r["backend"] == backend]
    assert len(found) == 2 * len(VARIANTS)
    return [
        pytest.param(
            r,
            id=f"{r['rule']}-{r['variant']}".replace(" ", "_"),
            marks=() if (r["rule"], r["variant"]) == ("adamw", QUICK[-1]) else pytest.mark.slow,
        )
        for r in found
    ]


def assert_as_recorded(found: Record, recorded: Record) -> None:
    assert found["spilled"] == 0
    assert found["barriers"] == 0, "a tile waits for other warps"
    # Without the wide accesses there is no such way through a loop, and no count.
    assert found["per_element"] is not None, f"no loop with {recorded['accesses']}"
    assert found["per_element"] <= SLACK * recorded["per_element"]
    assert found["warps"] >= recorded["warps"]


@needs_triton
@pytest.mark.parametrize("recorded", rows("triton"))
def test_triton(recorded):
    rule, v = recorded["rule"], VARIANTS[recorded["variant"]]
    found = gpu.count(gpu.triton_kernel(rule, v), rule, v)
    assert_as_recorded(found, recorded)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("recorded", rows("cuda"))
def test_cuda(recorded):
    rule, v = recorded["rule"], VARIANTS[recorded["variant"]]
    found = gpu.count(gpu.cuda_kernel(rule, v, ROOT / "csrc"), rule, v)
    assert_as_recorded(found, recorded)


@needs_nvcc
def test_two_cuda_kernels(tmp_path):
    source = tmp_path / "two.cu"
    source.write_text(SOURCE)
    cubin = gpu.cubin_of(ROOT / "csrc", source)
    names = list(sass.usage(cubin))
    assert len(names) == len(QUICK)
    for label in QUICK:
        (recorded,) = (
            r
            for r in RECORDED
            if (r["backend"], r["rule"], r["variant"]) == ("cuda", "adamw", label)
        )
        v = VARIANTS[label]
        name = next(n for n in names if gpu.is_kernel(n, "adamw", v))
        found = gpu.count((cubin, name, 128, 4), "adamw", v)
        assert_as_recorded(found, recorded)


def instruction(address: int, opcode: str, target: int | None = None, predicated: bool = False):
    return sass.Instruction(address=address, opcode=opcode, target=target, predicated=predicated)


def test_the_shortest_way_through_a_loop():
    """A branch around a slow path is taken; one around a wanted access is not."""
    code = [
        instruction(0, "MOV"),
        instruction(16, "LDG.E.128"),  # the loop begins
        instruction(32, "BRA", target=80, predicated=True),
        instruction(48, "FMUL"),
        instruction(64, "FMUL"),
        instruction(80, "BRA", target=112, predicated=True),
        instruction(96, "STG.E.64.STRONG.SM"),
        instruction(112, "BAR.SYNC"),
        instruction(128, "BRA", target=16, predicated=True),
        instruction(144, "EXIT"),
    ]
    wanted = Counter({("LDG", 128): 1, ("STG", 64): 1})
    assert sass.shortest_pass(code, wanted) == sass.Pass(instructions=6, barriers=1, times=1)
    assert sass.shortest_pass(code, Counter({("LDG", 128): 2})) is None
    assert sass.shortest_pass(code, Counter({("LDG", 64): 1})) is None
