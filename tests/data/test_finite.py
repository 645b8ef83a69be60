"""Which samples hold a number that is not finite."""

import pytest
import torch

from fast.data.finite import broken_rows


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_broken_sample_is_found(dtype):
    x = torch.randn(50, 3, 4).to(dtype)
    x[7, 0, 1], x[7, 2, 2], x[31, 1, 3], x[49, 2, 0] = torch.inf, -torch.inf, torch.nan, torch.inf
    assert broken_rows((x, torch.zeros(50, 2))).nonzero().flatten().tolist() == [7, 31, 49]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_large_numbers_are_finite_though_their_sum_is_not(dtype):
    assert not broken_rows(torch.full((20, 4), torch.finfo(dtype).max, dtype=dtype)).any()


def test_integers_are_not_looked_at():
    assert broken_rows({"ids": torch.zeros(5, 3, dtype=torch.int64)}) is None
