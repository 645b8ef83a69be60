"""The notebooks of the docs run from their first cell to the last, and are kept without outputs.

Their cells are run in order in one namespace of this process. A kernel (nbclient) would start a
second interpreter that imports torch again, and needs ten packages that nothing else here does; all
that it adds are outputs, which are not kept. `!fast ...` is the command line, in this process too.
"""

from __future__ import annotations

import json
import os
import shlex

import pytest

from fast.cli import main
from helpers import ROOT

FOLDER = ROOT / "docs" / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))


def cells(name):
    return json.loads((FOLDER / name).read_text())["cells"]


def run(name, names):
    """Run the code of a notebook; `names` are its variables afterwards."""
    for number, cell in enumerate(cells(name)):
        if cell["cell_type"] != "code":
            continue
        code = "".join(cell["source"])
        if code.startswith("!fast "):
            for line in code.replace("\\\n", " ").splitlines():
                assert main(shlex.split(line)[1:]) == 0, line
        else:
            exec(compile(code, f"{name}, cell {number}", "exec"), names)
    return names


@pytest.fixture
def figures(tmp_path, monkeypatch):
    """The figures that were shown; the current folder is an empty one."""
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="the notebooks draw")
    pytest.importorskip("sklearn", reason="the notebooks use scikit-learn's data")
    monkeypatch.chdir(tmp_path)
    pyplot.switch_backend("Agg")
    shown = []

    def show():
        shown.append(pyplot.gcf())
        shown[-1].savefig(tmp_path / f"{len(shown)}.png")
        pyplot.close()

    monkeypatch.setattr(pyplot, "show", show)
    return shown


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_kept_without_outputs(name):
    assert cells(name)[0]["source"][0].startswith("# ")
    code = [cell for cell in cells(name) if cell["cell_type"] == "code"]
    assert code
    assert [cell["outputs"] for cell in code] == [[]] * len(code)
    assert {cell["execution_count"] for cell in code} == {None}


@pytest.mark.slow
def test_own_loop(figures, tmp_path):
    names = run("own-loop.ipynb", {})
    assert len(figures) == 2
    accuracy, test = names["accuracy"], names["target_test"]
    models = {name: result.model for name, (result, _) in names["runs"].items()}
    learned = {name: accuracy(model, test) for name, model in models.items()}
    lost = {name: sum(names["by_digit"](model)) / 5 for name, model in models.items()}
    # This is what the notebook says.
    assert learned["FAST"] > learned["plain"] - 2
    assert lost["plain"] > 5
    assert lost["FAST"] < 1
    assert lost["FAST with source inputs"] < 1
    assert names["forecast"] <= 0.01
    assert (tmp_path / "adapted" / "model.safetensors").is_file()


@pytest.mark.slow
def test_photos(figures, tmp_path):
    pytest.importorskip("PIL", reason="image files need Pillow")
    pytest.importorskip("timm", reason="the network is timm's")
    pytest.importorskip("torchvision.transforms.v2", reason="it prepares images")
    pytest.importorskip("onnxscript", reason="the network is exported to ONNX")
    names = run("photos.ipynb", {})
    assert len(figures) == 1
    assert sorted(answer.label for answer in names["answers"]) == sorted(names["things"])
    result = json.loads((tmp_path / "runs" / "photos" / "result.json").read_text())
    assert result["target_accuracy"] > 0.85
    assert result["source_accuracy"] > result["source_accuracy_before"] - 0.03
    evaluation = tmp_path / "runs" / "photos" / "evaluation-source" / "evaluation.json"
    assert json.loads(evaluation.read_text())["accuracy"] == result["source_accuracy"]
    assert {"model.onnx", "preprocessing.json"} <= set(os.listdir(tmp_path / "served"))
