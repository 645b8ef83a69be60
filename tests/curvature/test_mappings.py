"""Inputs in mappings of other kinds than dict, as tokenizers give them."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature.truth import batch, linear
from fast.curvature import GGN, fisher_diagonal


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = linear(6, 4)

    def forward(self, x: Tensor, more: dict[str, Tensor]) -> Tensor:
        return self.out(x * more["scale"])


X, Y = batch()
INPUTS = UserDict(x=X, more=UserDict(scale=X + 2))
PLAIN = {"x": X, "more": {"scale": X + 2}}


@pytest.mark.parametrize(
    "data",
    [(INPUTS, Y), [(INPUTS, Y)], [[INPUTS, Y]], INPUTS | {"labels": Y}, [INPUTS | {"labels": Y}]],
    ids=["pair", "pairs", "lists", "labelled", "several labelled"],
)
def test_mappings_are_as_dicts(data) -> None:
    torch.manual_seed(0)
    model = Named()
    operator = GGN(model, F.cross_entropy, data)
    truth = GGN(model, F.cross_entropy, [(PLAIN, Y)])
    torch.testing.assert_close(operator.dense(), truth.dense())
    assert operator.check().ok
    result = fisher_diagonal(model, F.cross_entropy, data, labels="data")
    expected = fisher_diagonal(model, F.cross_entropy, [(PLAIN, Y)], labels="data")
    torch.testing.assert_close(result, expected)


def test_a_batch_encoding() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is optional")
    torch.manual_seed(0)
    model = Named()
    encoding = transformers.BatchEncoding(PLAIN)
    result = GGN(model, F.cross_entropy, [(encoding, Y)]).dense()
    torch.testing.assert_close(result, GGN(model, F.cross_entropy, [(PLAIN, Y)]).dense())


@pytest.mark.parametrize("data", [([X, X + 2], Y), [[X, X + 2], Y], [([X, X + 2], Y)]])
def test_several_inputs_are_a_list_as_well_as_a_tuple(data) -> None:
    class Two(Named):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.out(x * scale)

    torch.manual_seed(0)
    model = Two()
    truth = GGN(model, F.cross_entropy, ((X, X + 2), Y)).dense()
    torch.testing.assert_close(GGN(model, F.cross_entropy, data).dense(), truth)
