"""The target's loss: torch's own, whose parts add up to the mean over a batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, TensorDataset

from fast.adapt.loss import TargetLoss, class_weights
from fast.data.dataset import as_data

LOGITS = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 3
WEIGHTS = torch.tensor([0.5, 2.0, 0.0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_it_is_the_mean_over_a_batch_and_over_its_parts(weights, smoothing):
    loss = TargetLoss(weights, smoothing)
    expected = F.cross_entropy(LOGITS, LABELS, weight=weights, label_smoothing=smoothing)
    assert loss(LOGITS, LABELS) == pytest.approx(expected.item())
    whole = loss.denominator(LABELS)
    parts = zip(LOGITS.split(5), LABELS.split(5), strict=True)
    assert sum(loss.part(*part, whole) for part in parts) == pytest.approx(expected.item())


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_shares_of_classes_are_those_of_the_classes(weights):
    loss, shares = TargetLoss(weights, 0.0), F.one_hot(LABELS, 3).float()
    assert loss(LOGITS, shares) == pytest.approx(loss(LOGITS, LABELS).item())


def test_a_batch_of_classes_without_weight_has_no_loss():
    assert TargetLoss(WEIGHTS, 0.0)(LOGITS[:2], torch.tensor([2, 2])) == 0


class Bare(Dataset):
    """Has no list of its labels."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return torch.zeros(4), i % 2


def test_classes_are_balanced_by_their_samples():
    labels = torch.tensor([0, 0, 0, 1, 3, 3])
    for data in ((torch.zeros(6, 4), labels), TensorDataset(torch.zeros(6, 4), labels)):
        weights = class_weights("balanced", as_data(data, "train"), 4)
        assert weights.tolist() == pytest.approx([6 / (4 * 3), 6 / (4 * 1), 0, 6 / (4 * 2)])
    with pytest.raises(ValueError, match="class_weights='balanced' needs the labels"):
        class_weights("balanced", as_data(Bare(), "train"), 2)


def test_weights_of_classes_that_the_data_lack_alone_are_refused():
    data = as_data((torch.zeros(4, 2), torch.tensor([0, 0, 1, 1])), "train")
    assert class_weights((0.0, 1.0, 1.0), data, 3).tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match="0 for every class in train"):
        class_weights((0.0, 0.0, 1.0), data, 3)
    assert class_weights(None, data, 3) is None
