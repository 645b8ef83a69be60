"""Runs on a CUDA device."""

from __future__ import annotations

import copy

import pytest
import torch

import fast
from networks import ConvNet, images

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]
TRAIN, VAL, KNOWN = images(300, 4, seed=1), images(100, 4, seed=2), images(200, 5, seed=3)


@pytest.mark.parametrize("method", ["fast", "vanilla", "lp-ft", "l2-sp", "ewc", "replay"])
def test_a_run_learns_as_on_the_cpu(method):
    torch.manual_seed(0)
    model = ConvNet()
    options = {"method": method, "steps": 40, "num_classes": 4, "source_inputs": KNOWN[0]}
    results = {}
    for device in ("cpu", "cuda"):
        result = fast.finetune(copy.deepcopy(model), TRAIN, VAL, KNOWN, device=device, **options)
        assert next(result.model.parameters()).device.type == device
        results[device] = result
    assert results["cuda"].target_accuracy == pytest.approx(results["cpu"].target_accuracy, abs=0.1)
    first, last = (results["cuda"].history[i]["forecast"] for i in (0, -1))
    assert first == 0.0
    assert last > 0


def test_a_saved_run_is_plain(tmp_path):
    result = fast.finetune(ConvNet(), TRAIN, VAL, steps=5, num_classes=4, device="cuda")
    result.save(tmp_path)
    model = ConvNet(4)
    from safetensors.torch import load_file

    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    with torch.no_grad():
        there, here = result.model(VAL[0].cuda()).cpu(), model.eval()(VAL[0])
    torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-3)
