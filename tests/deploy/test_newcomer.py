"""The newcomer's path: a folder of photos with the usual mess, `fast finetune`, `predict`,
`evaluate`, `export`, and the same answers where this library is not installed."""

from __future__ import annotations

import csv
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from fast.cli import main
from fast.data.sources import DataWarning
from helpers import ROOT, run_python

pytestmark = pytest.mark.slow
COUNT, SIDE = 300, 32
# Where torchvision's compiled part does not load, its Python parts need the declarations.
PRELUDE = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import torchvision_ops
torchvision_ops.declare()
sys.modules["fast"] = sys.modules["fastkernels"] = None
paths = sys.argv[1:] or open("paths.txt").read().splitlines()
"""


def photos(folder):
    """300 JPEGs, cut out of scikit-learn's two pictures, and what else lies in such folders."""
    image = pytest.importorskip("PIL.Image", reason="photos need pillow")
    datasets = pytest.importorskip("sklearn.datasets", reason="its pictures are cut up")
    rng = np.random.default_rng(0)
    temple, flower = datasets.load_sample_images().images
    sources = {"temple": temple[150:], "flower": flower, "dark": (flower * 0.25).astype(np.uint8)}
    for i in range(COUNT):
        name = list(sources)[i % 3]
        picture = sources[name]
        height, width = rng.integers(50, 90, 2)
        top = rng.integers(0, picture.shape[0] - height)
        left = rng.integers(0, picture.shape[1] - width)
        cut = image.fromarray(picture[top : top + height, left : left + width])
        file = folder / name / f"IMG_{i:04}.{'JPG' if i % 2 else 'jpg'}"
        file.parent.mkdir(parents=True, exist_ok=True)
        if i % 50 == 3:
            cut = cut.convert("L")
        cut.save(file, "JPEG", quality=92)
        if i % 40 == 5:  # a JPEG by another name
            file.rename(file.with_suffix(".png"))
        if i % 60 == 7:
            file.unlink()
            cut.convert("RGBA").save(file.with_suffix(".png"))
        if i % 30 == 0:
            file.with_name(f"._{file.name}").write_bytes(b"\x00\x05\x16\x07 litter of a camera")
    for litter in (".DS_Store", "Thumbs.db", "notes.txt"):
        (folder / "temple" / litter).write_bytes(b"litter")


def network(folder):
    """A small network of transformers, taught nothing, with its image processor."""
    t = pytest.importorskip("transformers", reason="the network is one of transformers")
    torch.manual_seed(0)
    config = t.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], num_labels=5)
    t.ResNetForImageClassification(config).save_pretrained(folder)
    processor = t.ViTImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.25] * 3
    )
    processor.save_pretrained(folder)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The folder of it all, after a run in `run`."""
    folder = tmp_path_factory.mktemp("newcomer")
    photos(folder / "photos")
    network(folder / "network")
    x = np.random.default_rng(1).integers(0, 256, (40, 40, 40, 3), dtype=np.uint8)
    np.savez(folder / "old.npz", x_test=x, y_test=np.arange(40) % 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("FAST_DEVICE", "cpu")
        options = ["--input-size", str(SIDE), "--resize", "40", "--steps", "6", "--no-progress"]
        run(["finetune", "--model", "transformers:network", "--data", "photos", *options,
             "--source", "old.npz", "--output", "run"])  # fmt: skip
        yield folder


def run(args):
    assert main([str(a) for a in args]) == 0


@pytest.fixture(scope="module")
def answers(path):
    """Name, class and probability of every photo, by `fast predict`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("always", "photos: files .* are left out: 1 .txt", DataWarning)
        run(["predict", "run", "photos", "--csv", "answers.csv"])
    with open("answers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    (path / "paths.txt").write_text("\n".join(row["input"] for row in rows))
    return rows


def test_it_learns_and_answers(path, answers):
    result = json.loads((path / "run" / "result.json").read_text())
    assert result["target_accuracy"] > 0.7
    assert len(answers) == COUNT
    right = [row["label"] == Path(row["input"]).parent.name for row in answers]
    assert np.mean(right) > 0.7


def test_it_is_evaluated(path, capsys):
    run(["evaluate", "run"])
    assert "60 samples (target task)" in capsys.readouterr().out
    numbers = json.loads((path / "run" / "evaluation-target" / "evaluation.json").read_text())
    result = json.loads((path / "run" / "result.json").read_text())
    assert numbers["accuracy"] == pytest.approx(result["target_accuracy"], abs=1e-12)
    run(["evaluate", "run", "old.npz", "--task", "source"])
    source = json.loads((path / "run" / "evaluation-source" / "evaluation.json").read_text())
    assert source["accuracy"] == result["source_accuracy"]


def block(heading):
    """The Python under a heading of docs/production.md."""
    page = (ROOT / "docs" / "production.md").read_text().split(f"## {heading}\n")[1]
    return re.search(r"```python\n(.*?)```", page, flags=re.DOTALL)[1]


def alone(path, format, code):
    """What `code`, which has this library blocked, leaves in `found`, after an export."""
    served = path / "served"
    served.unlink(missing_ok=True)
    run(["export", "run", "--format", format, "-o", f"served-{format}"])
    served.symlink_to(path / f"served-{format}")
    code = f"{PRELUDE}{code}\nimport json\njson.dump(found, open('found.json', 'w'))"
    run_python(code, cwd=path)
    return json.loads((path / "found.json").read_text())


def check(found, answers, apart):
    expected = [float(row["probability"]) for row in answers]
    assert np.abs(np.array(found["probabilities"]) - expected).max() < apart
    sure = [i for i, row in enumerate(answers) if float(row["probability"]) > 0.5 + apart]
    assert len(sure) > COUNT / 2
    assert [found["labels"][i] for i in sure] == [answers[i]["label"] for i in sure]


FOUND = """
found = {"labels": [classes[i] for i in logits.argmax(1)],
         "probabilities": softmax(logits).max(1).tolist()}"""


def test_the_same_answers_in_onnxruntime(path, answers):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="exports to ONNX need it")
    code = block("Pictures without FAST") + block("ONNX") + FOUND
    check(alone(path, "onnx", code), answers, 2e-3)


def test_the_same_answers_of_a_program(path, answers):
    code = block("Pictures without FAST") + block("torch.export") + FOUND
    check(alone(path, "torch.export", code), answers, 2e-3)


def test_the_same_answers_in_the_pipeline(path, answers):
    code = block("Hugging Face") + (
        """
found = {"labels": answers, "probabilities": [best[0]["score"] for best in classify(paths)]}"""
    )
    check(alone(path, "hf", code), answers, 0.1)  # it resizes by torch


def test_the_weights_load_into_the_plain_architecture(path, answers):
    code = """
import transformers
plain = transformers.ResNetForImageClassification(
    transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], num_labels=3)
).eval()
"""
    code += block("The plain architecture") + block("Pictures without FAST")
    code += (
        """
import torch
with torch.no_grad():
    x = torch.from_numpy(np.stack([prepare(path) for path in paths]))
    logits = plain(x).logits.numpy()"""
        + FOUND
    )
    check(alone(path, "safetensors", code), answers, 2e-3)
