""".ci/wheels.py: which interpreters it takes, and (slow) the whole way to a wheel that works."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys

import pytest

import wheels
from helpers import ROOT

SHIM = '#!/bin/sh\necho "pyenv: python$1: command not found" >&2\nexit 127\n'
NO_HEADERS = "#!/bin/sh\necho 3.99 False\n"
WHOLE = "#!/bin/sh\necho 3.99 True\n"


@pytest.fixture
def interpreters(tmp_path, monkeypatch):
    """Write a file that stands for an interpreter on PATH, or for one of pyenv's."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
        path.chmod(0o755)
        return str(path)

    return write


def test_an_interpreter_that_is_not_there(interpreters):
    python, reason = wheels.find_python("3.99")
    assert python is None
    assert reason.startswith("no python3.99 on PATH or in ")


def test_a_shim_is_passed_over(interpreters):
    interpreters("bin/python3.99", SHIM)
    assert wheels.find_python("3.99")[0] is None
    pyenv = interpreters("pyenv/versions/3.99.1/bin/python", WHOLE)
    assert wheels.find_python("3.99") == (pyenv, "")


def test_an_interpreter_without_headers(interpreters):
    path = interpreters("bin/python3.99", NO_HEADERS)
    assert wheels.find_python("3.99") == (None, f"{path} has no Python.h")


def test_a_version_is_skipped_with_its_reason(interpreters, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wheels, "build_source", lambda folder, output: output / "source.tar.gz")
    assert wheels.main(["--versions", "3.98,3.99", "--output", str(tmp_path / "dist")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["3.98: skipped", "3.99: skipped"]


@pytest.mark.slow
def test_a_wheel_of_this_python(tmp_path):
    """Builds, repairs, installs with dependencies from the package index, and takes a step."""
    for module in ("build", "auditwheel"):
        pytest.importorskip(module, reason="pip install '.[wheels]'")
    if not (shutil.which("g++") and shutil.which("patchelf") and importlib.util.find_spec("venv")):
        pytest.skip("needs a C++ compiler and patchelf")
    done = subprocess.run(
        [
            sys.executable,
            ROOT / ".ci" / "wheels.py",
            "--versions",
            wheels.THIS,
            "--output",
            tmp_path,
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"{wheels.THIS}: ")]
    assert re.search(r"-manylinux_2_\d+_\w+\.whl: one step with the native kernels, compiled", line)
    assert len(list(tmp_path.glob("*.tar.gz"))) == len(list(tmp_path.glob("*.whl"))) == 1
