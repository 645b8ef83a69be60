"""`fast.param_groups`: backbone and head, weight decay, tied weights, layer decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fast


def test_curvature_is_split_with_the_parameters():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    found = [torch.full_like(p, float(i)) for i, p in enumerate(model[0].parameters())]
    groups = fast.param_groups(model, curvature=found, weight_decay=0.1, anchor_decay=1.0)
    given = {g["name"]: [float(f.mean()) for f in g.get("curvature", [])] for g in groups}
    assert given["backbone"] == [0.0]
    assert given["backbone_no_decay"] == [1.0]
    fast.AdamW(groups)
    with pytest.raises(ValueError, match="curvature has 1 entries for 2 backbone"):
        fast.param_groups(model, curvature=found[:1])


class Tied(nn.Module):
    def __init__(self, head_bias: bool) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(5, 3), nn.Linear(3, 3)
        self.head = nn.Linear(3, 5, bias=head_bias)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embedding(x)))


@pytest.mark.parametrize("bias", [False, True])
def test_a_weight_that_the_head_shares_stays_in_the_backbone_with_its_anchor(bias):
    model = Tied(bias)
    groups = {g["name"]: g for g in fast.param_groups(model, anchor_decay=1.0)}
    assert any(p is model.embedding.weight for p in groups["backbone"]["params"])
    assert groups["backbone"]["anchor_decay"] == 1.0
    assert [p is model.head.bias for p in groups.get("head", {"params": []})["params"]] == [
        True
    ] * bias


def test_the_tied_embedding_of_a_language_model_stays_in_the_backbone():
    transformers = pytest.importorskip("transformers", reason="its GPT-2")
    config = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=16, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    (group,) = fast.param_groups(model, anchor_decay=1.0)
    assert group["name"] == "backbone"
    assert any(p is model.transformer.wte.weight for p in group["params"])


def rates(groups: list[dict[str, Any]]) -> dict[int, float]:
    return {id(p): group["lr"] for group in groups for p in group["params"]}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18", "convnext_atto"])
def test_layer_decay_is_that_of_timm(name):
    timm = pytest.importorskip("timm", reason="its param_groups_layer_decay")
    from timm.optim import param_groups_layer_decay

    model = timm.create_model(name, num_classes=3, pretrained=False)
    theirs = param_groups_layer_decay(
        model, 0.05, layer_decay=0.75, no_weight_decay_list=getattr(model, "no_weight_decay", set)()
    )
    ours = fast.param_groups(
        model, lr=0.1, head_lr_scale=1.0, layer_decay=0.75, weight_decay=0.05, anchor_decay=2.0
    )
    expected = {id(p): 0.1 * group["lr_scale"] for group in theirs for p in group["params"]}
    assert rates(ours) == pytest.approx(expected)
    decays = {id(p): group["weight_decay"] for group in ours for p in group["params"]}
    assert decays == {id(p): group["weight_decay"] for group in theirs for p in group["params"]}
    names = [group["name"] for group in ours]
    assert all(n.startswith(("backbone_layer_", "head")) for n in names)
    assert len(set(names)) == len(names)
    assert {g["anchor_decay"] for g in ours if g["name"].startswith("backbone")} == {2.0}


@pytest.mark.parametrize("scheduler", ["torch", "timm"])
def test_layer_decay_stays_under_a_scheduler(scheduler):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = fast.AdamW(fast.param_groups(model, lr=1.0, layer_decay=0.5))
    if scheduler == "torch":
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
        optimizer.step()
        schedule.step()
    else:
        timm = pytest.importorskip("timm.scheduler", reason="its schedulers")
        schedule = timm.StepLRScheduler(optimizer, decay_t=1, decay_rate=0.5)
        schedule.step(1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.25, 5.0]


class Encoder(nn.Module):
    """Embeddings, four layers of which each has a Sequential, a norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 3))
        self.embedding = nn.Embedding(5, 3)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 3)) for _ in range(4)
        )
        self.norm = nn.LayerNorm(3)
        self.classifier = nn.Linear(3, 2)


def test_layers_of_other_models():
    model = Encoder()
    groups = fast.param_groups(model, lr=1.0, layer_decay=0.5)
    assert [g["name"] for g in groups] == [f"backbone_layer_{i}" for i in range(5)] + ["head"]
    lr = rates(groups)
    assert lr[id(model.position)] == lr[id(model.embedding.weight)] == 0.5**5
    assert [lr[id(layer[2].bias)] for layer in model.layers] == [0.5**4, 0.5**3, 0.5**2, 0.5]
    assert lr[id(model.norm.weight)] == 0.5
    assert lr[id(model.classifier.weight)] == 10.0


def test_layers_of_a_plain_sequence_take_their_norms_along():
    model = nn.Sequential(
        nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 4), nn.LayerNorm(4),
        nn.Linear(4, 2),
    )  # fmt: skip
    curvature = [torch.full_like(p, float(i)) for i, p in enumerate(list(model.parameters())[:-2])]
    groups = fast.param_groups(model, layer_decay=0.5, curvature=curvature, weight_decay=0.1)
    seen = {g["name"]: [int(f.max()) for f in g["curvature"]] for g in groups if "curvature" in g}
    assert seen == {
        "backbone_layer_1": [0], "backbone_layer_1_no_decay": [1, 2, 3],
        "backbone_layer_2": [4], "backbone_layer_2_no_decay": [5, 6, 7],
    }  # fmt: skip
    fast.AdamW(groups, anchor_decay=1.0)


def test_layers_of_a_resnet_are_its_blocks():
    torchvision = pytest.importorskip("torchvision", reason="its ResNet")
    groups = fast.param_groups(torchvision.models.resnet18(), layer_decay=0.9)
    assert [g["name"] for g in groups] == [f"backbone_layer_{i}" for i in range(9)] + ["head"]


@pytest.mark.parametrize("value", [0.0, -1.0, 1.5])
def test_a_layer_decay_out_of_range_is_named(value):
    with pytest.raises(ValueError, match=r"layer_decay must be in \(0, 1\]"):
        fast.param_groups(Encoder(), layer_decay=value)


def test_a_model_without_layers_is_named():
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    with pytest.raises(ValueError, match="Flat has no ModuleList or Sequential of layers"):
        fast.param_groups(Flat(), layer_decay=0.5)
