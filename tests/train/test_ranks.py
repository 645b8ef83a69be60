"""Training on several gloo processes gives what one process gives; the cases: rank_runs.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fast.ranks import Ranks
from torchrun import torchrun

sys.path.insert(0, str(Path(__file__).parent))
from rank_checks import check, furthest, on_ranks
from rank_runs import KILLED_AT, RUNS, Broken, own_loop, run

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo here"
)


DISAGREE = ("per_task", "own loop", "unwrapped", "dropout", "broken")
AGREE = [name for name in RUNS if name not in DISAGREE]


def test_one_process_exchanges_nothing():
    ranks, x = Ranks(None), torch.arange(3.0)
    assert ranks.first
    assert ranks.share == slice(None)
    assert ranks.sum_(x) is x
    assert (ranks.total(3), ranks.largest(2), ranks.from_first("a"), ranks.all(1)) == (
        3, 2, "a", [1],
    )  # fmt: skip
    with pytest.raises(OSError, match="disk"), ranks.together():
        raise OSError("disk")
    with pytest.raises(ValueError, match="process_group must be 'auto', None or a process group"):
        Ranks("all")


def test_two_ranks_with_source_inputs_and_a_budget(tmp_path):
    check(on_ranks(2, ["budget"], tmp_path)["budget"], run("budget"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 4])
def test_ranks_give_the_weights_of_one_process(number, tmp_path):
    for name, weights in on_ranks(number, AGREE, tmp_path).items():
        check(weights, run(name))


@pytest.mark.slow
def test_a_loop_of_ones_own(tmp_path):
    """`fast.Adaptation` in plain `DistributedDataParallel`."""
    first, second = on_ranks(2, ["own loop"], tmp_path)["own loop"]
    assert furthest(first, second) == 0
    assert furthest(first, own_loop().model.state_dict()) <= 1e-8


@pytest.mark.slow
def test_a_loop_that_averages_no_gradients_is_stopped(tmp_path):
    output = torchrun(2, "rank_runs", "unwrapped", str(tmp_path), fails=True)
    assert "RuntimeError: the processes have different gradients in the first step" in output


@pytest.mark.slow
def test_per_task_batch_norm_agrees_on_all_ranks(tmp_path):
    """Each rank normalises by its own share, so the weights are not those of one process."""
    first, second = on_ranks(2, ["per_task"], tmp_path)["per_task"]
    assert furthest(first, second) == 0
    alone = run("per_task").model.state_dict()
    assert furthest(first, alone) > 1e-8
    source = {key: value for key, value in alone.items() if "source_norm" in key}
    assert source
    assert furthest({key: first[key] for key in source}, source) == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 4])
def test_a_killed_run_goes_on_to_the_bit(number, tmp_path):
    """Through dropout, which each rank draws by itself."""
    whole = on_ranks(number, ["dropout"], tmp_path)["dropout"]
    output = tmp_path / "run"
    torchrun(number, "rank_runs", "dropout", str(tmp_path), f"kill={output}", fails=True)
    assert [p.name for p in output.glob("checkpoint-*")] == [f"checkpoint-{KILLED_AT - 1:08d}"]
    torchrun(number, "rank_runs", "dropout", str(tmp_path), f"resume={output}")
    for rank, weights in enumerate(whole):
        again = torch.load(tmp_path / f"dropout {rank}.pt", weights_only=True)
        assert furthest(weights, again) == 0
    lines = (output / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 10, 20, 30]


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_after_a_checkpoint(tmp_path):
    output = tmp_path / "run"
    torchrun(2, "rank_runs", "vanilla", str(tmp_path), f"stop={output}", fails=True)
    assert [p.name for p in output.glob("checkpoint-*")] == [f"checkpoint-{KILLED_AT:08d}"]
    with pytest.warns(UserWarning, match="processes 2, here 1"):
        result = run("vanilla", resume=str(output), save_every=1)
    assert furthest(result.model.state_dict(), run("vanilla").model.state_dict()) <= 1e-8


@pytest.mark.slow
def test_another_number_of_processes_goes_on_to_rounding(tmp_path):
    output = tmp_path / "run"
    torchrun(2, "rank_runs", "source inputs", str(tmp_path), f"kill={output}", fails=True)
    with pytest.warns(UserWarning, match="processes 2, here 1"):
        result = run("source inputs", resume=str(output), save_every=1)
    assert furthest(result.model.state_dict(), run("source inputs").model.state_dict()) <= 1e-8


@pytest.mark.slow
def test_a_failure_on_one_rank_ends_all(tmp_path):
    output = torchrun(2, "rank_runs", "broken", str(tmp_path), fails=True)
    assert f"train: sample {Broken.row} cannot be read: OSError: disk" in output
    assert "RankError: rank 1 failed: ValueError: train: sample" in output
