"""The Python of docs/predict.md runs as it stands. That of docs/production.md is run by
test_newcomer.py and test_frameworks.py."""

from __future__ import annotations

import re

from helpers import ROOT
from networks import ConvNet


def test_the_python_of_the_page_runs(adapted, tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "predict.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapted").symlink_to(adapted.folder)
    names = {"model": ConvNet(2), "x": adapted.x, "y": adapted.y}
    exec(block, names)
    assert (tmp_path / "answers.csv").read_text().startswith("input,label,probability,ant,bee")
    assert names["evaluation"].accuracy == adapted.result.target_accuracy
    assert capsys.readouterr().out.count("\n") == 4
    assert names["before"].classes == ["0", "1", "2", "3", "4"]
