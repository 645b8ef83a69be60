"""A compiled network is adapted as it is written, also where its code was compiled before."""

from __future__ import annotations

import pytest
import torch

import fast
from networks import ConvNet, images

TRAIN, KEPT = images(60, 4, seed=1), images(40, 5, seed=3)[0]


@pytest.mark.slow
@pytest.mark.parametrize("after", ["wrapped before", "wrapped and run", "compiled in place"])
@pytest.mark.parametrize("options", [{"source_inputs": KEPT}, {"method": "adapter"}])
def test_a_compiled_network_is_the_network(after, options):
    torch._dynamo.reset()
    x, weights = TRAIN[0], []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = given = ConvNet()
        if compiled and after == "compiled in place":
            model.compile(backend="eager")
        elif compiled:
            given = torch.compile(model, backend="eager")
        if after != "wrapped before":
            given(x)  # compiled or not, this moves the statistics of the batch norm
        torch.manual_seed(0)
        adaptation = fast.Adaptation(given, TRAIN, steps=4, batch_size=16, **options)
        model.train()
        for inputs, labels, rows in adaptation.batches():
            logits, penalty = adaptation.forward(inputs, rows, model=given)
            (torch.nn.functional.cross_entropy(logits, labels) + penalty).backward()
            adaptation.optimizer.step()
            adaptation.optimizer.zero_grad()
        adaptation.finish()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)
