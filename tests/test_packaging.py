"""The build: without torch, without a compiler, and what it links."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fastkernels.backends import native
from helpers import ROOT

needs_build_tools = pytest.mark.skipif(
    not all(importlib.util.find_spec(m) for m in ("setuptools", "pybind11", "ninja")),
    reason="needs setuptools, pybind11 and ninja in this environment",
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the build reads, without what it made."""
    for name in ("setup.py", "pyproject.toml", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "README.md").write_text("readme\n")
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("csrc", "fastkernels", "python"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    return tmp_path


def build(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # A module of this name that fails: setup.py must not import torch.
    (checkout / "torch.py").write_text("raise ImportError('the build imported torch')\n")
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", "out"],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@needs_build_tools
def test_no_compiler_is_said_and_survived(checkout):
    done = build(checkout, CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert "without native kernels: no C++ compiler: no-such-compiler" in done.stdout
    assert "FAST_REQUIRE_NATIVE=1" in done.stdout


@needs_build_tools
def test_no_compiler_is_an_error_when_native_is_required(checkout):
    done = build(checkout, CXX="no-such-compiler", FAST_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert "no C++ compiler" in done.stderr


@needs_build_tools
def test_a_compiler_that_fails_is_survived(checkout):
    done = build(checkout, CXX="false")
    assert done.returncode == 0, done.stderr
    assert "without native kernels" in done.stdout


# Stands for nvcc: writes down how it was called, and makes the files it was asked for.
NVCC = """#!/bin/sh
echo "$@" >> "$(dirname "$0")/calls"
while [ $# -gt 0 ]; do
  case "$1" in
    -o) touch "$2" ;;
    -MF) echo "out:" > "$2" ;;
  esac
  shift
done
"""


def stand_in(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@needs_build_tools
def test_cuda_kernels_are_compiled_apart_and_linked(checkout, tmp_path):
    stand_in(tmp_path / "bin" / "nvcc", NVCC)
    done = build(checkout, CXX="no-such-compiler", FAST_CUDA="1", CUDA_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "bin" / "calls").read_text().splitlines()
    compiled = {Path(c.split(" -c ")[1].split()[0]).name: c for c in calls if " -c " in c}
    kernels = {"anchored.cu", "anchored_adamw.cu", "anchored_sgd.cu"}
    assert set(compiled) == kernels | {"bindings.cpp"}
    for call in compiled.values():
        assert "-fmad=false" in call
        assert "code=sm_90" in call
        assert f"-I{checkout}/csrc/include" in call
    assert "pybind11" in compiled["bindings.cpp"]
    (linked,) = set(calls) - set(compiled.values())
    assert "-shared" in linked
    assert all(name in linked for name in ("cuda_anchored.o", "cuda_bindings.o", "_C_cuda"))


@needs_build_tools
@pytest.mark.parametrize("required", [False, True])
def test_an_nvcc_that_fails(checkout, tmp_path, required):
    stand_in(tmp_path / "bin" / "nvcc", "#!/bin/sh\nexit 1\n")
    stand_in(tmp_path / "bin" / "nvidia-smi", "#!/bin/sh\n")
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    wanted = {"FAST_CUDA": "1"} if required else {"FAST_CUDA": ""}
    done = build(checkout, CXX="no-such-compiler", CUDA_HOME="", PATH=path, **wanted)
    assert (done.returncode != 0) == required, done.stderr
    if not required:
        assert "without CUDA C++ kernels" in done.stdout


@pytest.mark.slow
@needs_build_tools
def test_wheel_has_both_packages_and_links_no_torch(checkout, tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q"],
        cwd=checkout,
        env={**os.environ, "FAST_REQUIRE_NATIVE": "1"},
        check=True,
    )
    (wheel,) = checkout.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (native,) = (n for n in names if n.startswith("fastkernels/_C"))
        archive.extract(native, tmp_path / "wheel")
    files = ("fastkernels/ops/update/call.py", "fastkernels/backends/native.py")
    assert {"fast/__init__.py", "fast/py.typed", "fastkernels/py.typed", *files} <= set(names)
    if shutil.which("ldd"):
        linked = subprocess.run(
            ["ldd", tmp_path / "wheel" / native], capture_output=True, text=True, check=True
        )
        assert "torch" not in linked.stdout.replace(str(ROOT), "")


def test_required_native_is_there():
    """CI sets FAST_REQUIRE_NATIVE=1: then a build that quietly failed must not pass."""
    if os.environ.get("FAST_REQUIRE_NATIVE") != "1":
        pytest.skip("FAST_REQUIRE_NATIVE is not 1")
    assert native.available()[0], native.available()[1]


def test_missing_native_names_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastkernels._C", None)
    monkeypatch.delattr("fastkernels._C", raising=False)
    native.load.cache_clear()
    try:
        ok, reason = native.available()
        assert not ok
        assert "FAST_REQUIRE_NATIVE=1" in reason
        with pytest.raises(RuntimeError, match="C\\+\\+17 compiler"):
            native.module()
    finally:
        monkeypatch.undo()
        native.load.cache_clear()
