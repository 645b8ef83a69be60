"""Two processes, each with its own part of the data, get the product over all of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F

from curvature.ranks import KINDS, SPLITS, data_of, rank_main


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_two_ranks(tmp_path: Path, split: str) -> None:
    mp.spawn(rank_main, (str(tmp_path), split), nprocs=2)
    first, second = (json.loads((tmp_path / f"{r}.json").read_text()) for r in (0, 1))
    assert first == second
    model, x, y, _ = data_of(split)
    for name, kind in KINDS.items():
        operator = kind(model, F.cross_entropy, (x, y))
        V = torch.arange(3 * operator.shape[0], dtype=x.dtype).view(-1, 3).sin()
        product, quad, gradient, values = (torch.tensor(t).double() for t in first[name])
        torch.testing.assert_close(product, operator @ V, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(quad, operator.quad(V), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(gradient, operator.gradient(), rtol=1e-6, atol=1e-8)
        assert "FAIL" not in first[f"{name} check"], first[f"{name} check"]
        torch.testing.assert_close(values, operator.top(2).values, rtol=1e-5, atol=1e-8)
