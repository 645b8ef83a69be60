"""What is exported answers like the network, also where this library is not there."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fast
from fast.data.audio.waveforms import SoundFormat
from fast.data.images.format import ImageFormat
from fast.data.images.library import transformers_description
from fast.deploy.export.hugging_face import _write_processor
from fast.deploy.predictor import Predictor
from fast.models.preparation import Preparation
from helpers import run_python
from networks import ConvNet, TextNet, images, sentences

ALONE = "import sys; sys.modules['fast'] = sys.modules['fastkernels'] = None\n"


def needs(*modules):
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


def answers_alone(code, folder, x):
    """What `code` computes of the tensors in `x` in a process without this library, in `folder`."""
    torch.save(x, folder / "x.pt")
    run_python(
        f"{ALONE}import torch\nx = torch.load('x.pt')\n{code}\ntorch.save(logits, 'logits.pt')",
        cwd=folder,
    )
    return torch.load(folder / "logits.pt")


def test_a_program_of_torch(adapted, tmp_path):
    folder = adapted.result.export(tmp_path / "served", "torch.export")
    code = "logits = torch.export.load('model.pt2').module()(x)"
    logits = answers_alone(code, folder, adapted.x[:7])
    expected = adapted.result.predict(adapted.x[:7]).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    facts = json.loads((folder / "preprocessing.json").read_text())
    assert facts["inputs"] == {"input": {"shape": ["batch", 1, 8, 8], "dtype": "float32"}}
    assert facts["outputs"]["logits"]["classes"] == ["ant", "bee", "cat", "dog"]
    card = (folder / "README.md").read_text()
    assert "# ConvNet of 4 classes" in card
    assert "Classes: `ant`, `bee`, `cat`, `dog`." in card
    assert f"{100 * adapted.result.source_accuracy:.1f} %" in card


@needs("onnx", "onnxscript", "onnxruntime")
def test_onnx(adapted, tmp_path):
    folder = adapted.result.export(tmp_path / "served", "onnx")
    code = """
import onnxruntime
session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
assert session.get_inputs()[0].shape == ["batch", 1, 8, 8]
logits = torch.from_numpy(session.run(["logits"], {"input": x.numpy()})[0])"""
    logits = answers_alone(code, folder, adapted.x[:7])
    expected = adapted.result.predict(adapted.x[:7]).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_weights_for_the_plain_architecture(adapted, tmp_path):
    folder = fast.load(adapted.folder, ConvNet()).export(tmp_path / "served", "safetensors")
    plain = ConvNet(4).eval()
    plain.load_state_dict(load_file(folder / "model.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(
            plain(adapted.x), adapted.result.predict(adapted.x).logits, rtol=1e-4, atol=1e-4
        )


def joined_folder(tmp_path, policy, old):
    """A joined network that learned classes "oak" and "elm" besides `old`, in a folder."""
    kept = images(40, 5, seed=3)[0]
    result = fast.finetune(
        ConvNet(), images(60, 2), source_inputs=kept, batch_norm=policy, steps=2, progress=False
    )
    joined = fast.join(
        result,
        source_inputs=kept,
        data=images(40, 2, seed=4),
        source_classes=old,
        target_classes=["oak", "elm"],
    )
    return joined, joined.save(tmp_path / "joined")


def test_a_joined_network_is_exported_with_the_classes_of_both_tasks(tmp_path):
    joined, folder = joined_folder(tmp_path, "frozen", list("abcde"))
    loaded, x = fast.load(folder, ConvNet()), images(7, 5, seed=5)[0]
    for format in ("torch.export", "safetensors"):
        facts = loaded.export(tmp_path / format, format) / "preprocessing.json"
        outputs = json.loads(facts.read_text())["outputs"]
        assert outputs["logits"]["classes"] == [*"abcde", "oak", "elm"]
    plain = ConvNet(7).eval()
    plain.load_state_dict(load_file(tmp_path / "safetensors" / "model.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(plain(x), joined(x))
    code = "logits = torch.export.load('model.pt2').module()(x)"
    logits = answers_alone(code, tmp_path / "torch.export", x)
    torch.testing.assert_close(logits, joined(x).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("policy", "old", "why"),
    [
        ("per_task", "abcde", "takes two passes"),
        ("frozen", ["oak", *"abcd"], "has classes of both"),
    ],
)
def test_weights_that_no_plain_architecture_takes_are_not_written(tmp_path, policy, old, why):
    _, folder = joined_folder(tmp_path, policy, list(old))
    loaded = fast.load(folder, ConvNet())
    with pytest.raises(ValueError, match=f"a joined network that {why}.* is none: use 'onnx' or"):
        loaded.export(tmp_path / "served", "safetensors")
    assert loaded.export(tmp_path / "served", "torch.export").is_dir()


def test_several_inputs_keep_their_names(tmp_path):
    x, y = sentences(48, 3)
    result = fast.finetune(TextNet(), (x, y), steps=2, batch_size=16)
    folder = result.export(tmp_path / "served", "torch.export")
    facts = json.loads((folder / "preprocessing.json").read_text())
    assert list(facts["inputs"]) == ["ids", "mask"]
    assert facts["inputs"]["ids"]["shape"] == ["batch", "length"]
    code = "logits = torch.export.load('model.pt2').module()(x['ids'], x['mask'])"
    shorter = {name: value[:5, :4] for name, value in x.items()}
    logits = answers_alone(code, folder, shorter)
    torch.testing.assert_close(logits, result.predict(shorter).logits, rtol=1e-4, atol=1e-4)


class Extractor:
    """In place of a feature extractor of transformers."""

    def save_pretrained(self, folder):
        (folder / "preprocessor_config.json").write_text("{}")


class Hears(nn.Module):
    """Reads waveforms, of any length or of one."""

    def __init__(self, length=None):
        super().__init__()
        self.body = nn.Conv1d(1, 4, 8, stride=4)
        self.mix = nn.Identity() if length is None else nn.Linear(length, length)
        self.fc = nn.Linear(4, 3)

    def forward(self, input_values):
        return self.fc(self.body(self.mix(input_values)[:, None]).relu().mean(2))


@pytest.mark.parametrize("length", [None, 400])
def test_sounds_have_any_length_unless_the_network_fixes_it(length, tmp_path):
    sounds = SoundFormat(seconds=1, rate=8000, extractor=Extractor())
    predictor = Predictor(
        model=Hears(length),
        preparation=Preparation(sounds=sounds),
        inputs={"input_values": {"shape": [400], "dtype": "float32"}},
    )
    folder = predictor.export(tmp_path / "served", "torch.export")
    facts = json.loads((folder / "preprocessing.json").read_text())
    assert facts["inputs"]["input_values"]["shape"] == ["batch", length or "length"]
    if length is None:
        x = torch.randn(5, 250)
        assert facts["notes"] == []
    else:
        x = torch.randn(5, 400)
        assert facts["notes"][0].startswith("A sequence has exactly 400 values, because")
    logits = answers_alone("logits = torch.export.load('model.pt2').module()(x)", folder, x)
    torch.testing.assert_close(logits, predictor.logits({"input_values": x}), rtol=1e-4, atol=1e-4)
    assert "Keep the first 1 s." in (folder / "README.md").read_text()


class OfTwo(ConvNet):
    """Takes batches of two alone."""

    def forward(self, x):
        return super().forward(x.reshape(2, 1, 8, 8))


def test_a_batch_size_that_the_network_fixes_is_said(tmp_path):
    predictor = Predictor(model=OfTwo(), inputs={"shape": [1, 8, 8], "dtype": "float32"})
    folder = predictor.export(tmp_path / "served", "torch.export")
    (note,) = json.loads((folder / "preprocessing.json").read_text())["notes"]
    assert note.startswith("The batch has exactly 2 samples, because the network fixes it")
    facts = json.loads((folder / "preprocessing.json").read_text())
    assert facts["inputs"]["input"]["shape"] == [2, 1, 8, 8]


def test_answers_that_differ_are_not_written(adapted, tmp_path, monkeypatch):
    monkeypatch.setattr("fast.deploy.export.subject.TOLERANCE", -1.0)
    with pytest.raises(ValueError, match=r"answers otherwise than the network .* nothing was"):
        adapted.result.export(tmp_path / "served", "torch.export")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_said(adapted, tmp_path, monkeypatch):
    for format, message in (
        ("hf", "for networks of transformers, and this is a ConvNet: use"),
        ("timm", "for networks of timm, and this is a ConvNet: use"),
        ("tflite", "format must be one of onnx, torch.export, safetensors, hf, timm; got 'tflite'"),
    ):
        with pytest.raises(ValueError, match=message):
            adapted.result.export(tmp_path / "served", format)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(ValueError, match="is not empty; name another folder"):
        adapted.result.export(tmp_path / "full", "safetensors")
    monkeypatch.setattr("fast.deploy.export.onnx.NEEDED", ("no_such_module",))
    with pytest.raises(ImportError, match=r"pip install 'fast-task-adaptation\[export\]'"):
        adapted.result.export(tmp_path / "served", "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert "fast" in sys.modules


class Ends(TextNet):
    """It knows a text by its last token, which has to be 2, as those of Bart and T5 have one."""

    def forward(self, ids):
        if not (ids == 2).any():
            raise ValueError("Each example must contain at least one <eos> token.")
        x = self.norm(self.embed(ids)).cumsum(1)
        return self.Output(self.score(x[ids == 2].view(len(ids), -1, 16)[:, -1]))


def test_inputs_that_are_made_up_and_not_taken_are_said(tmp_path):
    predictor = Predictor(model=Ends(), inputs={"ids": {"shape": [6], "dtype": "int64"}})
    with pytest.raises(ValueError, match=r"sample, which is made up if you pass none: .*<eos>"):
        predictor.export(tmp_path / "served", "safetensors")
    ids = torch.full((3, 6), 2)
    assert predictor.export(tmp_path / "served", "safetensors", sample={"ids": ids}).is_dir()


def test_an_assertion_of_torch_is_an_error_with_a_message(adapted, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise AssertionError("expected no unbacked symbols, got 1: {u0}")

    monkeypatch.setattr("torch.export.export", fails)
    with pytest.raises(ValueError, match="cannot follow ConvNet: expected no unbacked symbols"):
        adapted.result.export(tmp_path / "served", "torch.export")
    assert list(tmp_path.iterdir()) == []


@needs("onnx", "onnxscript", "onnxruntime")
def test_an_error_of_onnxruntime_is_one_of_ours(adapted, tmp_path, monkeypatch):
    monkeypatch.setattr("fast.deploy.export.onnx.trials", lambda _: [adapted.x[:2, :, :4]])
    with pytest.raises(ValueError, match=r"onnxruntime cannot run model.onnx \(.*\); nothing was"):
        adapted.result.export(tmp_path / "served", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_the_networks_own_image_processor_is_kept(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the processor is one of its")
    own = transformers.ViTImageProcessorPil(
        size={"height": 24, "width": 20}, image_mean=[0.1, 0.2, 0.3], do_normalize=False
    )
    form = ImageFormat(size=20, library=transformers_description(own))
    _write_processor(form, tmp_path)
    again = transformers.ViTImageProcessorPil.from_pretrained(tmp_path)
    assert again.to_dict() == own.to_dict()
