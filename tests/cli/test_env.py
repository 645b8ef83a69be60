"""`fast env` tells what is there, as text and as JSON."""

import json

import torch

import fastkernels
from fast.cli import main


def test_json(capsys):
    assert main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"] == torch.__version__
    rows = fastkernels.explain()
    assert [(k["op"], k["backend"], k["available"]) for k in facts["kernels"]] == [
        (r.op, r.backend, r.available) for r in rows
    ]
    assert all(k["reason"] for k in facts["kernels"])
    assert "timm" in facts["libraries"]


def test_text_has_a_line_for_each_kernel(capsys):
    assert main(["env"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for row in fastkernels.explain():
        answer = "yes" if row.available else "no"
        assert any(line[:4] == [row.op, row.backend, row.device, answer] for line in lines)
