"""Runs on several processes, one of which is killed, end in the same weights after all.

    pytest -m slow tests/campaigns/test_rank_kills.py

Each process is a fork of this one, so that nothing is imported again. When one is killed the rest
are, too, as `torchrun` does.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import shutil
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fast
from campaigns.campaign import Campaign, cases
from campaigns.forks import forked, kill_at_file_event, outcome
from fast.models.saved import list_checkpoints

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo here"
)


def samples(count, classes, seed):
    x = torch.randn(count, 12, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, :3] > 0).sum(1) % classes


KEPT = samples(40, 4, seed=3)
COMMON = {
    "steps": 8, "head_steps": 10, "eval_every": 4, "save_every": 3, "batch_size": 32,
    "progress": False, "dropout": True,
}  # fmt: skip
CONFIGURATIONS = {
    "source inputs": {"source_inputs": KEPT[0]},
    "budget": {"source_inputs": KEPT[0], "forget_budget": 0.05},
    "frozen": {"batch_norm": "frozen"},
    "accumulated": {"grad_accum_steps": 2, "max_grad_norm": 1.0, "rehearse": 0.0},
    "patience": {"patience": 2, "lr": 3e-2},
    "ewc": {"method": "ewc", "source_inputs": KEPT[0], "head_steps": None},
    "replay": {"method": "replay", "source_inputs": KEPT, "head_steps": None},
}
WAYS = list(itertools.product((2, 4), (False, True)))  # processes, sharded
FILE_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")


def network():
    """With batch norm and dropout, which each process draws by itself."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2)
    return nn.Sequential(nn.Linear(12, 16), *norm, nn.Linear(16, 4))


def noisy(x):
    return x + 0.1 * torch.randn_like(x)


def run(rank, size, folder, options, kill_at):
    """One process of a run, to its end; writes the hash of what the run came to."""
    store = folder.parent / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    if kill_at is not None:
        kill_at_file_event(kill_at, folder, FILE_EVENTS)
    train, val = samples(64, 3, seed=1), samples(30, 3, seed=2)
    done = fast.finetune(network(), train, val, transform=noisy, **(COMMON | options))
    (folder.parent / "modules").write_text("\n".join(sys.modules))
    (folder.parent / f"result {rank}").write_text(outcome(done))


def launch(size, shard, folder, options, kill_at=None, kill_after=None, victim=0):
    """Run on `size` processes; whether a process was killed before the end.

    Args:
        kill_at: the number of the file operation of the victim that kills it.
        kill_after: seconds until it is killed.
    """
    (folder.parent / "store").unlink(missing_ok=True)
    where = "resume" if list_checkpoints(folder) else "output"
    options = options | {where: folder, "shard": shard}
    pids = {
        rank: forked(run, rank, size, folder, options, kill_at if rank == victim else None)
        for rank in range(size)
    }
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pids[victim], signal.SIGKILL)
    rank_of, ends = {pid: rank for rank, pid in pids.items()}, {}
    while len(ends) < size:
        pid, status = os.wait()
        ends[rank_of[pid]] = os.waitstatus_to_exitcode(status)
        if ends[rank_of[pid]]:
            for rank in set(pids) - set(ends):
                os.kill(pids[rank], signal.SIGKILL)
    if ends[victim] == -signal.SIGKILL and (kill_at, kill_after) != (None, None):
        return True
    assert not any(ends.values()), f"exit codes {ends}"
    return False


def import_modules(names):
    """What a process of a run has imported, so that the forks have it from here on."""
    for name in names:
        if name.startswith(("torch.", "fast.")) and name not in sys.modules:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)


def results(folder, size):
    return [(folder.parent / f"result {rank}").read_text() for rank in range(size)]


@pytest.mark.slow
def test_killed_ranks_end_the_same(tmp_path, capsys):
    campaign = Campaign("kills of ranks")
    chance = campaign.random
    wanted, kills = cases(20), 0
    torch.set_num_threads(1)
    folder = tmp_path / "run"
    for shard in (False, True):
        launch(2, shard, folder, {})
        shutil.rmtree(folder)
        import_modules((tmp_path / "modules").read_text().split())
    all_cases = list(itertools.product(CONFIGURATIONS, WAYS))
    chance.shuffle(all_cases)
    coming = itertools.cycle(all_cases)
    expected, length = {}, {}
    while kills < wanted:
        name, (size, shard) = next(coming)
        shutil.rmtree(folder, ignore_errors=True)
        options, case = CONFIGURATIONS[name], (name, size, shard)
        if case not in expected:
            began = time.monotonic()
            launch(size, shard, folder, options)
            expected[case], length[case] = results(folder, size), time.monotonic() - began
            shutil.rmtree(folder)
        plan = []
        for _ in range(chance.randint(1, 3)):
            victim = chance.randrange(size)
            if chance.random() < 0.5:
                victim, when = 0, {"kill_at": chance.randrange(60)}  # only the first writes files
            else:
                when = {"kill_after": chance.uniform(0, length[case])}
            if launch(size, shard, folder, options, victim=victim, **when):
                kills += 1
                plan.append((victim, when))
            else:  # it came to its end before
                break
        if not list_checkpoints(folder) or plan:
            launch(size, shard, folder, options)
        same = results(folder, size) == expected[case]
        campaign.count("same" if same else "DIFFERENT", None if same else f"{case}, {plan}")
        left = [p.name for p in folder.glob(".*")]
        if left:
            campaign.count("LEFT", f"{case}: {left}")
    campaign.name += f", {kills} kills"
    campaign.finish(capsys)
