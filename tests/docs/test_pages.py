"""The Python of pages that no other test runs; and every page with Python is run by some test."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F

import fast
from helpers import ROOT
from networks import ConvNet, images

DOCS = ROOT / "docs"


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)


def run(code, names, **shorter):
    for long, short in shorter.items():
        assert long in code
        code = code.replace(long, short)
    exec(code, names)


@pytest.fixture
def names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (x, y), (x_old, y_old) = images(60, 5), images(40, 5, seed=1)
    known = {"x": x, "y": y, "x_old": x_old, "y_old": y_old, "kept": x_old, "train": (x, y)}
    modules = {"copy": copy, "fast": fast, "torch": torch, "F": F}
    return {**modules, **known, "val": (x, y), "model": ConvNet()}


def test_every_page_with_python_is_run_by_a_test():
    tests = "".join(file.read_text() for file in (ROOT / "tests").rglob("*.py"))
    pages = [page.name for page in DOCS.glob("*.md") if blocks(page.name)]
    assert len(pages) > 12
    assert [page for page in pages if f'"{page}"' not in tests] == []


def test_any_loss(names):
    own_loss, kept_head = blocks("any-loss.md")
    names |= {"loss": F.binary_cross_entropy_with_logits, "y": F.one_hot(names["y"], 5).float()}
    run(own_loss, names, **{"steps=150": "steps=3", "num_classes=3": "num_classes=5"})
    assert names["adaptation"].done == 3
    names |= {"model": ConvNet(), "x_new": names["x"], "y_new": names["train"][1]}
    run(kept_head, names, **{"steps=150": "steps=3"})
    assert names["adaptation"].plan.head == "keep"


def test_forgetting(names, monkeypatch):
    (block,) = blocks("forgetting.md")
    finetune, results = fast.finetune, []

    def short(*args, **options):
        results.append(finetune(*args, steps=2, **options))

    monkeypatch.setattr(fast, "finetune", short)
    for line in block.splitlines():  # each is about the pretrained network
        exec(line, {**names, "model": copy.deepcopy(names["model"])})
    assert [r.config.forget_budget for r in results] == [0.1, "2%", None]
    assert results[2].config.method == "ewc"


def test_landscape(names, monkeypatch):
    (block,) = blocks("landscape.md")
    finetune, landscape = fast.finetune, fast.landscape
    monkeypatch.setattr(fast, "finetune", lambda *a, **k: finetune(*a, steps=4, **k))
    monkeypatch.setattr(fast, "landscape", lambda *a: landscape(*a, resolution=5, num_stiff=2))
    exec(block, names)
    assert set(names["paths"]) == {"fast", "vanilla"}
    assert len(names["plane"].source_loss) == len(names["plane"].y)


def test_profiling(names, tmp_path):
    names |= {"loss_fn": F.cross_entropy, "optimizer": fast.AdamW(names["model"].parameters())}
    exec(*blocks("profiling.md"), names)
    assert "fast::step" in (tmp_path / "steps.json").read_text()


def test_update(names, tmp_path):
    pytest.importorskip("timm", reason="the page takes an optimizer of timm")
    names["path"] = tmp_path / "state.pt"
    fast.replace_head(names["model"], 4, sample=names["x"])
    exec(*blocks("update.md"), names)
    assert set(torch.load(names["path"], weights_only=True)) == {"optimizer", "pull"}


def test_curvature(names):
    pytest.importorskip("matplotlib", reason="the page draws a spectrum")
    names["model"] = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5)).double()
    block, loop = blocks("curvature.md")
    names["loader"] = [(names["x"].double(), names["y"])]
    names["V"] = names["b"] = torch.randn(325, dtype=torch.float64)
    run(block, names, **{'"head.*"': '"1.*"', ".solve(b)": ".damped(1.0).solve(b)"})
    assert (names["H"] @ names["V"]).shape == names["V"].shape
    run(loop, names)
    torch.testing.assert_close(names["HV"], names["H"] @ names["V"])


def test_own_loop_accumulates_gradients(names):
    constructor, _ = blocks("own-loop.md")[0].split("model.train()\n")
    shorter = {"steps=1000": "steps=4", "batch_size=64": "batch_size=32, grad_accum_steps=2"}
    run(constructor, names, **shorter)
    exec(blocks("own-loop.md")[2], names)
    assert names["adaptation"].done == 4


def test_own_loop_goes_on_from_its_checkpoint(names):
    saving, loading = blocks("own-loop.md")[1].split("...\n")
    start, loop = copy.deepcopy(names["model"]), blocks("own-loop.md")[0]
    constructor, rest = loop.split("model.train()\n")
    shorter = {"steps=1000": "steps=6", "batch_size=64": "batch_size=32"}
    stop = {
        "optimizer.zero_grad()\n": "optimizer.zero_grad()\n    if adaptation.done == 3: break\n"
    }
    run(constructor, names, **shorter)
    run(rest.split("result =")[0], names, **stop)
    exec(saving, names)
    names["model"] = start
    run(constructor, names, **shorter, **{"kept,": "kept, resuming=True,"})
    exec(loading, names)
    assert names["adaptation"].done == 3
    exec(rest, names)
    assert names["adaptation"].done == 6
