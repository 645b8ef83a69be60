"""benchmarks.device, which measures on a GPU, without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import device, gpu
from helpers import ROOT


def python(code: str, **options) -> device.Part:
    return device.Part(command=(sys.executable, "-c", code), minutes=1.0, **options)


def test_a_part_that_fails_or_runs_out_of_time_is_a_row(tmp_path):
    rows = [
        device.run("good", python("print('hello')"), tmp_path, 60, False),
        device.run("bad", python("raise SystemExit(3)"), tmp_path, 60, False),
        device.run("slow", python("import time; time.sleep(600)"), tmp_path, 1, False),
        device.run("absent", python("", needs="no-such-program"), tmp_path, 60, False),
    ]
    assert [row["ended"] for row in rows] == [
        "code 0", "code 3", "stopped after 1 s", "left out: no-such-program is not on PATH",
    ]  # fmt: skip
    assert (tmp_path / "good.log").read_text() == "hello\n"


def test_a_dry_run_has_its_own_arguments(tmp_path):
    part = python("raise SystemExit(3)", dry=(sys.executable, "-c", "print('dry')"))
    assert device.run("part", part, tmp_path, 60, True)["ended"] == "code 0"


@pytest.mark.parametrize("output", [None, "mine.json"])
def test_figures_of_a_dry_run_are_no_results(monkeypatch, tmp_path, output):
    monkeypatch.setattr(gpu, "_dry", False)
    given = ["--output", str(tmp_path / output)] if output else []
    monkeypatch.setattr(sys, "argv", ["gpu_update", "--dry-run", *given])
    args = gpu.parse(gpu.arguments(gpu.__doc__, rounds=1, output="gpu_update.json"))
    assert args.output == (tmp_path / output if output else Path(os.devnull))


@pytest.mark.slow
def test_dry_run_of_every_part(tmp_path):
    """All but the products, which take minutes on a CPU even in this form."""
    names = [n for n in device.parts(tmp_path) if n not in ("products", "tf32")]
    command = [sys.executable, "-m", "benchmarks.device", "--dry-run", "--minutes", "20"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path), "--parts", *names],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [row["part"] for row in summary] == names
    update = json.loads((tmp_path / "update.json").read_text())["results"]
    assert {row["variant"] for row in update} == set(device.VARIANTS)
    assert not any(row["wrong"] for row in update)
    assert len(json.loads((tmp_path / "op.json").read_text())["op"]) == 28
