"""What tests share: the error rule, and running a piece of code in a fresh interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent


def assert_no_worse_than_torch(
    result: Tensor, yardstick: Tensor, truth: Tensor, *, factor: float = 2.0, what: str = ""
) -> None:
    """The error of `result` against the float64 `truth` is at most `factor` times `yardstick`'s.

    `yardstick` is what plain torch computes at the dtype under test. Errors are the largest over
    the tensor. On top, since the yardstick may be exact by luck: one unit in the last place of the
    largest value, eight in float64, where yardstick and truth are one.
    """
    assert result.dtype == yardstick.dtype, f"{what}: {result.dtype} for {yardstick.dtype}"
    assert truth.dtype == torch.float64
    if truth.numel() == 0:
        return
    ours = (result.double() - truth).abs().max()
    theirs = (yardstick.double() - truth).abs().max()
    units = 8 if result.dtype == torch.float64 else 1
    slack = units * torch.finfo(result.dtype).eps * truth.abs().max()
    assert ours <= factor * theirs + slack, f"{what}: error {ours:.3e}, torch's {theirs:.3e}"


def run_python(
    code: str, *, environment: Mapping[str, str] | None = None, cwd: Path | None = None
) -> str:
    """Standard output of `code` in a fresh interpreter that finds this checkout's packages."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **(environment or {})},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
