"""Data-parallel training on gloo processes gives what one process gives; the cases: rank_runs.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from helpers import ROOT

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from rank_runs import RUNS, run

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo here"
)


def torchrun(number: int, *arguments: str, fails: bool = False) -> str:
    """Output of a Python command on `number` processes; its exit code says whether it failed."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "python", ROOT / "tests", HERE)))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "FAST_DEVICE": "cpu"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, f"--nproc-per-node={number}", "-m", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=550,
        check=False,
    )
    assert (done.returncode != 0) == fails, done.stdout
    return done.stdout


def on_ranks(number: int, name: str, folder: Path) -> list[dict[str, torch.Tensor]]:
    """The weights and statistics that each of `number` processes ends with."""
    torchrun(number, "rank_runs", name, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(number)]


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert list(a) == list(b)
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


def check(number: int, name: str, folder: Path, most: float = 1e-8) -> None:
    first, *others = on_ranks(number, name, folder)
    for other in others:
        assert furthest(first, other) == 0
    assert furthest(first, run(name).model.state_dict()) <= most


def test_two_ranks_with_source_inputs_and_a_budget(tmp_path):
    check(2, "budget", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("name", [name for name in RUNS if name != "per_task"])
def test_ranks_give_the_weights_of_one_process(number, name, tmp_path):
    check(number, name, tmp_path)
