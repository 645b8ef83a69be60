"""Ctrl-C and SIGTERM: a checkpoint of the last finished step, and the same weights after all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fast
from fast.models.saved import list_checkpoints
from helpers import same_state
from networks import ConvNet, images

TRAIN, VAL = images(64, 4, seed=1), images(30, 4, seed=2)
OPTIONS = {"steps": 12, "eval_every": 6, "batch_size": 16}


def start():
    torch.manual_seed(0)
    return ConvNet()


def signalling(number, at, times=1):
    """A transform that sends signals to this process in step `at`."""
    calls = [0]

    def transform(x):
        calls[0] += 1
        if calls[0] == at:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return x + 0.1 * torch.randn_like(x)

    return transform


@pytest.mark.filterwarnings("ignore:resume. the run was saved with values")
@pytest.mark.parametrize("at", [1, 4, 6])
def test_ctrl_c_saves_the_step_that_it_came_in(tmp_path, at):
    whole = fast.finetune(start(), TRAIN, VAL, **OPTIONS, transform=signalling(0, 99))
    options = OPTIONS | {"transform": signalling(signal.SIGINT, at)}
    with pytest.raises(KeyboardInterrupt):
        fast.finetune(start(), TRAIN, VAL, output=tmp_path, **options)
    assert [p.name for p in list_checkpoints(tmp_path)] == [f"checkpoint-{at:08d}"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    options = OPTIONS | {"transform": signalling(signal.SIGINT, 99)}
    again = fast.finetune(start(), TRAIN, VAL, resume=tmp_path, **options)
    assert same_state(again.model, whole.model)


def test_a_second_one_stops_at_once(tmp_path):
    transform = signalling(signal.SIGINT, 4, times=2)
    with pytest.raises(KeyboardInterrupt):
        fast.finetune(start(), TRAIN, VAL, output=tmp_path, **OPTIONS, transform=transform)
    assert list(tmp_path.iterdir()) == []


def test_a_handler_that_returns_lets_the_run_go_on(tmp_path, monkeypatch):
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append(1))
    try:
        transform = signalling(signal.SIGTERM, 4)
        result = fast.finetune(start(), TRAIN, output=tmp_path, **OPTIONS, transform=transform)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert came == [1]
    assert result.history[-1]["step"] == 12


TERMINATED = """
import os, signal, sys
import fast
from networks import ConvNet, images
from train.test_interrupt import signalling, TRAIN, OPTIONS
fast.finetune(ConvNet(), TRAIN, output=sys.argv[1], **OPTIONS,
              transform=signalling(signal.SIGTERM, 4))
"""


def test_sigterm_ends_the_process_as_before(tmp_path):
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TERMINATED, str(tmp_path)]
    process = subprocess.run(command, env=environment, check=False)
    assert process.returncode == -signal.SIGTERM
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-00000004"]
