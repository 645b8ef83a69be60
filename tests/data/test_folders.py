"""Layouts in which folders of images are published: read right, or refused by name."""

import os

import numpy as np
import pytest

from fast.data.sources import DataWarning, load_data
from fast.data.sources.files import samples_hash
from fast.data.sources.names import role_of, roles_of

Image = pytest.importorskip("PIL.Image", reason="image folders need Pillow")

PETS = ("cat", "dog")


def write(root, *folders, count=2):
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(np.zeros((4, 4), np.uint8)).save(root / folder / f"{i}.png")


def pets(*splits):
    return [f"{split}/{name}" for split in splits for name in PETS]


def read(root):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        return load_data(str(root))


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("Train", "Test"),
        ("training", "validation"),
        ("TRAIN", "VALID"),
        ("training_set", "test_set"),
        ("TrainingData", "ValidationData"),
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("train/images", "test/images"),
        ("flowers-train", "flowers-test"),
        ("train", "dev"),
        ("train", "eval"),
        ("train", "hold-out"),
        ("data/train", "data/Val"),
        ("a/b/trainset", "a/b/testset"),
    ],
)
def test_splits(tmp_path, train, val):
    write(tmp_path, *pets(train), count=3)
    write(tmp_path, *pets(val))
    data = load_data(str(tmp_path))
    assert data.classes == PETS
    assert (len(data.train), len(data.val)) == (6, 4)
    assert data.held_out == f"folder {val}"


@pytest.mark.parametrize(
    "classes",
    [
        ("bus", "car", "train"),
        ("control", "test"),
        ("invalid", "valid"),
        ("beach", "test_track", "train_station"),
        ("test_tube", "train", "val", "zebra"),
    ],
)
def test_classes_that_are_called_like_splits(tmp_path, classes):
    write(tmp_path, *classes)
    assert load_data(str(tmp_path)).classes == classes


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["train", "test"], "train has images but no class folders"),
        (["train/steam", "bus", "car"], "cannot tell whether train is a split or a class beside"),
        (pets("train", "training"), "train, training are all names of a training split"),
        (pets("photo", "sketch"), "photo and sketch both hold folders cat, dog: are they splits"),
        (["cat/train", "cat/test", "dog/train", "dog/test"], "cat and dog both hold folders test"),
        (["rose", "tulip", "all/rose", "all/tulip"], "all holds rose, tulip once more"),
    ],
)
def test_what_could_be_either_is_refused(tmp_path, folders, message):
    write(tmp_path, *folders)
    with pytest.raises(ValueError, match=message):
        load_data(str(tmp_path))


@pytest.mark.parametrize(
    ("folders", "unused"),
    [
        (pets("train", "val", "test"), "folder test is not used (4 images)"),
        (pets("train", "dev", "eval"), "folder eval is not used (4 images)"),
        ([*pets("train"), "test"], "folder test is not used (2 images, not in class folders)"),
        (pets("train", "val", "pets/train"), "folder pets is not used (4 images)"),
        ([*pets("seg_train", "seg_test"), "seg_pred"], "folder seg_pred is not used (2 images"),
    ],
)
def test_folders_that_are_not_used_are_named(tmp_path, folders, unused):
    write(tmp_path, *folders)
    with pytest.warns(DataWarning) as told:
        data = load_data(str(tmp_path))
    assert data.classes == PETS
    assert any(unused in str(warning.message) for warning in told)
    assert any(note.startswith(unused) for note in data.notes)


def test_litter_at_any_depth_is_no_data(tmp_path):
    write(tmp_path, *pets("train", "val"))
    litter = ["__MACOSX/train/cat", "train/@eaDir/x", "train/cat/.ipynb_checkpoints"]
    write(tmp_path, *litter, "val/dog/@eaDir", "train/dog/deep/$RECYCLE.BIN")
    for name in ("._0.png", "Thumbs.db", ".DS_Store"):
        (tmp_path / "train" / "cat" / name).write_bytes(b"Mac OS X")
    data = load_data(str(tmp_path))
    assert (len(data.train), len(data.val), data.notes) == (4, 4, ())


def test_files_that_are_not_read_are_counted(tmp_path):
    write(tmp_path, *PETS)
    for name in ("a.heic", "b.HEIC", "c.txt"):
        (tmp_path / "cat" / name).write_bytes(b"x")
    Image.new("L", (4, 4)).save(tmp_path / "dog" / "windows.jfif", "JPEG")
    with pytest.warns(DataWarning, match=r"2 \.heic \(Pillow.*convert them to JPEG\), 1 \.txt"):
        assert len(load_data(str(tmp_path)).train) == 5
    for file in (tmp_path / "cat").glob("*.png"):
        file.unlink()
    with pytest.raises(ValueError, match=r"cat: class folder without images: it has 2 \.heic"):
        load_data(str(tmp_path))


def test_pipes_devices_and_circles_of_links(tmp_path):
    write(tmp_path, *PETS)
    os.mkfifo(tmp_path / "cat" / "pipe.png")
    (tmp_path / "cat" / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "cat" / "gone.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "dog" / "circle").symlink_to(tmp_path)
    (tmp_path / "dog" / "more").mkdir()
    (tmp_path / "dog" / "more" / "back").symlink_to(tmp_path / "dog")
    data = read(tmp_path)
    assert len(data.train) == 4
    assert "left out: 2 broken links, 1 pipe or device" in data.notes[0]


def test_names_that_write_to_the_terminal(tmp_path):
    write(tmp_path / "train", "cat", "\x1b[2Jdog")
    write(tmp_path / "val", "cat", "\x1b[2J\nfast: error: fish")
    with pytest.raises(ValueError) as caught:
        load_data(str(tmp_path))
    assert str(caught.value).isprintable()


def test_a_class_may_begin_with_underscores(tmp_path):
    """It was taken for litter, as __MACOSX is, and nothing said so."""
    write(tmp_path, "__none__", *PETS)
    assert load_data(str(tmp_path)).classes == ("__none__", "cat", "dog")


def test_one_number_twice_is_refused_as_a_label(tmp_path):
    write(tmp_path, "01", "1", "2")
    assert load_data(str(tmp_path)).classes == ("01", "1", "2")
    with pytest.raises(ValueError, match="two class folders have the same number: 01, 1, 2"):
        load_data(str(tmp_path), numeric_labels=True)


def test_description(tmp_path):
    write(tmp_path, *pets("train"), count=3)
    write(tmp_path, *pets("test"))
    data = load_data(str(tmp_path))
    assert data.description == {
        "name": str(tmp_path),
        "classes": ["cat", "dog"],
        "samples": {"train": [3, 3], "val": [2, 2]},
        "held_out": "folder test",
        "notes": [],
        "samples_hash": "",
    }


def test_nothing_is_held_out_where_all_are_to_be_trained_on(tmp_path):
    write(tmp_path, *PETS)
    data = load_data(str(tmp_path)).with_val(0)
    assert (len(data.train), data.val) == (4, None)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("Val", "val"),
        ("test2017", "test"),
        ("unlabeled", "rest"),
        ("trains", None),
        ("tests", None),
    ],
)
def test_roles(name, role):
    assert role_of(name) == role
    assert roles_of([name]) == ({name: role} if role else {})


def test_sounds_are_not_called_images(tmp_path):
    (tmp_path / "0.wav").write_bytes(b"")
    with pytest.raises(ValueError, match="has sounds but no class folders"):
        load_data(str(tmp_path))
    (tmp_path / "texts" / "good").mkdir(parents=True)
    (tmp_path / "texts" / "good" / "0.txt").write_text("fine")
    (tmp_path / "texts" / "bad").mkdir()
    with pytest.raises(ValueError, match="bad: class folder without texts; fill it"):
        load_data(str(tmp_path / "texts"))


def test_an_umlaut_is_written_in_two_ways(tmp_path):
    """macOS takes letters and their accents apart; both look the same."""
    together, apart = "G\u00e4nse", "Ga\u0308nse"
    write(tmp_path, f"train/{together}", f"train/{apart}", "train/cat", f"val/{apart}", count=1)
    data = load_data(str(tmp_path))
    assert data.classes == (together, "cat")
    assert data.train.labels.tolist() == [0, 0, 1]
    assert data.val.labels.tolist() == [0]


def test_the_hash_of_samples_is_of_what_they_are_and_not_of_where(tmp_path):
    write(tmp_path / "here", *PETS)
    (tmp_path / "there").mkdir()
    hashes = [samples_hash(read(tmp_path / "here"))]
    (tmp_path / "here").rename(tmp_path / "there" / "pets")
    moved = tmp_path / "there" / "pets"
    assert samples_hash(read(moved)) == hashes[0]
    (moved / "cat" / "0.png").write_bytes((moved / "cat" / "0.png").read_bytes() + b"longer")
    hashes.append(samples_hash(read(moved)))
    (moved / "cat").rename(moved / "lion")
    hashes.append(samples_hash(read(moved)))
    (moved / "dog" / "1.png").unlink()
    hashes.append(samples_hash(read(moved)))
    assert len(set(hashes)) == len(hashes)
