"""Type checkers find slips in names and values of options, in an installed and an editable fast.

The package is put into a fresh environment as a wheel of each kind, without kernels and without
torch, of which the checkers then know nothing.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from helpers import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(importlib.util.find_spec(m) for m in ("setuptools", "pybind11")),
        reason="needs setuptools and pybind11 in this environment",
    ),
]
GOOD = """
import torch, fast
from pathlib import Path
from fast.integrations.lightning import FastCallback
model, data = torch.nn.Linear(2, 2), (torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))
def log(record: dict[str, object]) -> None: ...
fast.finetune(model, data, epochs=4, method="lp-ft", output=Path("run"), class_weights=[1.0, 2.0])
fast.finetune(model, data, batch_norm=None, precision="bf16", callbacks=[log])
fast.Adaptation(model, data, steps=3, optimizer="sgd", schedule="constant")
FastCallback(model, data, source_inputs=data[0], steps=3, augmented=True)
"""
BAD = {
    "fast.finetune(model, data, epochz=4)": "epochz",
    'fast.finetune(model, data, method="fst")': "method",
    'fast.finetune(model, data, precision="float16")': "precision",
    'fast.finetune(model, data, class_weights="balance")': "class_weights",
    "fast.finetune(model, data, callbacks=log)": "callbacks",
    "fast.Adaptation(model, data, anchor_deccay=1.0)": "anchor_deccay",
    'fast.Adaptation(model, data, optimizer="adam")': "optimizer",
    "FastCallback(model, data, stpes=4)": "stpes",
}
BUILD = """
import sys
from setuptools import build_meta
if sys.argv[1] == "installed":
    build_meta.build_wheel("wheels")
else:
    build_meta.build_editable("wheels", {"editable_mode": "strict"})
"""


@pytest.fixture(scope="module", params=["installed", "editable"])
def python(request, tmp_path_factory) -> str:
    """The interpreter of an environment that has the package."""
    folder = tmp_path_factory.mktemp(request.param)
    for name in ("setup.py", "pyproject.toml", "LICENSE", "MANIFEST.in", "README.md"):
        shutil.copy(ROOT / name, folder)
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("csrc", "fastkernels", "python"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    (folder / "wheels").mkdir()
    environment = {"PATH": "/usr/bin:/bin", "CXX": "no-such-compiler", "FAST_CUDA": "0"}
    build = [sys.executable, "-c", BUILD, request.param]
    subprocess.run(build, cwd=folder, env=environment, capture_output=True, check=True)
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", folder / "environment"], check=True
    )
    (wheel,) = (folder / "wheels").glob("*.whl")
    (packages,) = (folder / "environment").glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    return str(folder / "environment" / "bin" / "python")


def with_mypy(python: str, file: Path) -> dict[int, str]:
    """The errors that mypy finds, by line."""
    pytest.importorskip("mypy", reason="mypy is one of the checkers")
    command = [sys.executable, "-m", "mypy", "--python-executable", python, file.name]
    options = ["--ignore-missing-imports", "--follow-imports=silent", "--cache-dir=cache"]
    done = subprocess.run(
        [*command, *options], cwd=file.parent, capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(file.name)]
    return {int(line.split(":")[1]): line for line in lines if ": error:" in line}


def with_pyright(python: str, file: Path) -> dict[int, str]:
    """The errors that pyright finds, by line."""
    pytest.importorskip("pyright", reason="pyright is not installed")
    command = [sys.executable, "-m", "pyright", "--pythonpath", python, "--outputjson", file.name]
    done = subprocess.run(command, cwd=file.parent, capture_output=True, text=True, check=False)
    if not done.stdout.startswith("{"):
        pytest.skip(f"pyright does not start (it needs node): {done.stderr[-200:]}")
    found = json.loads(done.stdout)["generalDiagnostics"]
    errors = [f for f in found if f["severity"] == "error"]
    known = [f for f in errors if 'Import "torch"' not in f["message"]]
    return {f["range"]["start"]["line"] + 1: f["message"] for f in known}


@pytest.mark.parametrize("check", [with_mypy, with_pyright])
def test_a_slip_is_found(python, check, tmp_path):
    file = tmp_path / "usage.py"
    file.write_text(GOOD + "\n".join(BAD))
    first = GOOD.count("\n") + 1
    errors = check(python, file)
    assert set(errors) == set(range(first, first + len(BAD))), errors
    for line, word in enumerate(BAD.values(), start=first):
        assert word in errors[line]
