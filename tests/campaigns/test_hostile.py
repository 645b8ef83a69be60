"""Files of strangers: each is one line on the command line, in little time and memory.

    pytest -m slow tests/campaigns/test_hostile.py

Each case is a fork of this process. What is measured is the processor time and the memory that the
command itself takes, beyond the import.
"""

from __future__ import annotations

import contextlib
import os
import resource
import runpy
import shutil
import signal
import sys
import threading
import traceback

import pytest
import torch
from safetensors.torch import save_file

from campaigns.campaign import Campaign
from campaigns.hostile import all_cases, prepare
from cli.conftest import NETS
from fast.cli import FAILED, main

SECONDS, MEGABYTES, HANGS = 2.0, 500, 60.0
# Files that may be read as they are: names are shown with their escapes, a link is followed.
MAY_WORK = (
    "a folder as an image",
    "escapes",
    "climbs",
    "holds itself",
    "empty",
    "a list",
    "null",
    "not used",
    "history: 8 GB",
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "nets.py").write_text(NETS)
    torch.manual_seed(0)
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        save_file(runpy.run_path("nets.py")["Net"](3).state_dict(), "net.safetensors")
        prepare(folder)
        run = ("finetune", "--model", "nets.py:Net(3)", "--weights", "net.safetensors")
        options = ("--data", "good.npz", "--steps", "2", "--output", "run", "--no-progress")
        assert main([*run, *options]) == 0
    return folder


def command(folder, argv):
    """Exit code, stderr, stdout, seconds and megabytes of a command in a fork of this process."""
    pid = os.fork()
    if not pid:
        try:
            os.chdir(folder)
            for stream, number in (("out", 1), ("err", 2)):
                os.dup2(os.open(stream, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
            limit = 16 << 30  # a backstop for this machine
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            code = main(argv) if argv else 0
        except BaseException:  # noqa: BLE001  (it is what is looked for)
            traceback.print_exc()
            code = 99
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    timer = threading.Timer(HANGS, os.kill, (pid, signal.SIGKILL))
    timer.start()
    _, status, usage = os.wait4(pid, 0)
    timer.cancel()
    out, err = ((folder / name).read_text(errors="replace") for name in ("out", "err"))
    seconds = usage.ru_utime + usage.ru_stime
    return os.waitstatus_to_exitcode(status), err, out, seconds, usage.ru_maxrss / 1024


def faults(place, code, err, out, seconds, megabytes, may_work):
    """What was wrong with an answer about the file at `place`, in words."""
    lines = err.splitlines()
    if code < 0:
        yield "hangs" if code == -signal.SIGKILL else f"dies of signal {-code}"
    elif code == 0 and not may_work and "are left out" not in err:
        yield "is taken without a word"
    elif code and ("Traceback" in err or code == 99):
        yield "a traceback"
    elif code and sum(line.startswith("fast: error:") for line in lines) != 1:
        yield f"{len(lines)} lines"
    elif code == FAILED:
        yield "no message was written for it"
    elif code and not any(part in lines[-1] for part in (place.split("/")[0], "card")):
        yield "the file is not named"
    if any(not c.isprintable() and c != "\n" for c in err + out):
        yield "raw control characters"
    if seconds > SECONDS:
        yield f"{seconds:.1f} s"
    if megabytes > MEGABYTES:
        yield f"{megabytes:.0f} MB"


@pytest.mark.slow
def test_hostile_files(files, tmp_path, capsys, monkeypatch):
    campaign = Campaign("hostile files")
    monkeypatch.setenv("XDG_STATE_HOME", str(files / "state"))
    *_, base = command(tmp_path, [])
    for name, place, build, argv in all_cases():
        folder = tmp_path / "case"
        shutil.copytree(files, folder)
        build(folder)
        code, err, out, seconds, megabytes = command(folder, list(argv))
        may_work = any(part in name for part in MAY_WORK)
        found = list(faults(place, code, err, out, seconds, megabytes - base, may_work))
        if (folder / "ran").exists():
            found.append("runs code")
        told = err.splitlines()[-1][:200] if err else ""
        outcome = "WRONG" if found else "refused" if code else "read"
        campaign.count(outcome, f"{name}: {', '.join(found)}: {told}" if found else None)
        shutil.rmtree(folder)
    campaign.finish(capsys)
