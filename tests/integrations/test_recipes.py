"""The Python of docs/integrations.md runs as it stands, on small networks and for a few steps."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import fast
from networks import ConvNet, images

PAGE = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()


def recipe(section, **replaced):
    """The code of a section, with some numbers made smaller."""
    text = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE).group(1)
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    for old, new in {"steps=1000": "steps=4", **replaced}.items():
        code = code.replace(old, new)
    return code


def test_every_block_stands_under_a_recipe():
    sections = [recipe(name) for name in ("Lightning", "timm", "PEFT", "Accelerate")]
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 5
    assert "\n".join(sections) == "\n".join(blocks).replace("steps=1000", "steps=4")


def loader(x, y, size=14):
    return DataLoader(TensorDataset(x, y), batch_size=size, drop_last=True)


@pytest.fixture
def names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (x, y), (x_old, y_old) = images(56, 4, seed=1), images(30, 5, seed=3)
    return {
        "F": F,
        "network": ConvNet(),
        "x": x,
        "y": y,
        "x_old": x_old,
        "y_old": y_old,
        "kept": x_old,
        "loader": loader(x, y),
        "val_loader": loader(x, y),
    }


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec")
def test_lightning(names, tmp_path):
    pytest.importorskip("lightning", reason="lightning is not installed")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    code = recipe("Lightning", **{"callbacks=[": "accelerator='cpu', logger=False, callbacks=["})
    exec(code, names)
    assert names["callback"].adaptation.done == 12
    assert names["callback"].result.source_accuracy is not None
    assert (tmp_path / "adapted" / "model.safetensors").is_file()


def test_timm(names):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    pytest.importorskip("timm.task", reason="this timm has no training tasks")
    names["model"] = timm.create_model("test_resnet", num_classes=5, in_chans=1)
    names["plain"] = timm.create_model("test_vit", num_classes=5)
    exec(recipe("timm"), names)
    assert names["result"].final["step"] == 4
    assert isinstance(names["optimizer"], fast.AdamW)
    assert len(names["optimizer"].param_groups) > 3


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_peft(names, tmp_path):
    pytest.importorskip("peft", reason="peft is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=5,
    )
    tokens = torch.randint(5, 50, (40, 7))
    names["network"] = transformers.BertForSequenceClassification(config)
    names |= {"inputs": {"input_ids": tokens}, "labels": tokens[:, 0] % 4}
    names["kept"] = {"input_ids": tokens[:9]}
    exec(recipe("PEFT"), names)
    assert names["adaptation"].done == 4
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_accelerate(names, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    try:
        exec(recipe("Accelerate", **{"Accelerator()": "Accelerator(cpu=True)"}), names)
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    assert names["result"].final["step"] == 4
    assert (tmp_path / "checkpoint" / "custom_checkpoint_0.pkl").is_file()
