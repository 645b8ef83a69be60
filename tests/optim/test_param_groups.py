"""`fast.param_groups`: backbone and head, weight decay, tied weights, layer decay."""

from __future__ import annotations

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
