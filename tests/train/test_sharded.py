"""Sharded runs (FSDP2) on several gloo processes give what one process gives; see rank_runs.py."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from torchrun import torchrun

sys.path.insert(0, str(Path(__file__).parent))
from rank_checks import check, furthest, on_ranks
from rank_runs import KILLED_AT, RUNS, SHARDED, own_loop, run

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo here"
)
# Runs that draw numbers on each rank, or normalise by its share, are compared elsewhere; adapters
# are refused.
ALONE = ("per_task", "dropout", "broken", "own loop", "unwrapped", "adapter")


def sharded(number, names, folder):
    runs = on_ranks(number, [name + SHARDED for name in names], folder)
    return {name.removesuffix(SHARDED): weights for name, weights in runs.items()}


def test_two_ranks_with_source_inputs_and_a_budget(tmp_path):
    check(sharded(2, ["budget"], tmp_path)["budget"], run("budget"))


def test_parts_on_two_ranks(tmp_path):
    """What a sharded network and its files are: sharded_cases.py asserts on every rank."""
    torchrun(2, "sharded_cases", str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 4])
def test_ranks_give_the_weights_of_one_process(number, tmp_path):
    names = [name for name in RUNS if name not in ALONE]
    for name, weights in sharded(number, names, tmp_path).items():
        check(weights, run(name))


@pytest.mark.slow
def test_a_loop_of_ones_own(tmp_path):
    first, second = sharded(2, ["own loop"], tmp_path)["own loop"]
    assert furthest(first, second) == 0
    assert furthest(first, own_loop().model.state_dict()) <= 1e-8


@pytest.mark.slow
def test_per_task_batch_norm_is_that_of_data_parallel_ranks(tmp_path):
    runs = on_ranks(2, ["per_task", "per_task" + SHARDED], tmp_path)
    (first, second), (plain, _) = runs["per_task" + SHARDED], runs["per_task"]
    assert furthest(first, second) == 0
    assert furthest(first, plain) <= 1e-8


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_bit_and_on_any_number_of_ranks(tmp_path):
    name = "source inputs"
    whole = sharded(2, [name], tmp_path)[name][0]
    output = tmp_path / "run"
    torchrun(2, "rank_runs", name + SHARDED, str(tmp_path), f"kill={output}", fails=True)
    assert [p.name for p in output.glob("checkpoint-*")] == [f"checkpoint-{KILLED_AT - 1:08d}"]

    def resumed(number, given):
        folder = tmp_path / f"{number}{given}"
        shutil.copytree(output, folder)
        torchrun(number, "rank_runs", given, str(tmp_path), f"resume={folder}")
        return torch.load(tmp_path / f"{given} 0.pt", weights_only=True)

    assert furthest(resumed(2, name + SHARDED), whole) == 0
    assert furthest(resumed(4, name + SHARDED), whole) <= 1e-8
    assert furthest(resumed(2, name), whole) <= 1e-8
    with pytest.warns(UserWarning, match="processes 2, here 1"):
        alone = run(name, resume=str(output), save_every=1)
    assert furthest(alone.model.state_dict(), whole) <= 1e-8


@pytest.mark.slow
def test_an_unsharded_run_goes_on_sharded(tmp_path):
    name, output = "source inputs", tmp_path / "run"
    torchrun(2, "rank_runs", name, str(tmp_path), f"kill={output}", fails=True)
    torchrun(4, "rank_runs", name + SHARDED, str(tmp_path), f"resume={output}")
    weights = torch.load(tmp_path / f"{name + SHARDED} 0.pt", weights_only=True)
    assert furthest(weights, run(name).model.state_dict()) <= 1e-8
