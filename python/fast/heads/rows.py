"""Rows of features that belong to one sample: a head may see one for each of its positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fast.data.trees import pick
from fast.heads.replace import features_of


def by_sample(rows: Tensor, size: int) -> Tensor:
    """Rows `[B * T, ...]` of tokens or pixels as `[B, T, ...]`; `[B, ...]` stays as it is.

    Args:
        size: B, the number of samples.

    Raises:
        ValueError: the number of rows is no multiple of B, or 0.
    """
    if len(rows) == size:
        return rows
    if not size or not len(rows) or len(rows) % size:
        raise ValueError(
            f"the head sees {len(rows)} rows of {size} samples, not as many of each: rehearsal and "
            "distillation cannot tell whose they are. Set rehearse=0 and distill=0"
        )
    return rows.unflatten(0, (size, -1))


def mean_over_positions(features: Tensor, head: nn.Module) -> Tensor:
    """What a head sees of each sample, averaged over its positions: `[B, D]`.

    Args:
        features: the input of the head. A convolution has its channels first, `[B, D, ...]`, and a
            linear layer its features last, `[B, ..., D]`.
    """
    rows = features.movedim(-1 if isinstance(head, nn.Linear) else 1, -1)
    return rows.flatten(1, -2).mean(1) if rows.dim() > 2 else rows


def check_rows(model: nn.Module, head: nn.Module, sample: Any) -> None:
    """Raise ValueError where the head sees several rows of a sample, and mixed with another's.

    Args:
        sample: a batch of inputs, of which two are used.
    """
    both = features_of(model, head, pick(sample, slice(2)))
    if len(both) == 2:
        return
    first = features_of(model, head, pick(sample, slice(1)))
    apart = by_sample(both, 2)[0]
    if apart.shape != first.shape or not torch.allclose(apart, first, rtol=1e-3, atol=1e-5):
        raise ValueError(
            "the head sees rows of several samples mixed: rehearsal and distillation need those of "
            "each together. Set rehearse=0 and distill=0, or fold positions behind samples"
        )
