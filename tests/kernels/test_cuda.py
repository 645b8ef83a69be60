"""The CUDA C++ kernels without a GPU: they compile, without spills, with 128-bit accesses."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from helpers import ROOT

NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")


def nvcc(tmp_path, *flags: str) -> str:
    """What ptxas says of every kernel; the PTX is left in `tmp_path`."""
    command = [str(NVCC), "-std=c++17", "-O3", "-fmad=false", f"-I{ROOT / 'csrc' / 'include'}",
               "-Werror", "all-warnings", *flags, str(ROOT / "csrc" / "cuda" / "anchored.cu"),
               "-o", str(tmp_path / "out")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("arch", ["sm_90", pytest.param("sm_80", marks=pytest.mark.slow)])
def test_compiles_without_spills(tmp_path, arch):
    said = nvcc(tmp_path, f"-arch={arch}", "-Xptxas", "-v", "-c")
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert spills
    assert set(spills) == {("0", "0")}, said
    registers = re.findall(r"update_kernel.*?Used (\d+) registers", said, re.DOTALL)
    assert len(registers) == 4, "AdamW and SGD, float and double"
    assert max(map(int, registers)) <= 144


@pytest.mark.slow
def test_accesses_of_128_bits(tmp_path):
    nvcc(tmp_path, "-arch=sm_90", "-ptx")
    ptx = (tmp_path / "out").read_text()
    assert len(re.findall(r"ld\.global\S*\.v4\.u32", ptx)) >= 10
    assert len(re.findall(r"st\.global\S*\.v4\.u32", ptx)) >= 5
