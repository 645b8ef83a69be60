"""Features of several positions as one row for each sample."""

import pytest
import torch
from torch import nn

from fast.heads.rows import by_sample, mean_over_positions


def test_rows_are_told_apart_by_sample():
    rows = torch.arange(12.0).view(6, 2)
    assert by_sample(rows, 6) is rows
    assert torch.equal(by_sample(rows, 3)[1], rows[2:4])
    for count in (6, 0):  # a wrapper that runs half of the batch at a time shows the last half
        with pytest.raises(ValueError, match=f"{count} rows of 4 samples"):
            by_sample(rows[:count], 4)


def test_a_linear_head_has_its_features_last():
    tokens = torch.arange(24.0).view(2, 4, 3)
    rows = mean_over_positions(tokens, nn.Linear(3, 5))
    assert torch.equal(rows, tokens.mean(1))


def test_a_convolution_has_its_channels_first():
    maps = torch.arange(48.0).view(2, 3, 4, 2)
    rows = mean_over_positions(maps, nn.Conv2d(3, 5, 1))
    assert torch.equal(rows, maps.mean((2, 3)))


def test_one_position_stays_as_it_is():
    features = torch.randn(2, 3)
    for head in (nn.Linear(3, 5), nn.Conv2d(3, 5, 1)):
        assert torch.equal(mean_over_positions(features, head), features)
