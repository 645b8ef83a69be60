"""`fast audit` of a network in a file."""

import pytest

from fast.cli import main

NETS = """
from torch import nn
def net():
    return nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2))
def words():
    return nn.Sequential(nn.Embedding(9, 3), nn.Flatten(), nn.Linear(12, 2))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_modules_are_named_that_torch_has_wrong(folder, capsys):
    assert main(["audit", "--model", "nets.py:net", "--input", "3x6"]) == 0
    out = capsys.readouterr().out
    assert "| 0 (Linear) | exact | exact | exact | exact |" in out
    assert "modules with a wrong second derivative in torch" in out


def test_tokens_are_whole_numbers(folder, capsys):
    assert main(["audit", "--model", "nets.py:words", "--input", "3x4", "--tokens", "9"]) == 0
    assert "| 0 (Embedding) |" in capsys.readouterr().out


def test_what_is_missing_is_named(folder, capsys):
    assert main(["audit", "--model", "nets.py:net"]) == 2
    assert "--input must be given" in capsys.readouterr().err
    assert main(["audit", "--model", "nets.py:net", "--input", "3,6"]) == 2
    assert "sizes joined by x" in capsys.readouterr().err
