"""The README's Python runs as it stands, and what it names is there."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch

import fast
from networks import ConvNet, images

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 5
    x, y = images(200, 5)
    x_old, y_old = images(50, 5, seed=1)
    names = {"torch": torch, "x": x, "y": y, "x_val": x, "y_val": y, "x_old": x_old, "y_old": y_old}
    names |= {"x_kept": images(40, 5, seed=2)[0]}
    torch.manual_seed(0)
    for block in blocks:
        names["model"] = model = ConvNet()
        names["V"] = torch.ones(sum(p.numel() for p in model.parameters()))
        exec(block, names)
    assert (tmp_path / "adapted" / "model.safetensors").is_file()
    assert (tmp_path / "model.card.safetensors").is_file()
    assert set(names["optimizer"].stats()) == {"grad_norm", "drift", "update_norm", "forgetting"}


def test_the_loop_of_the_docs_gives_the_weights_of_finetune(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "own-loop.md").read_text()
    loop = page.split("```python\n")[1].split("```")[0].replace("steps=1000", "steps=20")
    (x, y), kept = images(200, 5), images(40, 5, seed=2)[0]
    torch.manual_seed(1)
    model = ConvNet()
    names = {"model": copy.deepcopy(model), "x": x, "y": y, "kept": kept}
    exec(loop, names)
    result = fast.finetune(model, (x, y), source_inputs=kept, steps=20, batch_size=64, seed=0)
    ours, theirs = names["result"].model.state_dict(), result.model.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_the_two_commands_are_on_the_first_screen():
    first_screen = README[: README.index("## In a loop")]
    assert "pip install -c constraints.txt . && fast demo" in first_screen
    assert "pip install -c constraints.txt -e '.[test]' && pytest" in first_screen
    assert re.search(r"^\| .* \|$", first_screen, flags=re.MULTILINE)


PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:|mailto:)([^)#\s]+)[^)]*\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []
