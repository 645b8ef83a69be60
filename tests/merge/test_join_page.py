"""The Python of docs/join.md runs as it stands, on small networks and for a few steps."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from networks import ConvNet, images, taught

PAGE = (Path(__file__).parents[2] / "docs" / "join.md").read_text()


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) == 5
    (x, y), (x_val, y_val) = ((-a, b) for a, b in (images(200, 4), images(100, 4, seed=1)))
    (x_3, y_3), (x_3_val, y_3_val) = ((a.mT, b) for a, b in (images(200, 3), images(60, 3, seed=1)))
    names = {"torch": torch, "Network": ConvNet, "x_old": images(120, 5, seed=8)[0]}
    names |= {"model": taught(*images(300, 5, seed=3), rounds=20), "x": x, "y": y}
    names |= {"x_val": x_val, "y_val": y_val, "x_3": x_3, "y_3": y_3}
    names |= {"x_3_val": x_3_val, "y_3_val": y_3_val}
    exec("\n".join(blocks).replace("steps=150", "steps=40"), names)

    loaded = names["loaded"]
    assert loaded.evaluate((x_val, y_val + 5)).accuracy > 0.8
    assert loaded.evaluate((x_val, y_val), task="target").accuracy > 0.8
    assert len(loaded.predict(x_val, task="source").classes) == 5

    joined, again, three = names["joined"], names["again"], names["three"]
    assert torch.equal(again(x_val), names["first"](x_val))
    assert joined.passes == three.passes == 1
    assert three(x_val).shape == (100, 12)
    assert (names["first"](x_val).argmax(1) == y_val + 5).float().mean() > 0.8
