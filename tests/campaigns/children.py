"""Cases of a campaign in processes of their own: a crash is one more failed case, and goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers import ROOT


def seed() -> int:
    """The seed of all campaigns: FAST_CAMPAIGN_SEED, or 0."""
    return int(os.environ.get("FAST_CAMPAIGN_SEED", "0"))


@dataclass
class Outcome:
    """What the cases of one script printed, and those whose process died."""

    records: list[dict[str, Any]] = field(default_factory=list)
    crashes: list[str] = field(default_factory=list)


def run_cases(
    script: Path, first: int, last: int, environment: Mapping[str, str] | None = None
) -> Outcome:
    """Run cases [first, last) of `script SEED FIRST LAST`, which prints `begin NUMBER ...` before a
    case and a line of JSON after it."""
    outcome = Outcome()
    path = os.pathsep.join(map(str, (ROOT, ROOT / "python", ROOT / "tests")))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(environment or {})}
    while first < last:
        command = [sys.executable, str(script), str(seed()), str(first), str(last)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        lines = done.stdout.splitlines()
        outcome.records += [json.loads(line) for line in lines if line.startswith("{")]
        if done.returncode == 0:
            break
        begun = [line for line in lines if line.startswith("begin ")]
        assert begun, done.stderr[-3000:]
        outcome.crashes.append(f"{begun[-1]}: exit {done.returncode} {done.stderr[-300:]}")
        first = int(begun[-1].split()[1]) + 1
    return outcome
