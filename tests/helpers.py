"""What tests share: the error rule, equal states, sound files, and code in a fresh interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
import wave
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

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


def same_state(a: Any, b: Any) -> bool:
    """Whether two networks, or their state dicts, have the same tensors, to the bit."""
    a, b = (x.state_dict() if isinstance(x, nn.Module) else x for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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


def write_wav(path, seconds=0.1, rate=8000, width=2, channels=1, pitch=440.0):
    """Write a tone as a WAV file; the samples of one channel in -1..1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    t = np.arange(round(seconds * rate)) / rate
    tone = np.repeat(np.sin(2 * np.pi * pitch * t)[:, None], channels, 1) * 0.5
    scale = {1: 127, 2: 32767, 3: (1 << 23) - 1, 4: (1 << 31) - 1}[width]
    whole = np.round(tone * scale).astype(np.int64) + (128 if width == 1 else 0)
    raw = whole.astype("<i8").view(np.uint8).reshape(-1, 8)[:, :width].tobytes()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(raw)
    return tone[:, 0]
