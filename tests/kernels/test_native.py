"""What only the compiled kernels promise: the same bits for any thread count and list order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastkernels.backends import native
from helpers import run_python
from kernels.cases import FEATURES
from kernels.update_harness import Run

pytestmark = pytest.mark.skipif(not native.available()[0], reason=native.available()[1])

SIZES = (100_003, 1, 40_000, 8192, 700)
COMPACT = {
    "float32": (None, None),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "codes": (torch.uint8, torch.uint8),
}


def stepped(rule: str, threads: int, moment_dtypes=(None, None)) -> list[torch.Tensor]:
    torch.manual_seed(5)
    run = Run(rule, [torch.randn(n) for n in SIZES], FEATURES["all"], moment_dtypes=moment_dtypes)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(3):
            run.step([torch.randn(n) for n in SIZES])
    finally:
        torch.set_num_threads(before)
    return [*run.params, *(m for ms in run.moments for m in ms), run.stats]


@pytest.mark.parametrize("dtypes", COMPACT.values(), ids=COMPACT)
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_same_bits_for_any_number_of_threads(monkeypatch, rule, dtypes):
    monkeypatch.setenv("FASTKERNELS_BACKEND", "native")
    one = stepped(rule, 1, dtypes)
    for threads in (1, 2, 3):
        assert all(map(torch.equal, one, stepped(rule, threads, dtypes)))


INSTRUCTION_SETS = """
import torch
from kernels.cases import FEATURES
from kernels.update_harness import Run, torch_steps
from helpers import assert_no_worse_than_torch
from fastkernels.backends import native
print(native.module().cpu_instruction_set())
for rule in ("adamw", "sgd"):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        torch.manual_seed(0)
        sizes = (3, 517, 8193)
        run = Run(rule, [torch.randn(n).to(dtype) for n in sizes], FEATURES["all"])
        gradients = [[torch.randn(n).to(dtype) for n in sizes] for _ in range(4)]
        truth = torch_steps(run, gradients, torch.float64)
        yardstick = torch_steps(run, gradients, dtype)
        for grads in gradients:
            run.step(grads)
        for p, y, t in zip(run.params, yardstick, truth, strict=True):
            assert_no_worse_than_torch(p, y, t, what=f"{rule} {dtype}")
"""


@pytest.mark.parametrize("name", ["baseline", "avx2"])
def test_instruction_sets_below_the_best(name):
    tests = str(Path(__file__).resolve().parents[1])
    code = f"import sys; sys.path.insert(0, {tests!r})\n{INSTRUCTION_SETS}"
    out = run_python(code, environment={"FASTKERNELS_CPU": name, "FASTKERNELS_BACKEND": "native"})
    assert out.split()[0] in (name, "baseline")  # a processor without AVX2 steps down further


def test_an_unknown_instruction_set_is_refused():
    code = """
import fastkernels
try:
    fastkernels.explain()
except ValueError as error:
    print(error)
"""
    said = run_python(code, environment={"FASTKERNELS_CPU": "sse2"})
    assert said.strip() == "FASTKERNELS_CPU must be baseline, avx2 or avx512; got sse2"


def test_one_openmp_runtime():
    """Two runtimes in a process would mean two thread pools on the same cores."""
    code = """
import fastkernels, torch
from fastkernels.backends import native
native.module()
print(len({line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line
           or "libomp" in line or "iomp" in line}))
"""
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc/self/maps")
    assert run_python(code).strip() in ("0", "1")
