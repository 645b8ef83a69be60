"""Runs one function of `rank_cases` on two gloo processes; not collected itself.

python ranks.py CASE RANK WORLD FOLDER
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from helpers import ROOT

HERE = Path(__file__).resolve().parent
WORLD = 2


def run_on_ranks(case: str, folder: Path) -> None:
    """Run `case` on all ranks and fail with the output of the ranks that fail."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "python", ROOT / "tests", HERE)))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "rank_cases", case, str(rank), str(WORLD), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    failed = [o for r, o in zip(ranks, outputs, strict=True) if r.returncode != 0]
    assert not failed, "\n".join(failed)
