"""The entry point: help, exit codes, and what it must not import."""

import errno
import os
import signal
import subprocess
import sys
import warnings

import pytest
import torch

from fast import __version__
from fast.cli import COMMANDS, main
from fast.cli.notes import as_typed
from fast.train.config import TrainConfig
from helpers import run_python


def test_help_lists_the_commands_and_imports_no_torch():
    code = "import sys, fast.cli; fast.cli.main(['--help']); assert 'torch' not in sys.modules"
    text = run_python(code)
    for name in COMMANDS:
        assert f"\n    {name} " in text
    assert len(text.splitlines()) < 30


def test_help_of_a_command_imports_no_torch():
    """All options are read without it: torch takes seconds to import."""
    code = (
        "import sys, fast.cli\n"
        "for name in fast.cli.COMMANDS: assert fast.cli.main([name, '--help']) == 0\n"
        "assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules)"
    )
    run_python(code)


def test_finetune_has_an_option_for_every_field_of_the_config(capsys):
    assert main(["finetune", "--help"]) == 0
    text = capsys.readouterr().out
    for name in TrainConfig.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in text


def test_public_names_load_on_first_use():
    code = (
        "import sys, fast; assert 'torch' not in sys.modules;"
        "assert all(getattr(fast, name) for name in fast.__all__);"
        "assert set(fast.__all__) <= set(dir(fast)) and not hasattr(fast, 'nothing')"
    )
    run_python(code)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"fast {__version__}"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND (fast --help lists the options)"),
        (["fintune"], "no command 'fintune'; did you mean finetune? (fast --help)"),
        (["zzz"], "no command 'zzz'; there are finetune, predict, "),
        (
            ["finetune", "--steps", "x"],
            "argument --steps: invalid int value: 'x' (fast finetune --",
        ),
        (
            ["finetune", "--modle", "x"],
            "arguments: --modle x; did you mean --model? (fast finetune",
        ),
        (
            ["finetune", "--method", "lora"],
            "argument --method: invalid choice: 'lora' (choose from",
        ),
        (["env", "--nope\x1b[2J"], "unrecognized arguments: --nope\\x1b[2J (fast env --help"),
    ],
)
def test_a_misspelt_command_line_is_one_line(argv, message, capsys):
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fast: error: ")
    assert message in line


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "fast.cli", "finetune", "--model", "m.py:N"]
    process = subprocess.run([*command, "--data", "no.npz"], capture_output=True, cwd=tmp_path)
    assert process.returncode == 2
    assert process.stderr.decode().splitlines() == ["fast: error: no.npz: no such file"]
    assert list(tmp_path.iterdir()) == []


class OutOfMemoryError(RuntimeError):
    """By the name of torch's."""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\n  lines"), "two lines"),
        (OutOfMemoryError("20 GiB"), "out of memory: lower --batch-size (20 GiB)"),
        (
            UnicodeEncodeError("utf-8", "w\udce4.png", 1, 2, "surrogates not allowed"),
            r"w\udce4.png: is not UTF-8: rename the file, or set a locale of UTF-8 (LANG=C.UTF-8)",
        ),
    ],
)
def test_an_error_of_several_lines_is_one(error, line, monkeypatch, capsys):
    def run(spec):
        raise error

    monkeypatch.setattr("fast.cli.commands.env.run", run)
    assert main(["env"]) == 2
    assert capsys.readouterr().err.splitlines() == [f"fast: error: {line}"]


def test_what_no_message_was_written_for_is_one_line_with_its_place(monkeypatch, capsys):
    def run(spec):
        torch.ones(2, 3) @ torch.ones(2, 3)

    monkeypatch.setattr("fast.cli.commands.env.run", run)
    assert main(["env"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fast: error: test_main.py:")
    assert "raised RuntimeError: mat1 and mat2 shapes" in line
    monkeypatch.setenv("FAST_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="mat1"):
        main(["env"])


def test_a_warning_is_a_note_without_its_source_line(monkeypatch, capsys):
    def run(spec):
        warnings.simplefilter("always")
        warnings.warn("look\n out\x1b[2J", stacklevel=1)
        return 0

    monkeypatch.setattr("fast.cli.commands.env.run", run)
    assert main(["env"]) == 0
    assert capsys.readouterr().err == "fast: note: look out\\x1b[2J\n"


def test_sigterm_has_an_exit_code_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr(
        "fast.cli.commands.env.run", lambda spec: signal.raise_signal(signal.SIGTERM)
    )
    assert main(["env"]) == 143
    assert capsys.readouterr().err == "fast: terminated\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def __init__(self):\n        {}['a']", "nets.py: Net() raised KeyError: 'a'"),
        ("def forward(self, x):\n        return self.gone", "no attribute 'gone' (nets.py:"),
        (
            "def forward(self, x):\n        return {0: super().forward(x)}[self.training]",
            "nets.py:27 raised KeyError: True (FAST_TRACEBACK=1 shows where)",
        ),
        ("x = {}['a']", "nets.py raised KeyError: 'a'"),
    ],
)
def test_errors_of_a_model_file_name_it_in_one_line(job, body, message):
    with (job.folder / "nets.py").open("a") as file:
        file.write(f"\n\nBase = Net\n\nclass Net(Base):\n    {body}\n")
    code, _, err = job.fast("finetune", "--model", "nets.py:Net", *job.args[4:], "--steps", 2)
    assert code == 2
    assert message in err.splitlines()[-1]


def test_a_backend_that_is_not_there_is_one_line(job, monkeypatch):
    monkeypatch.setenv("FASTKERNELS_BACKEND", "foo")
    code, _, err = job.fast("finetune", *job.args, "--steps", 2)
    assert code == 2
    assert "has no backend for FASTKERNELS_BACKEND=foo: backends" in err.splitlines()[-1]


@pytest.mark.parametrize("command", [["landscape", "--demo"], ["retention", "--demo"], ["demo"]])
def test_where_to_write_is_checked_before_anything_is_run(tmp_path, capsys, command, monkeypatch):
    monkeypatch.setattr("fast.cli.task.digits.pretrain", None)  # not called
    file = tmp_path / "file"
    file.write_text("mine")
    assert main([*command, "--output", str(file)]) == 2
    assert f"--output {file}: is a file; name a folder" in capsys.readouterr().err
    assert main([*command, "--output", str(file / "folder")]) == 2
    assert "cannot be written to (Not a directory)" in capsys.readouterr().err
    assert main([*command, "--output", str(tmp_path / "o\udce4")]) == 2
    assert r"o\udce4: its name is not UTF-8: name another folder" in capsys.readouterr().err
    assert file.read_text() == "mine"


def test_a_reader_that_has_read_enough_is_no_error():
    code = "import sys, fast.cli; sys.exit(fast.cli.main(['env']))"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as run:
        run.stdout.close()
        assert run.stderr.read() == b""
        assert run.wait() == 141


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a full disk to write to")
@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("argv", [["env"], ["--help"], ["finetune", "--help"]])
def test_a_full_disk_behind_what_is_printed_is_told(buffered, argv):
    code = f"import sys, fast.cli; sys.exit(fast.cli.main({argv}))"
    where = os.environ | {"PYTHONUNBUFFERED": "" if buffered else "1"}
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, "-c", code],
            stdout=full,
            stderr=subprocess.PIPE,
            env=where,
            check=False,
        )
    message = f"what is printed cannot be written to stdout: {os.strerror(errno.ENOSPC)}"
    assert run.stderr.decode().splitlines() == [f"fast: error: {message}"]
    assert run.returncode == 2


def test_a_closed_stdout_is_no_error(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    assert main(["env"]) == 0


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("FAST_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        main(["finetune", "--model", "m.py:N", "--data", "no.npz"])


@pytest.mark.parametrize(
    ("message", "typed"),
    [
        (
            "no source_inputs: method='adapter' may do",
            "no --source-inputs: --method adapter may do",
        ),
        ("pass source_inputs=, or rehearse=0.", "pass --source-inputs, or --rehearse 0."),
        ("shard=True is not used", "--shard is not used"),
        ("pass max_entropy=False", "pass --no-max-entropy"),
        ("out is there: pass resume='a b'", "out is there: pass --resume 'a b'"),
        (
            "train: all labels are 0; pass num_classes=",
            "--data: all labels are 0; pass num_classes=",
        ),
        ("source: must be a number", "--source: must be a number"),
        # Names of files, calls in Python, and words.
        ("--data batch_size: is empty", "--data batch_size: is empty"),
        ("runs/lr=0.1/model.pt: no such file", "runs/lr=0.1/model.pt: no such file"),
        ("lr=0.1/model.pt: no such file", "lr=0.1/model.pt: no such file"),
        ("nets.py:Net(20, head='fc'): unknown", "nets.py:Net(20, head='fc'): unknown"),
        ("fast.load(folder, model=...)", "fast.load(folder, model=...)"),
        ("the source and its data", "the source and its data"),
    ],
)
def test_messages_name_options_as_they_are_typed(message, typed):
    assert as_typed(message) == typed


def test_a_plan_names_options_as_they_are_typed(job):
    code, _, err = job.fast("finetune", *job.args, "--plan")
    assert code == 0, err
    assert "no --source-inputs: --method adapter would forget nothing" in err
    code, _, err = job.fast("finetune", *job.args, "--plan", "--rehearse", 1, "--batch-size", 1)
    assert "--rehearse 1 is not used: there are no --source-inputs" in err
