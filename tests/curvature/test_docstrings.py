"""The formulas of Hessian, GGN and Fisher, as their docstrings show them."""

from __future__ import annotations

import doctest

import pytest
import torch

import fast


@pytest.mark.parametrize("kind", [fast.Hessian, fast.GGN, fast.Fisher])
def test_examples(kind: type) -> None:
    torch.manual_seed(0)
    names = {"torch": torch, "fast": fast}
    (example,) = doctest.DocTestFinder(recurse=False).find(kind, globs=names)
    assert example.examples
    result = doctest.DocTestRunner().run(example)
    assert result.failed == 0
