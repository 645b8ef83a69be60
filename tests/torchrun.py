"""Start a module on several processes, as `torchrun` does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from helpers import ROOT

TESTS = Path(__file__).resolve().parent


def torchrun(number: int, module: str, *arguments: str, fails: bool = False) -> str:
    """What `python -m module` prints on `number` CPU processes; it must fail where `fails`."""
    path = os.pathsep.join(
        map(str, (ROOT, ROOT / "python", TESTS, TESTS / "train", TESTS / "integrations"))
    )
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "FAST_DEVICE": "cpu"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, f"--nproc-per-node={number}", "-m", module, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=550,
        check=False,
    )
    assert (done.returncode != 0) == fails, done.stdout
    return done.stdout
