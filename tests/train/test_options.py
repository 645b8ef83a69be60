"""The options: each is written down for the run and for type checkers."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import typing

import pytest
import torch

from fast.adapt.config import AdaptConfig, AdaptOptions
from fast.adapt.methods import METHODS, MethodName
from fast.train.config import TrainConfig, TrainOptions
from helpers import ROOT


@pytest.mark.parametrize(
    ("record", "keywords"), [(AdaptConfig, AdaptOptions), (TrainConfig, TrainOptions)]
)
def test_a_type_checker_knows_every_option(record, keywords):
    hints = typing.get_type_hints(keywords, localns={"torch": torch})
    fields = {f.name: f for f in dataclasses.fields(record)}
    # `fast.Adaptation` has an argument of that name, which may be a function too.
    assert set(fields) - set(hints) <= {"optimizer"}
    assert set(hints) <= set(fields)
    for name, hint in hints.items():
        members = set(typing.get_args(hint)) or {hint}
        if fields[name].metadata["choices"]:
            literal = next((m for m in members if typing.get_args(m)), hint)
            assert typing.get_args(literal) == fields[name].metadata["choices"], name
        optional = fields[name].default is None
        assert (type(None) in members) == optional, name


def test_methods_have_the_names_that_are_promised():
    assert typing.get_args(MethodName) == tuple(METHODS)


GOOD = """
import torch, fast
from pathlib import Path
model, data = torch.nn.Linear(2, 2), (torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))
def log(record: dict[str, object]) -> None: ...
fast.finetune(model, data, epochs=4, method="lp-ft", output=Path("run"), class_weights=[1.0, 2.0])
fast.finetune(model, data, batch_norm=None, precision="bf16", callbacks=[log])
fast.Adaptation(model, data, steps=3, optimizer="sgd", schedule="constant")
"""
BAD = {
    "fast.finetune(model, data, epochz=4)": "epochz",
    'fast.finetune(model, data, method="fst")': "method",
    'fast.finetune(model, data, precision="float16")': "precision",
    'fast.finetune(model, data, class_weights="balance")': "class_weights",
    "fast.finetune(model, data, callbacks=log)": "callbacks",
    "fast.Adaptation(model, data, anchor_deccay=1.0)": "anchor_deccay",
    'fast.Adaptation(model, data, optimizer="adam")': "optimizer",
}


@pytest.mark.slow
def test_mypy_finds_a_slip(tmp_path):
    pytest.importorskip("mypy", reason="mypy is what finds it")
    file = tmp_path / "usage.py"
    file.write_text(GOOD + "\n".join(BAD))
    first = GOOD.count("\n") + 1
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", str(ROOT / ".mypy_cache"), str(file)],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": os.pathsep.join((str(ROOT / "python"), str(ROOT)))},
        capture_output=True,
        text=True,
        check=False,
    )
    found = [line for line in checked.stdout.splitlines() if line.startswith("usage.py:")]
    errors = {int(line.split(":")[1]): line for line in found if ": error:" in line}
    assert set(errors) == set(range(first, first + len(BAD))), checked.stdout + checked.stderr
    for line, word in enumerate(BAD.values(), start=first):
        assert word in errors[line]
