"""The Python of docs/predict.md runs as it stands. That of docs/production.md is run by
test_newcomer.py and test_frameworks.py."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from fast.data.images.decoding import decode
from fast.data.images.format import ImageFormat
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


# The page leaves closing its files to Python.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_pictures_of_every_kind_are_prepared_without_this_library_as_with_it(tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")
    monkeypatch.chdir(tmp_path)
    form = ImageFormat(
        size=16, resize=20, interpolation="bicubic", mean=(0.5,) * 3, std=(0.2,) * 3, channels=3
    )
    facts = {"images": vars(form), "outputs": {"logits": {"classes": []}}}
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "preprocessing.json").write_text(json.dumps(facts))
    page = (ROOT / "docs" / "production.md").read_text().split("## Pictures without FAST\n")[1]
    names = {}
    exec(re.search(r"```python\n(.*?)```", page, flags=re.DOTALL)[1], names)
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (30, 40, 4), dtype=np.uint8)
    deep = image.fromarray(rng.integers(0, 65536, (30, 40)).astype(np.uint16))
    turned = image.Exif()
    turned[0x0112] = 6
    image.fromarray(colours).save("clear.png")
    image.fromarray(colours[..., 0]).save("grey.png")
    image.fromarray(colours[..., :3]).convert("CMYK").save("print.jpg")
    image.fromarray(colours[..., :3]).convert("P").save("palette.gif")
    image.fromarray(colours[..., :3]).save("turned.jpg", exif=turned)
    deep.save("deep.png")
    deep.save("deep.tiff")
    for file in sorted(tmp_path.glob("*.*")):
        ours = form.prepare(decode(lambda file=file: str(file), form.channels)[0])
        prepared = torch.from_numpy(names["prepare"](file))
        assert torch.allclose(prepared, ours, rtol=0, atol=1e-5), file.name
