"""Networks of timm, torchvision and transformers: built again by name, and exported in their own
formats."""

from __future__ import annotations

import json

import pytest
import torch

import fast
from fast.models.load import load_model
from fast.models.saved.description import own_classes
from helpers import ROOT

pytestmark = pytest.mark.slow
CLASSES = ["ant", "bee", "cat"]
TINY = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip


def library(name):
    return pytest.importorskip(name, reason=f"needs {name}")


def adapted(model, x, folder, **options):
    y = torch.arange(24) % 3
    result = fast.finetune(model, (x, y), steps=2, batch_size=8, **{"head_steps": 5, **options})
    result.classes = CLASSES
    result.save(folder)
    return result


def pictures(size=32):
    return torch.randn(24, 3, size, size)


def tokens():
    ids = torch.randint(5, 90, (24, 12))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def bert():
    t = library("transformers")
    return t.BertForSequenceClassification(t.BertConfig(vocab_size=99, num_labels=4, **TINY))


def vit():
    t = library("transformers")
    config = t.ViTConfig(image_size=32, patch_size=8, num_labels=7, **TINY)
    config.id2label = {i: f"thing {i}" for i in range(7)}
    return t.ViTForImageClassification(config)


def gpt2():
    t = library("transformers")
    return t.GPT2ForSequenceClassification(
        t.GPT2Config(vocab_size=99, n_positions=32, n_embd=16, n_layer=1, n_head=2, num_labels=4,
                     pad_token_id=0)
    )  # fmt: skip


def both_alike(result, loaded, x):
    torch.testing.assert_close(
        loaded.predict(x).logits, result.predict(x).logits, rtol=1e-4, atol=1e-4
    )
    source = result.predict(x, task="source")
    again = loaded.predict(x, task="source")
    assert torch.equal(again.logits, source.logits)
    assert again.classes == source.classes
    return source.classes


@pytest.mark.parametrize(("make", "inputs"), [(bert, tokens), (vit, pictures)])
def test_a_folder_that_transformers_loads(make, inputs, tmp_path):
    x = inputs()
    result = adapted(make(), x, tmp_path / "run")
    loaded = fast.load(tmp_path / "run")  # by its config.json
    classes = both_alike(result, loaded, x)
    assert classes[0] == ("0" if make is bert else "thing 0")
    folder = loaded.export(tmp_path / "hf", "hf")
    auto = library("transformers")
    kind = (
        auto.AutoModelForSequenceClassification
        if make is bert
        else auto.AutoModelForImageClassification
    )
    network = kind.from_pretrained(folder).eval()
    assert network.config.id2label == dict(enumerate(CLASSES))
    with torch.no_grad():
        logits = network(**x).logits if make is bert else network(x).logits
    torch.testing.assert_close(logits, result.predict(x).logits, rtol=1e-4, atol=1e-4)
    assert (folder / "README.md").read_text().startswith("---\nlibrary_name: transformers\n")


def test_a_head_without_a_bias(tmp_path):
    x = tokens()
    result = adapted(gpt2(), x, tmp_path / "run", head_steps=None)
    both_alike(result, fast.load(tmp_path / "run"), x)
    with pytest.raises(ValueError, match="has no bias in its head score, and the adapted head has"):
        result.export(tmp_path / "hf", "hf")
    result.export(tmp_path / "weights", "torch.export")
    plain = adapted(gpt2(), x, tmp_path / "plain", head_steps=None, max_entropy=False)
    folder = plain.export(tmp_path / "hf", "hf")
    network = type(plain.model).from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            network(**x).logits, plain.predict(x).logits, rtol=1e-4, atol=1e-4
        )


def test_a_source_of_several_labels_gives_a_pipeline_of_one(tmp_path):
    x, model = tokens(), bert()
    model.config.problem_type = "multi_label_classification"
    result = adapted(model, x, tmp_path / "run")
    folder = result.export(tmp_path / "hf", "hf")
    config = library("transformers").AutoConfig.from_pretrained(folder)
    assert config.problem_type == "single_label_classification"


@pytest.mark.parametrize("by_name", [True, False])
def test_a_checkpoint_of_timm(by_name, tmp_path, monkeypatch):
    timm = library("timm")
    x = pictures()
    torch.manual_seed(0)
    result = adapted(timm.create_model("resnet10t", stem_width=16), x, tmp_path / "unnamed")
    if by_name:
        result.network = "timm:resnet10t(stem_width=16)"
    result.save(tmp_path / "run")
    loaded = fast.load(tmp_path / "run")
    both_alike(result, loaded, x)
    if by_name:
        assert "tench" in loaded.source_classes[0]
    folder = loaded.export(tmp_path / "timm", "timm")
    expected = result.predict(x).logits
    options = {"num_classes": 3, "stem_width": 16}
    file = folder / "model.safetensors"
    for network in (
        timm.create_model("resnet10t", checkpoint_path=str(file), **options),
        timm.create_model(f"local-dir:{folder}", pretrained=True),
    ):
        with torch.no_grad():
            torch.testing.assert_close(network.eval()(x), expected, rtol=1e-3, atol=1e-3)
    page = (ROOT / "docs" / "production.md").read_text()
    block = page.split("## timm")[1].split("```python\n")[1].split("```")[0]
    (tmp_path / "served").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block, names)
    with torch.no_grad():
        torch.testing.assert_close(names["network"](x), expected, rtol=1e-3, atol=1e-3)
    assert json.loads((folder / "config.json").read_text())["label_names"] == CLASSES


def test_auxiliary_heads_of_torchvision(tmp_path):
    models = library("torchvision.models")
    x = pictures(64)
    torch.manual_seed(0)
    result = adapted(models.googlenet(init_weights=False), x, tmp_path / "unnamed")
    assert "aux1.fc2" in result.notes[0]
    result.network = "torchvision:googlenet"
    result.save(tmp_path / "run")
    loaded = fast.load(tmp_path / "run")
    assert both_alike(result, loaded, x)[0] == "tench"
    folder = loaded.export(tmp_path / "weights", "safetensors")
    assert "aux1.fc2, aux2.fc2: auxiliary heads keep" in (folder / "README.md").read_text()
    for name, owner in (("hf", "transformers"), ("timm", "timm")):
        fitting = "this is a GoogLeNet: use onnx, torch.export or safetensors$"
        with pytest.raises(ValueError, match=f"is for networks of {owner}, and {fitting}"):
            loaded.export(tmp_path / name, name)


@pytest.mark.parametrize(
    ("spec", "first"),
    [
        ("torchvision:squeezenet1_0", "tench"),
        ("torchvision:squeezenet1_0(num_classes=3)", None),
        ("timm:resnet10t", "tench, Tinca tinca"),
        ("timm:resnet10t(num_classes=3)", None),
    ],
)
def test_pretrained_networks_have_names_for_their_classes(spec, first):
    library(spec.partition(":")[0])
    model = load_model(spec, pretrained=False).model
    names = own_classes(model, spec, None)
    assert names is first if first is None else names[0] == first
    assert own_classes(model, spec, "file.safetensors") is None  # of weights from elsewhere
