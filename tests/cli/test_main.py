"""The entry point: help, exit codes, and what it must not import."""

import subprocess
import sys

import pytest

from fast import __version__
from fast.cli import COMMANDS, main
from fast.train.config import TrainConfig


def python(*args, **kwargs):
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, **kwargs)


def test_help_lists_the_commands_and_imports_no_torch():
    code = "import sys, fast.cli; fast.cli.main(['--help']); assert 'torch' not in sys.modules"
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"\n    {name} " in done.stdout
    assert len(done.stdout.splitlines()) < 25


def test_help_of_a_command_imports_no_torch():
    code = (
        "import sys, fast.cli; fast.cli.main(['finetune', '--help']);"
        "assert 'torch' not in sys.modules"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


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
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"fast {__version__}"


@pytest.mark.parametrize("argv", [[], ["train"], ["finetune", "--steps", "x"], ["env", "--nope"]])
def test_usage_errors(argv, capsys):
    assert main(argv) == 2
    assert "usage: fast" in capsys.readouterr().err


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    done = python(
        "-m", "fast.cli", "finetune", "--model", "m.py:N", "--data", "no.npz", cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["fast: error: no.npz: no such file"]
    assert list(tmp_path.iterdir()) == []


class OutOfMemoryError(RuntimeError):
    """By the name of torch's."""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\n  lines"), "two lines"),
        (OutOfMemoryError("20 GiB"), "out of memory: lower --batch-size (20 GiB)"),
    ],
)
def test_an_error_of_several_lines_is_one(error, line, monkeypatch, capsys):
    def run(args):
        raise error

    monkeypatch.setattr("fast.cli.env.run", run)
    assert main(["env"]) == 2
    assert capsys.readouterr().err.splitlines() == [f"fast: error: {line}"]


def test_other_runtime_errors_are_ours_and_keep_their_traceback(monkeypatch):
    def run(args):
        raise RuntimeError("a bug")

    monkeypatch.setattr("fast.cli.env.run", run)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["env"])


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


def test_a_misspelt_option_shows_the_usage_of_its_command(capsys):
    assert main(["finetune", "--modle", "x"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("usage: fast finetune ")
    assert "--model SPEC" in err
    assert err.splitlines()[-1] == "fast finetune: error: unrecognized arguments: --modle x"


@pytest.mark.parametrize("command", [["landscape", "--demo"], ["retention", "--demo"], ["demo"]])
def test_where_to_write_is_checked_before_anything_is_run(tmp_path, capsys, command, monkeypatch):
    monkeypatch.setattr("fast.cli.demo.pretrain", None)  # not called
    file = tmp_path / "file"
    file.write_text("mine")
    assert main([*command, "--output", str(file)]) == 2
    assert f"--output {file}: is a file; name a folder" in capsys.readouterr().err
    assert main([*command, "--output", str(file / "folder")]) == 2
    assert "cannot be written to (Not a directory)" in capsys.readouterr().err
    assert file.read_text() == "mine"


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("FAST_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        main(["finetune", "--model", "m.py:N", "--data", "no.npz"])
