"""Whose a folder is: one run at a time, and none that is no longer there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import fast
from fast.models.saved import is_going_on
from helpers import same_state
from networks import ConvNet, images

TRAIN = images(64, 4, seed=1)
OPTIONS = {"steps": 8, "eval_every": 2, "batch_size": 16}


def start():
    torch.manual_seed(0)
    return ConvNet()


def at_step(number, act):
    calls = [0]

    def transform(x):
        calls[0] += 1
        if calls[0] == number:
            act()
        return x

    return transform


@pytest.mark.parametrize("at", [1, 5])
def test_two_runs_into_one_folder(tmp_path, at):
    """The second, started while the first is going on, gets an error and changes nothing."""

    def second():
        assert is_going_on(tmp_path)
        before = sorted(p.name for p in tmp_path.iterdir())
        with pytest.raises(ValueError, match=r"another run is going on in|holds checkpoints"):
            fast.finetune(start(), TRAIN, output=tmp_path, **OPTIONS, seed=1)
        with pytest.raises(ValueError, match="a run is going on there"):
            result.save(tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == before

    result = fast.finetune(start(), TRAIN, **OPTIONS)
    fast.finetune(start(), TRAIN, output=tmp_path, **OPTIONS, transform=at_step(at, second))
    assert not is_going_on(tmp_path)


def test_a_run_that_goes_on_is_not_resumed_by_another(tmp_path):
    def second():
        for output in (None, tmp_path / "other"):
            with pytest.raises(ValueError, match="going on"):
                fast.finetune(start(), TRAIN, resume=tmp_path / "a", output=output, **OPTIONS)

    options = OPTIONS | {"transform": at_step(7, second)}
    fast.finetune(start(), TRAIN, output=tmp_path / "a", **options)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


KILLED = """
import sys
import fast
from train.test_run_folder import OPTIONS, TRAIN, at_step, die, start
fast.finetune(start(), TRAIN, output=sys.argv[1], **OPTIONS,
              transform=at_step(int(sys.argv[2]), die))
"""


def killed(folder, step):
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(folder), str(step)]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL


def test_the_claim_of_a_killed_run_is_no_obstacle(tmp_path):
    options = OPTIONS | {"transform": at_step(99, die)}
    killed(tmp_path, 1)
    assert (tmp_path / "run.json").is_file()
    with pytest.raises(FileNotFoundError, match=r"pass output=.* to start from the beginning"):
        fast.finetune(start(), TRAIN, resume=tmp_path, **options)
    (tmp_path / ".checkpoint-00000002-ab.unfinished").mkdir()
    (tmp_path / ".fast.json-ab.unfinished").mkdir()
    fast.finetune(start(), TRAIN, output=tmp_path, **options)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.filterwarnings("ignore:resume. the run was saved with values")
def test_a_killed_run_is_gone_on_with(tmp_path):
    killed(tmp_path, 5)
    run = json.loads((tmp_path / "run.json").read_text())["run"]
    transform = at_step(99, die)
    result = fast.finetune(start(), TRAIN, resume=tmp_path, **OPTIONS, transform=transform)
    assert result.run == run
    whole = fast.finetune(start(), TRAIN, **OPTIONS, transform=transform)
    assert same_state(result.model, whole.model)


@pytest.mark.parametrize("kind", ["deleted", "moved", "taken"])
def test_a_folder_that_is_gone_stops_the_run(tmp_path, kind):
    folder = tmp_path / "run"

    def remove():
        if kind == "deleted":
            shutil.rmtree(folder)
        elif kind == "moved":
            folder.rename(tmp_path / "elsewhere")
        else:
            (folder / "run.json").unlink()
            (folder / "run.json").write_text('{"run": "another"}')

    with pytest.raises(FileNotFoundError, match="was deleted, moved or taken by another run"):
        fast.finetune(start(), TRAIN, output=folder, **OPTIONS, transform=at_step(5, remove))
    assert folder.exists() == (kind == "taken")


def test_a_failing_run_leaves_nothing(tmp_path):
    def fail():
        raise OSError("no")

    transform = at_step(1, fail)
    with pytest.raises(OSError, match="no"):
        fast.finetune(start(), TRAIN, output=tmp_path / "a" / "b", **OPTIONS, transform=transform)
    with pytest.raises(TypeError):
        fast.finetune(start(), "no data", output=tmp_path / "a" / "b", **OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_a_result_is_not_written_over_by_a_run(tmp_path):
    fast.finetune(start(), TRAIN, **OPTIONS).save(tmp_path)
    with pytest.raises(ValueError, match="holds the result of another run"):
        fast.finetune(start(), TRAIN, output=tmp_path, **OPTIONS)


def test_a_run_in_another_thread_is_refused():
    """Both would draw from the generators of the process."""
    errors = []

    def second():
        try:
            fast.finetune(start(), TRAIN, **OPTIONS)
        except RuntimeError as error:
            errors.append(str(error))

    def start_second():
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()

    one = fast.finetune(start(), TRAIN, **OPTIONS, transform=at_step(3, start_second))
    assert errors
    assert errors[0].startswith("another thread of this process is in fast.finetune")
    assert same_state(one.model, fast.finetune(start(), TRAIN, **OPTIONS).model)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_are_as_open_as_the_user_lets_them(tmp_path, mask):
    before = os.umask(mask)
    try:
        fast.finetune(start(), TRAIN, output=tmp_path / "a", **OPTIONS).save(tmp_path / "a")
    finally:
        os.umask(before)
    for path in (tmp_path / "a").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path
