"""Runs that are killed, at random moments and inside of saves, end in the same weights after all.

    pytest -m slow tests/campaigns/test_kills.py

Each run is a fork of this process, so that nothing is imported again.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
import torch

import fast
from campaigns.campaign import Campaign, cases
from campaigns.forks import forked, kill_at_file_event, outcome
from fast.models.saved import list_checkpoints
from networks import ConvNet, images

KEPT = images(40, 5, seed=3)
COMMON = {"steps": 12, "eval_every": 4, "save_every": 2, "batch_size": 16, "progress": False}
CONFIGURATIONS = {
    "fast": {},
    "fast, source inputs": {"source_inputs": KEPT[0]},
    "fast, nats": {"source_inputs": KEPT[0], "forget_budget": 0.05},
    "fast, points": {"source_inputs": KEPT, "forget_budget": "5%"},
    "fast, frozen": {"batch_norm": "frozen", "source_inputs": KEPT[0]},
    "fast, track": {"batch_norm": "track"},
    "fast, accumulated": {"grad_accum_steps": 2, "max_grad_norm": 1.0},
    "fast, patience": {"patience": 2, "lr": 3e-2},
    "fast, sgd": {"optimizer": "sgd", "lr": 1e-2},
    "fast, bf16": {"precision": "bf16"},
    "fast, class weights": {"class_weights": "balanced", "label_smoothing": 0.1},
    "vanilla": {"method": "vanilla"},
    "lp-ft": {"method": "lp-ft"},
    "l2-sp": {"method": "l2-sp"},
    "ewc": {"method": "ewc", "source_inputs": KEPT[0]},
    "replay": {"method": "replay", "source_inputs": KEPT},
}
# What a save does to files, by the names of Python's audit events.
FILE_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate")


class Augmentation:
    """Draws from the generators of the process, and from one of its own."""

    def __init__(self):
        self.own = np.random.default_rng(7)

    def __call__(self, x):
        return x + 0.1 * torch.randn_like(x) + 0.01 * random.random() + 0.01 * self.own.normal()


def run(folder, result, options, kill_at=None):
    """One run to its end, in the process that calls; writes the hash of what it came to."""
    train, val = images(64, 4, seed=1), images(30, 4, seed=2)
    torch.manual_seed(0)
    if kill_at is not None:
        kill_at_file_event(kill_at, folder, FILE_EVENTS)
    where = "resume" if list_checkpoints(folder) else "output"
    options = COMMON | options | {where: folder}
    done = fast.finetune(ConvNet(), train, val, transform=Augmentation(), **options)
    result.write_text(outcome(done))


def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.slow
def test_killed_runs_end_the_same(tmp_path, capsys):
    campaign = Campaign("kills")
    chance = campaign.random
    wanted, kills = cases(100), 0
    expected, length = {}, {}
    run(tmp_path / "first", tmp_path / "result", {})  # so that forks need not import anything
    names = itertools.cycle(CONFIGURATIONS)
    while kills < wanted:
        name = next(names)
        options = CONFIGURATIONS[name]
        result = tmp_path / "result"
        if name not in expected:
            began = time.monotonic()
            assert ended(forked(run, tmp_path / "whole", result, options)) == 0, name
            expected[name], length[name] = result.read_text(), time.monotonic() - began
            shutil.rmtree(tmp_path / "whole")
        folder, plan = tmp_path / "run", []
        for _ in range(chance.randint(1, 3)):
            inside = chance.random() < 0.5
            pid = forked(run, folder, result, options, chance.randrange(80) if inside else None)
            if not inside:
                time.sleep(chance.uniform(0, length[name]))
                os.kill(pid, signal.SIGKILL)
            if ended(pid) == -signal.SIGKILL:
                kills += 1
                plan.append("inside a save" if inside else "at random")
        if ended(forked(run, folder, result, options)) != 0:
            campaign.count("FAILED", f"{name}, {plan}")
            result.unlink(missing_ok=True)
        else:
            same = result.read_text() == expected[name]
            campaign.count("same" if same else "DIFFERENT", None if same else f"{name}, {plan}")
        left = [p.name for p in folder.glob(".*")]
        if left:
            campaign.count("LEFT", f"{name}: {left}")
        shutil.rmtree(folder)
    campaign.name += f", {kills} kills"
    campaign.finish(capsys)
