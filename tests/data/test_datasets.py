"""Data that Python users bring: arrays, tables and data sets of every library."""

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

import fast
from fast.adapt.loss import class_weights
from fast.data.arrays import as_tensor
from fast.data.dataset import as_data
from fast.data.labels import check_labels
from networks import ConvNet, images

X, Y = images(40, 4)
PAIRS = TensorDataset(X, Y)


class Given(Dataset):
    """Samples by a function; further attributes as given."""

    def __init__(self, sample, **attributes):
        self.sample = sample
        vars(self).update(attributes)

    def __len__(self):
        return 12

    def __getitem__(self, i):
        return self.sample(i)


@pytest.mark.parametrize(
    "data",
    [
        PAIRS,
        Subset(PAIRS, range(0, 40, 2)),
        ConcatDataset([PAIRS, Subset(PAIRS, [1, 2])]),
        DataLoader(PAIRS, batch_size=8),
        DataLoader(Subset(PAIRS, range(40)), batch_size=8),
    ],
)
def test_classes_are_counted(data):
    assert as_data(data, "train").infer_num_classes() == 4
    assert len(as_data(data, "train").recorded_targets()) == as_data(data, "train").num_samples


def test_labels_are_counted_as_they_are_trained_on():
    rare = Given(None, targets=[0] * 9 + [1] * 3, target_transform=lambda label: 1 - label)
    weights = class_weights("balanced", as_data(rare, "train"), 2)
    assert weights.tolist() == pytest.approx([12 / (2 * 3), 12 / (2 * 9)])
    ten = Given(None, targets=list(range(12)), classes=list("abcdefghijkl"))
    assert as_data(ten, "train").infer_num_classes() == 12
    ten.target_transform = lambda label: label % 2
    assert as_data(ten, "train").infer_num_classes() == 2
    assert as_data(Subset(ten, [1, 3, 2]), "train").recorded_targets() == [1, 1, 0]


@pytest.mark.parametrize(
    ("sample", "attributes", "message"),
    [
        (lambda i: (X[i], 0, f"{i}.png"), {}, "train: a sample ends in str, where its label is"),
        (lambda i: (X[i], "cat"), {}, "names of classes, number the names"),
        (lambda i: {"x": X[i], "label": "cat"}, {}, "names of classes, number the names"),
        (lambda i: (object(), 0), {}, r"train: sample \d+ is \(object, int\); give tensors"),
        (
            lambda i: (X[i][:, : 4 + i % 2], 0),
            {},
            r"train: samples \d+ and \d+ do not fit into one",
        ),
        (lambda i: 1 / 0, {}, r"train: sample \d+ cannot be read: ZeroDivisionError: division by"),
        (lambda i: (X[i], 0), {"labels": ["a", "b"], "num": None}, "train: num_classes is not giv"),
        (lambda i: (X[i], 0), {"targets": list("abcabcabcabc"), "num": None}, "train: labels must"),
    ],
)
@pytest.mark.parametrize("loader", [False, True])
def test_what_is_wrong_is_named(sample, attributes, message, loader):
    data = Given(sample, **attributes)
    if loader and "sample" in message and "ends" not in message:
        message = "train: the DataLoader raised "
    data = DataLoader(data, batch_size=4) if loader else data
    with pytest.raises((ValueError, TypeError), match=message):
        fast.finetune(ConvNet(), data, num_classes=attributes.get("num", 2), batch_size=4, steps=2)


def test_classes_without_a_sample_are_told():
    with pytest.warns(UserWarning, match=r"train: no sample of 1 class \(0\), and labels up to 4"):
        assert as_data((X, Y + 1), "train").infer_num_classes() == 5


def test_images_in_0_to_255_are_told():
    bright = (X - X.min()).mul(50).round().clamp(max=255)
    with pytest.warns(
        UserWarning, match=r"train: inputs are whole numbers in 0\.\.\d+: a pretrained"
    ):
        as_data((bright, Y), "train")
    with pytest.warns(UserWarning, match=r"train: inputs are whole numbers"):
        as_data(TensorDataset(bright, Y), "train")


@pytest.mark.parametrize("dtype", [">f8", ">i2", np.uint16, np.uint32, np.longdouble, np.float16])
def test_arrays_of_every_kind(dtype):
    values = np.arange(6).reshape(3, 2).astype(dtype)
    values.flags.writeable = False
    tensor = as_tensor(values, "train: inputs")
    assert tensor.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert tensor.dtype in (torch.float32, torch.float16, torch.int16, torch.int64)


@pytest.mark.parametrize(
    "values",
    [np.ones(3, complex), torch.ones(3, dtype=torch.complex64), np.array(["a"]), [[1], [1, 2]]],
)
def test_what_is_no_real_number_is_refused(values):
    with pytest.raises(TypeError, match=r"x must be (real )?numbers"):
        as_tensor(values, "x")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0.0, float("inf")]), "x: 1 label is infinite, the first in row 1"),
        (torch.ones(2, dtype=torch.complex64), "x: labels must be whole numbers"),
        (torch.tensor([1, 2**63], dtype=torch.uint64), "x: labels must be 0 or more"),
    ],
)
def test_labels_that_are_none(labels, message):
    with pytest.raises(ValueError, match=message):
        check_labels(labels, None, "x")


def test_unsigned_labels():
    assert check_labels(torch.tensor([1, 2], dtype=torch.uint16), 3, "x").tolist() == [1, 2]


def test_pandas():
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    labels = pandas.Series(Y.tolist(), index=range(100, 140))
    data = as_data((X, labels), "train")
    assert data.labels.tolist() == Y.tolist()
    table = pandas.DataFrame(X.flatten(1).double().numpy()).sample(frac=1, random_state=0)
    with pytest.warns(UserWarning, match="inputs and labels have different indexes"):
        data = as_data((table, labels), "train")
    assert torch.equal(data.inputs, X.flatten(1)[list(table.index)])
    labels.index = table.index
    as_data((table, labels), "train")  # without a warning, which would fail here
    table["name"] = "a"
    with pytest.raises(TypeError, match=r"train: inputs must be numbers.*DataFrame of"):
        as_data((table, labels), "train")


class TestHuggingFace:
    @pytest.fixture
    def table(self):
        datasets = pytest.importorskip("datasets", reason="datasets is not installed")
        columns = {"x": X.tolist(), "label": Y.tolist()}
        return datasets.Dataset.from_dict(columns)

    def test_a_table_trains(self, table):
        class ByName(ConvNet):
            def forward(self, x):
                return super().forward(x)

        losses = [
            fast.finetune(
                seeded(ByName), data, val=data, source_inputs=kept, steps=3, num_classes=4
            )
            for data, kept in ((table, table), (({"x": X}, Y), ({"x": X}, Y)))
        ]
        assert losses[0].history[-1]["loss"] == pytest.approx(
            losses[1].history[-1]["loss"], rel=1e-4
        )

    def test_labels_of_a_table(self, table):
        assert as_data(table, "train").infer_num_classes() == 4

    def test_columns_that_are_no_numbers(self, table):
        texts = table.add_column("text", ["a"] * 40)
        with pytest.raises(
            TypeError, match=r"train: columns .* no numbers: text; .*remove_columns"
        ):
            as_data(texts, "train")

    def test_several_splits(self, table):
        datasets = pytest.importorskip("datasets", reason="datasets is not installed")
        with pytest.raises(TypeError, match="got DatasetDict of train, test: pass one of them"):
            as_data(datasets.DatasetDict(train=table, test=table), "train")


def seeded(kind):
    torch.manual_seed(0)
    return kind()
