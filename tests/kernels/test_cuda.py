"""The CUDA C++ kernels without a GPU: they compile, without warnings and without spills.

What they compute is in test_cuda_on_cpu.py, and what they cost in test_instructions.py.
"""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from helpers import ROOT

NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")
CUDA = ROOT / "csrc" / "cuda"
# The kernels of any dtypes are in anchored.cu; those of one kind each take half a minute.
SOURCES = [
    "anchored",
    *(pytest.param(f"anchored_{r}", marks=pytest.mark.slow) for r in ("adamw", "sgd")),
]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("arch", ["sm_90", pytest.param("sm_80", marks=pytest.mark.slow)])
def test_compiles_without_spills(tmp_path, arch, source):
    command = [str(NVCC), "-std=c++17", "-O3", "-fmad=false", f"-I{ROOT / 'csrc' / 'include'}",
               "-Werror", "all-warnings", f"-arch={arch}", "-Xptxas", "-v", "-c",
               str(CUDA / f"{source}.cu"), "-o", str(tmp_path / "out")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert spills
    assert set(spills) == {("0", "0")}, said
    registers = [*map(int, re.findall(r"update_kernel.*?Used (\d+) registers", said, re.DOTALL))]
    if source == "anchored":
        assert len(registers) == 4, "AdamW and SGD, float and double"
        assert max(registers) <= 160
    else:
        assert len(registers) >= 30, "a kernel for each kind"
        assert max(registers) <= 64, "8 blocks of 128 threads share a multiprocessor"
