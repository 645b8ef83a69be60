"""Augmented and parallel reading: a run is the same to the bit, however its samples are read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fast
from fast.data.dataset import Data, as_data
from fast.data.images.format import ImageFormat
from fast.data.images.pixels import prepare_images
from fast.data.sources import EncodedImages, Split
from fast.data.stream import TrainBatches
from fast.models.identity import data_identity
from networks import ConvNet, SequentialHead, images

Image = pytest.importorskip("PIL.Image", reason="image files need Pillow")
SIZE = 8


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Pictures of 3 classes: a bright column on noise."""
    pytest.importorskip("torchvision.transforms.v2", reason="augmentation needs torchvision")
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    labels = np.arange(36) % 3
    paths = []
    for i, label in enumerate(labels):
        pixels = rng.integers(0, 100, (12, 12), dtype=np.uint8)
        pixels[:, 4 * label : 4 * label + 4] += 120
        paths.append(str(folder / f"{i}.png"))
        Image.fromarray(pixels).save(paths[-1])
    return Split(inputs=EncodedImages(names=paths, open=paths.__getitem__), labels=labels)


def augmented(split, augment="strong"):
    return prepare_images(split, ImageFormat(size=SIZE), augment=augment)


def plain():
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


def weights(result):
    return torch.cat([p.detach().flatten() for p in result.model.parameters()])


def run(split, workers, **options):
    torch.manual_seed(0)
    options = {"steps": 12, "batch_size": 8, "num_workers": workers, **options}
    plain = prepare_images(split, ImageFormat(size=SIZE))
    return fast.finetune(SequentialHead(), augmented(split), plain, num_classes=3, **options)


def test_a_view_depends_on_its_seed_alone(split):
    data = augmented(split)
    first, label = data.view(4, 1)
    torch.rand(3)
    before = torch.default_generator.get_state()
    again, _ = data.view(4, 1)
    assert torch.equal(first, again)
    assert torch.equal(torch.default_generator.get_state(), before)
    assert not torch.equal(first, data.view(4, 2)[0])
    assert not torch.equal(first, data[4][0])
    assert first.shape == data[4][0].shape
    assert int(label) == int(split.labels[4])


def test_a_part_of_the_pictures(split):
    data, rows = augmented(split), np.array([5, 1, 30])
    part = data.subset(rows)
    assert part.labels.tolist() == split.labels[rows].tolist()
    assert torch.equal(part.view(2, 1)[0], data.view(30, 1)[0])
    assert torch.equal(part[0][0], data[5][0])
    still = data.subset(rows, augment=False)
    assert not hasattr(still, "view")
    assert torch.equal(still[0][0], data[5][0])


def test_an_epoch_has_views_of_its_own(split):
    data = Data(name="train", dataset=augmented(split))
    batches = TrainBatches(data, 36, seed=0).from_step(0)
    (a, _, rows_a), (b, _, rows_b) = next(batches), next(batches)
    assert not torch.equal(a[rows_a.argsort()], b[rows_b.argsort()])
    again, _, _ = next(TrainBatches(data, 36, seed=0).from_step(1))
    assert torch.equal(again, b)


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_workers_change_no_bit(split, workers):
    assert torch.equal(weights(run(split, 0)), weights(run(split, workers)))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_interrupted_and_resumed_with_augmentation_and_mixing(split, tmp_path, workers):
    """The callback stops the run after its second checkpoint, as a kill would."""
    options = {"eval_every": 3, "mixup": 0.4, "cutmix": 1.0}
    whole = run(split, workers, **options)

    def stop(record):
        if record["step"] == 9:
            raise KeyboardInterrupt

    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(split, workers, output=folder, callbacks=[stop], **options)
    again = run(split, workers, resume=folder, **options)
    assert torch.equal(weights(whole), weights(again))


def test_another_augmentation_is_another_run(split):
    strong, again, light = (
        data_identity(Data(name="train", dataset=augmented(split, preset)))
        for preset in ("strong", "strong", "light")
    )
    assert strong == again != light


class Noisy(Dataset):
    """Draws from all three generators of the process, as other people's data sets do."""

    def __init__(self):
        self.x, self.targets = images(40, 4)

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        return self.x[i] + 0.1 * torch.randn(()) + 0.1 * np.random.rand(), self.targets[i]


def test_what_a_data_set_draws_does_not_depend_on_the_number_of_workers():
    def read(workers):
        data = Data(name="train", dataset=Noisy(), workers=workers)
        stream = TrainBatches(data, 8, seed=0).from_step(3)
        return torch.cat([next(stream)[0] for _ in range(6)])

    before = torch.default_generator.get_state()
    assert torch.equal(read(1), read(2))
    assert torch.equal(torch.default_generator.get_state(), before)


def test_an_error_in_a_worker_says_which_sample():
    class Broken(Noisy):
        def __getitem__(self, i):
            raise OSError("disk on fire")

    data = Data(name="val", dataset=Broken(), workers=2)
    with pytest.raises(ValueError, match="val: sample 0 cannot be read: OSError: disk on fire"):
        next(data.eval_batches(8))


@pytest.mark.parametrize("options", [{"mixup": 0.3}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1}])
def test_mixed_labels_are_learned(split, options):
    result = run(split, 0, steps=40, lr=0.01, class_weights=(1.0, 1.0, 1.0), **options)
    assert result.target_accuracy > 0.6


def loaded(x, y):
    return DataLoader(TensorDataset(x, y), batch_size=8)


NOTHING_TO_MIRROR = r"^tta mirrors images .* val has .* leave tta out"


@pytest.mark.parametrize("read", [lambda x, y: (x, y), TensorDataset, loaded])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixup": 0.2}, "mixup and cutmix are for images"),
        ({"cutmix": 1}, "mixup and cutmix are for images"),
        ({"tta": True}, NOTHING_TO_MIRROR),
    ],
)
def test_what_is_for_images_is_refused_before_anything_is_computed(read, options, message):
    data = read(torch.randn(20, 5), torch.arange(20) % 2)

    def source(_):
        raise AssertionError("the source is measured")

    with pytest.raises(ValueError, match=message):
        fast.finetune(plain(), data, data, source, num_classes=2, steps=2, **options)


def test_the_mirror_image_is_measured_too():
    x, y = images(60, 4)
    model = ConvNet()
    result = fast.finetune(model, (x, y), (x, y), steps=3, batch_size=16, tta=True)
    with torch.no_grad():
        logits = (result.model(x) + result.model(x.flip(3))) / 2
    assert result.target_accuracy == pytest.approx((logits.argmax(1) == y).float().mean().item())


def test_without_torchvision_augmentation_names_the_way_out(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchvision.transforms.v2", None)
    empty = Split(inputs=np.zeros((2, 8, 8), np.uint8), labels=np.array([0, 1]))
    with pytest.raises(ImportError, match="needs torchvision: pip install torchvision"):
        augmented(empty)


def test_arrays_are_augmented_too(split):
    arrays = np.random.default_rng(0).integers(0, 256, (6, 9, 9, 3), dtype=np.uint8)
    data = augmented(Split(inputs=arrays, labels=np.arange(6) % 2), "light")
    assert data.view(0, 5)[0].shape == (3, SIZE, SIZE)
    assert as_data(data, "train").has_views
