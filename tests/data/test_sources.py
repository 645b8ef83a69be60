"""Data by name: what is read, and what is refused with which words."""

import io

import numpy as np
import pytest

from fast.data import sources
from fast.data.sources import (
    DataWarning,
    EncodedImages,
    NamedData,
    Split,
    load_data,
    stratified_split,
)

Image = pytest.importorskip("PIL.Image", reason="image folders need Pillow")


def write_images(root, counts, size=(8, 8)):
    """`counts`: class folder -> number of PNG files, each filled with its own grey level."""
    level = 0
    for name, count in counts.items():
        folder = root / name
        folder.mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", size, (level, level, level)).save(folder / f"{i}.png")
            level += 1


def save_npz(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


IMAGES = np.arange(6 * 4 * 4 * 3, dtype=np.uint8).reshape(6, 4, 4, 3)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def test_folder_with_train_and_val(tmp_path):
    write_images(tmp_path / "train", {"cat": 3, "ant": 2})
    write_images(tmp_path / "test", {"cat": 1, "ant": 1})
    data = load_data(str(tmp_path))
    assert data.classes == ("ant", "cat")
    assert data.train.labels.tolist() == [0, 0, 1, 1, 1]
    assert data.val.labels.tolist() == [0, 1]
    assert data.train.inputs.open(4) == str(tmp_path / "train" / "cat" / "2.png")


def test_folder_without_val_is_split_by_class_and_the_same_each_time(tmp_path):
    write_images(tmp_path, {"a": 10, "b": 5})
    first, again = (load_data(str(tmp_path)).with_val(0.2) for _ in range(2))
    assert np.bincount(first.train.labels).tolist() == [8, 4]
    assert np.bincount(first.val.labels).tolist() == [2, 1]
    assert first.val.inputs.names == again.val.inputs.names
    assert not set(first.val.inputs.names) & set(first.train.inputs.names)


def test_folders_named_by_number_are_ordered_by_number(tmp_path):
    write_images(tmp_path, {"10": 1, "2": 1, "0": 1})
    assert load_data(str(tmp_path)).classes == ("0", "2", "10")


def test_numeric_labels_keep_the_numbers_of_a_source_task(tmp_path):
    write_images(tmp_path, {"2": 1, "10": 2})
    data = load_data(str(tmp_path), numeric_labels=True)
    assert data.train.labels.tolist() == [2, 10, 10]
    assert len(data.classes) == 11


def test_other_files_and_hidden_folders_are_passed_over(tmp_path):
    write_images(tmp_path, {"a": 1, "b": 1, ".cache": 1})
    (tmp_path / "a" / "Thumbs.db").write_bytes(b"x")
    data = load_data(str(tmp_path))
    assert data.classes == ("a", "b")
    assert len(data.train) == 2


def test_folder_errors(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="empty: is empty; expected a folder of images"):
        load_data(str(empty))

    loose = tmp_path / "loose"
    write_images(tmp_path, {"loose": 1})
    with pytest.raises(ValueError, match="has images but no class folders"):
        load_data(str(loose))

    gap = tmp_path / "gap"
    write_images(gap, {"a": 1})
    (gap / "b").mkdir()
    with pytest.raises(ValueError, match=r"gap/b: class folder without images"):
        load_data(str(gap))

    new = tmp_path / "new"
    write_images(new / "train", {"a": 1, "b": 1})
    write_images(new / "val", {"a": 1, "c": 1})
    with pytest.raises(ValueError, match="'c' has no counterpart"):
        load_data(str(new))


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_npz_with_splits(tmp_path, held_out):
    name = save_npz(
        tmp_path / "d.npz",
        x_train=IMAGES,
        y_train=LABELS,
        classes=["a", "b", "c"],
        **{f"x_{held_out}": IMAGES[:3], f"y_{held_out}": LABELS[:3]},
    )
    data = load_data(name)
    assert data.classes == ("a", "b", "c")
    np.testing.assert_array_equal(data.train.inputs, IMAGES)
    assert data.val.labels.tolist() == [0, 1, 2]


def test_npz_with_x_and_y(tmp_path):
    data = load_data(save_npz(tmp_path / "d.npz", x=IMAGES, y=LABELS.astype(np.float32)[:, None]))
    assert data.classes == ("0", "1", "2")
    assert data.val is None
    assert data.train.labels.dtype == np.int64


def test_npz_with_several_inputs(tmp_path):
    ids = np.arange(12).reshape(6, 2)
    arrays = {"x_train.input_ids": ids, "x_train.attention_mask": np.ones((6, 2), np.int64)}
    data = load_data(save_npz(tmp_path / "d.npz", y_train=LABELS, **arrays)).with_val(0.5)
    assert set(data.train.inputs) == {"input_ids", "attention_mask"}
    both = np.concatenate([data.train.inputs["input_ids"], data.val.inputs["input_ids"]])
    assert sorted(both[:, 0]) == ids[:, 0].tolist()


def test_npz_with_encoded_images(tmp_path):
    files = []
    for level in (10, 200):
        buffer = io.BytesIO()
        Image.new("RGB", (4, 4), (level,) * 3).save(buffer, "PNG")
        files.append(buffer.getvalue())
    border = np.cumsum([0, *map(len, files)])
    packed = np.frombuffer(b"".join(files), np.uint8)
    name = save_npz(tmp_path / "d.npz", jpeg_test=packed, offset_test=border, y_test=[0, 1])
    data = load_data(name)
    assert data.train is None
    with Image.open(data.val.inputs.open(1)) as image:
        assert image.getpixel((0, 0)) == (200, 200, 200)
    name = save_npz(tmp_path / "e.npz", jpeg_test=packed[:-9], offset_test=border, y_test=[0, 1])
    with pytest.raises(ValueError, match="offset_test must rise"):
        load_data(name)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": IMAGES, "y": LABELS[:5]}, "6 inputs but 5 labels"),
        ({"x": IMAGES, "y": LABELS - 1}, "labels must be 0 or more; got -1..1, first -1 in row 0"),
        ({"x": IMAGES, "y": LABELS, "classes": ["a", "b"]}, r"labels must be 0\.\.1; .*row 2"),
        ({"x": IMAGES, "y": [0, 1, np.nan, 0, 1, 1]}, "1 label is NaN, the first in row 2"),
        ({"x": IMAGES, "y": LABELS + 0.5}, "whole numbers"),
        ({"x": IMAGES, "y": LABELS.astype(str)}, "must be class indices 0, 1, ...; got <U"),
        ({"x": IMAGES, "y": np.eye(6)}, "one-hot"),
        ({"x": IMAGES[:0], "y": LABELS[:0]}, "is empty"),
        ({"x": np.arange(6), "y": LABELS}, "must be images"),
        ({"x": np.full((6, 2), np.inf), "y": LABELS}, "sample 0 is not finite"),
        ({"x": IMAGES}, "no labels y"),
        ({"images": IMAGES, "labels": LABELS}, "expected x_train and y_train.*got images, labels"),
        ({"x.a": IMAGES, "x.b": IMAGES[:2], "y": LABELS}, "differ in length"),
        ({"x": np.array([{}] * 6), "y": LABELS}, "not a readable .npz of plain arrays"),
    ],
)
def test_npz_errors_name_the_file_and_the_fault(tmp_path, arrays, message):
    name = save_npz(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=rf"(?s)bad\.npz.*{message}"):
        load_data(name)


def test_truncated_npz(tmp_path):
    path = tmp_path / "d.npz"
    save_npz(path, x=IMAGES, y=LABELS)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"not a readable \.npz"):
        load_data(str(path))


def test_missing_and_unknown_files(tmp_path):
    for name in (tmp_path / "no.npz", tmp_path / "no"):
        with pytest.raises(FileNotFoundError, match="no such file"):
            load_data(str(name))
    odd = tmp_path / "d.xlsx"
    odd.write_text("1,2")
    with pytest.raises(ValueError, match=r"unknown file type '\.xlsx'"):
        load_data(str(odd))


@pytest.mark.parametrize(
    "name", ["nothere", "nothere:sub", "./a/b", "../a", "~/a/b", "a/", "a/b/c"]
)
def test_what_cannot_be_on_the_hub_is_not_looked_for_there(name, monkeypatch):
    monkeypatch.setattr(sources, "read_hugging_face", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match=r"no such file or folder \(.*OWNER/NAME, or hf:"):
        load_data(name)


@pytest.mark.parametrize(
    "name", ["owner/na-me_1.0", "owner/name:config", "hf:name", "hf:name:config"]
)
def test_names_of_the_hub(name, monkeypatch):
    calls = []
    empty = NamedData(name=name, splits={}, classes=())
    monkeypatch.setattr(sources, "read_hugging_face", lambda *args: calls.append(args) or empty)
    load_data(name)
    assert calls == [(name, None, None)]


@pytest.mark.filterwarnings("ignore::fast.data.sources.DataWarning")
def test_samples_without_labels_where_none_are_needed(tmp_path):
    """Source inputs: a folder of files, an .npz without y, a table without labels, a text file."""
    write_images(tmp_path / "old", {".": 2, "more": 1})
    write_images(tmp_path / "split/train", {".": 3})
    (tmp_path / "files.csv").write_text("path,year\nold/0.png,2019\nold/1.png,2020\n")
    (tmp_path / "texts.csv").write_text("text\nwas it\nit was\n")
    (tmp_path / "texts.txt").write_text("was it\n\nit was\n")
    save_npz(tmp_path / "x.npz", x_train=IMAGES)
    names = {"old": 3, "split": 3, "files.csv": 2, "texts.csv": 2, "texts.txt": 2, "x.npz": 6}
    for name, count in names.items():
        data = load_data(str(tmp_path / name), unlabelled=True)
        assert (len(data.train), data.has_labels, data.classes) == (count, False, ())
    with pytest.raises(ValueError, match="has x_train but no labels y_train"):
        load_data(str(tmp_path / "x.npz"))
    assert load_data(str(tmp_path / "texts.txt"), unlabelled=True).train.inputs[1] == "it was"
    save_npz(tmp_path / "x.npz", x=IMAGES[:0])
    with pytest.raises(ValueError, match="is empty"):
        load_data(str(tmp_path / "x.npz"), unlabelled=True)


@pytest.mark.filterwarnings("ignore::fast.data.sources.DataWarning")
def test_labels_are_read_where_there_are_some(tmp_path):
    write_images(tmp_path / "old", {"1": 2, "2": 1})
    (tmp_path / "texts.csv").write_text("text,label\nwas it,0\nit was,1\n")
    save_npz(tmp_path / "x.npz", x=IMAGES, y=LABELS)
    for name, top in (("old", 2), ("texts.csv", 1), ("x.npz", 2)):
        data = load_data(str(tmp_path / name), numeric_labels=True, unlabelled=True)
        assert (data.has_labels, data.train.labels.max()) == (True, top)


def test_split_keeps_a_training_sample_of_every_class():
    split = Split(inputs=np.arange(7), labels=np.array([0, 0, 1, 1, 1, 1, 2]))
    rest, part = stratified_split(split, 0.1)
    assert sorted(set(rest.labels)) == [0, 1, 2]
    assert sorted([*rest.inputs, *part.inputs]) == list(range(7))
    assert sorted(part.labels) == [0, 1]
    with pytest.raises(ValueError, match="between 0 and 1"):
        stratified_split(split, 1.0)
    with pytest.raises(ValueError, match="single sample"):
        stratified_split(Split(inputs=np.arange(2), labels=np.array([0, 1])), 0.5)


class TestHuggingFace:
    """On data sets written to disk here; the hub gives the same objects."""

    @pytest.fixture(scope="class")
    def datasets(self):
        return pytest.importorskip("datasets", reason="datasets is not installed")

    def test_images(self, datasets, tmp_path):
        pictures = [Image.new("RGB", (4, 4), (level, 0, 0)) for level in (5, 250)]
        features = datasets.Features(
            picture=datasets.Image(), kind=datasets.ClassLabel(names=["dark", "light"])
        )
        table = datasets.Dataset.from_dict({"picture": pictures, "kind": [0, 1]}, features=features)
        datasets.DatasetDict(train=table, validation=table).save_to_disk(tmp_path / "d")
        data = load_data(str(tmp_path / "d"))
        assert data.classes == ("dark", "light")
        assert isinstance(data.val.inputs, EncodedImages)
        with Image.open(data.val.subset(np.array([1])).inputs.open(0)) as image:
            assert image.getpixel((0, 0)) == (250, 0, 0)

    def test_texts(self, datasets, tmp_path):
        table = datasets.Dataset.from_dict({"text": ["a b", "c"], "label": [1, 0]})
        table.save_to_disk(tmp_path / "d")
        data = load_data(str(tmp_path / "d"))
        assert data.train.inputs == ["a b", "c"]
        assert data.train.labels.tolist() == [1, 0]
        with pytest.raises(ValueError, match=r"no column 'x'; --input-column can be: text, label"):
            load_data(str(tmp_path / "d"), input_column="x")

    def test_columns_that_cannot_be_told(self, datasets, tmp_path):
        table = datasets.Dataset.from_dict({"text": ["a"], "stars": [1]})
        table.save_to_disk(tmp_path / "d")
        with pytest.raises(ValueError, match="--label-column: text, stars"):
            load_data(str(tmp_path / "d"))
        assert load_data(str(tmp_path / "d"), label_column="stars").train.labels.tolist() == [1]

    def test_splits(self, datasets, tmp_path):
        table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
        unknown = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [-1, -1]})
        splits = {"train": table, "dev": table, "test": unknown}
        datasets.DatasetDict(splits).save_to_disk(tmp_path / "dev")
        with pytest.warns(DataWarning, match="split test is not used: its labels are all -1"):
            data = load_data(str(tmp_path / "dev"))
        assert (len(data.val), data.held_out) == (2, "split dev")
        datasets.DatasetDict(train=table, test=unknown).save_to_disk(tmp_path / "test")
        with pytest.warns(DataWarning, match="all -1"):
            assert load_data(str(tmp_path / "test")).val is None
        datasets.DatasetDict(train=unknown, test=table).save_to_disk(tmp_path / "train")
        with pytest.raises(ValueError, match="split train: label: labels must be 0 or more"):
            load_data(str(tmp_path / "train"))

    @pytest.mark.parametrize(
        ("column", "message"),
        [
            ([[1], [1, 2]], "split train: x: rows differ in length"),
            (["a", None], "split train: x: empty cells: 1, the first in row 1"),
        ],
    )
    def test_columns_that_are_no_inputs(self, datasets, tmp_path, column, message):
        datasets.Dataset.from_dict({"x": column, "label": [0, 1]}).save_to_disk(tmp_path / "d")
        with pytest.raises(ValueError, match=message):
            load_data(str(tmp_path / "d"), input_column="x")


def test_a_hub_that_cannot_be_reached_is_found_out_at_once(monkeypatch):
    pytest.importorskip("datasets", reason="datasets is not installed")
    from huggingface_hub import constants

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    switches = ("huggingface_hub.constants.HF_HUB_OFFLINE", "datasets.config.HF_HUB_OFFLINE")
    for switch in switches:
        monkeypatch.setattr(switch, False)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it is tried again"))
    with pytest.raises(FileNotFoundError, match="nor can it be loaded as a Hugging Face data set"):
        load_data("owner/name-that-is-nowhere")
    assert not constants.HF_HUB_OFFLINE


def test_a_version_that_runs_the_scripts_of_data_sets_is_refused(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setattr(datasets, "__version__", "2.18.0")
    with pytest.raises(ImportError, match=r"datasets 2.18.0 is too old: .*'datasets>=4'"):
        load_data("hf:owner/name")
