"""A disk that is full: the error names the file, and nothing half-written is in the way later."""

from __future__ import annotations

import json
import os
import signal
from contextlib import contextmanager

import pytest

import fast
from fast.cli.job_file import write_job
from fast.files import check_writable, write_json
from networks import ConvNet, images

resource = pytest.importorskip("resource", reason="files are limited by POSIX's setrlimit")
DATA = images(32, 4)
OPTIONS = {"steps": 4, "eval_every": 2, "batch_size": 16, "progress": False}


@pytest.fixture(autouse=True)
def in_memory(capsys):
    """What is printed goes to no file, which would be limited as well."""


@contextmanager
def files_of(size):
    """Let no file grow beyond this many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_it_is_noticed_before_any_work(tmp_path):
    with files_of(0), pytest.raises(ValueError, match=r"output .*cannot be written to"):
        check_writable(tmp_path / "new", "output")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [write_json, write_job])
def test_a_file_is_named_and_not_left_half_written(tmp_path, write):
    place = tmp_path if write is write_job else tmp_path / "data.json"
    with files_of(0), pytest.raises(OSError, match=r"(data|job)\.json"):
        write(place, {"model": "timm:resnet18"})
    assert list(tmp_path.iterdir()) == []


def test_a_device_is_written_to_and_a_link_stays_one(tmp_path):
    """`--csv /dev/stdout`: as root, the device would be replaced by a file."""
    pipe, link, there = (tmp_path / name for name in ("pipe", "link", "there.json"))
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_json(pipe, {"a": 1})
    assert json.loads(os.read(reader, 100)) == {"a": 1}
    os.close(reader)
    link.symlink_to(there)
    write_json(link, {"b": 2})
    assert pipe.is_fifo()
    assert link.is_symlink()
    assert json.loads(there.read_text()) == {"b": 2}
    assert sorted(tmp_path.iterdir()) == [link, pipe, there]


@pytest.mark.parametrize(("size", "file"), [(55, "run.json"), (400, "fast.json")])
def test_a_run_that_cannot_begin_leaves_nothing(tmp_path, size, file):
    with files_of(size), pytest.raises(OSError, match=file):
        fast.finetune(ConvNet(), DATA, output=tmp_path / "run", **OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_a_program_of_torch_is_not_half_written(tmp_path):
    result = fast.finetune(ConvNet(), DATA, **OPTIONS)
    with files_of(10_000), pytest.raises(OSError, match="served"):
        result.export(tmp_path / "served", "torch.export")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:.*run.log cannot be written")
def test_the_history_is_named(tmp_path):
    def fill(record):
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, most))

    with files_of(1 << 30), pytest.raises(OSError, match=r"history\.jsonl"):
        fast.finetune(ConvNet(), DATA, output=tmp_path, callbacks=[fill], **OPTIONS)


def test_a_run_goes_on_without_its_log(tmp_path):
    (tmp_path / "run.log").symlink_to("/dev/full")
    with pytest.warns(UserWarning, match=r"run\.log cannot be written \(No space") as warnings:
        result = fast.finetune(ConvNet(), DATA, output=tmp_path, **OPTIONS)
    assert result.final["step"] == 4
    assert len([w for w in warnings if "run.log" in str(w.message)]) == 1
    assert warnings[0].filename == __file__
