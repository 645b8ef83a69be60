"""The accuracy of each class is that of the evaluation that the run reports."""

from __future__ import annotations

import pytest
import torch

import fast
from networks import ConvNet, images, taught

TRAIN, VAL = images(120, 4, seed=1), images(203, 4, seed=2)


def finetune(**options):
    torch.manual_seed(0)
    model = ConvNet() if options.get("lr") else taught(*images(200, 5, seed=3), rounds=5)
    return fast.finetune(model, TRAIN, VAL, steps=24, eval_every=4, device="cpu", **options)


@pytest.mark.parametrize(
    ("options", "earlier"),
    [
        ({}, False),
        ({"lr": 3.0, "patience": 9, "method": "vanilla"}, True),
        ({"lr": 3.0, "rehearse": 0.0}, True),
    ],
    ids=["last", "best", "head start"],
)
def test_it_is_that_of_the_weights_that_are_kept(options, earlier):
    result = finetune(**options)
    assert (result.final["step"] < 24) is earlier
    right, samples = result.by_class
    assert samples == torch.bincount(VAL[1], minlength=4).tolist()
    assert sum(right) / len(VAL[1]) == result.target_accuracy
    recalls = [score.recall for score in result.evaluate(VAL).per_class]
    assert recalls == [r / n for r, n in zip(right, samples, strict=True)]


def test_a_run_that_goes_on_knows_it(tmp_path):
    options = {"lr": 3.0, "patience": 9, "method": "vanilla"}
    whole = finetune(**options, output=tmp_path / "run")
    again = finetune(resume=tmp_path / "run", **options)
    assert again.by_class == whole.by_class
    assert again.final["step"] == whole.final["step"] < 24
