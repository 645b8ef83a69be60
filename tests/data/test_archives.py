"""An .npz of unknown origin: refused in one line, before its size is taken in memory."""

import io
import os
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from fast.data.sources import DataWarning, load_data

X = np.arange(6 * 4 * 4, dtype=np.uint8).reshape(6, 4, 4)
Y = np.array([0, 1, 2, 0, 1, 2])


def store(path, **members):
    """Arrays, or the bytes of .npy files."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in members.items():
            archive.writestr(f"{name}.npy", value if isinstance(value, bytes) else npy(value))
    return str(path)


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def header(shape, descr="|u1"):
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"x": header((6, 10**15)) + bytes(9), "y": Y}, "x: not a readable .npz of plain arrays"),
        ({"x": header((-6, -1)) + bytes(6), "y": Y}, "x: not a readable .npz of plain arrays"),
        ({"x": header((6, 4), "O") + bytes(24), "y": Y}, "not a readable .npz of plain arrays"),
        ({"x": b"no array", "y": Y}, "not a readable .npz of plain arrays"),
        ({"x": np.zeros((6, 20_000_000), np.uint8), "y": Y}, r"x: 0\.1 GB in a file of 0\.1 MB"),
        ({"x": X, "y": Y, "classes": np.array(["a", "b", "a"])}, "classes has a name more than on"),
        ({"x": X, "y": Y, "classes": np.array([["a", "b", "c"]])}, "classes must be a list of na"),
        ({"x": X.astype(np.uint16), "y": Y}, "x: images must be uint8"),
        ({"x": np.zeros((6, 4, 4, 3), np.int64), "y": Y}, "x: images must be uint8"),
        ({"x": X * (1 + 1j), "y": Y}, "x: must be images"),
        (
            {"x": X, "y": np.where(Y == 1, np.inf, Y)},
            "y: 2 labels are infinite, the first",
        ),
        ({"x": X, "y": Y.astype(np.uint64) + 2**63}, "y: labels must be 0 or more"),
        ({"jpeg": X[:, 0], "offset": Y, "y": Y}, "jpeg must be bytes"),
    ],
)
def test_refused(tmp_path, members, message):
    path = store(tmp_path / "bad.npz", **members)
    tracemalloc.start()
    with pytest.raises(ValueError, match=message):
        load_data(path)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_only_what_is_named_is_read(tmp_path):
    bomb = np.zeros((1, 100_000_000), np.uint8)
    path = store(tmp_path / "d.npz", x=X, y=Y, extra=bomb)
    tracemalloc.start()
    with pytest.warns(DataWarning, match="arrays that are not used: extra"):
        assert len(load_data(path).train) == 6
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_two_arrays_of_one_name(tmp_path):
    path = store(tmp_path / "d.npz", x=X, y=Y)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("x.npy", npy(X))
    with pytest.raises(ValueError, match="has two arrays of one name"):
        load_data(path)


def test_other_files_by_this_name(tmp_path):
    path = tmp_path / "d.npz"
    with path.open("wb") as file:
        np.save(file, X)
    with pytest.raises(ValueError, match=r"is a single array \(\.npy\) by another name"):
        load_data(str(path))
    fifo = tmp_path / "pipe.npz"
    os.mkfifo(fifo)
    with pytest.raises(ValueError, match=r"pipe\.npz: is not a file"):
        load_data(str(fifo))


@pytest.mark.parametrize("suffix", ["test", "dev", "validation", "eval"])
def test_held_out_arrays_and_those_that_are_not(tmp_path, suffix):
    arrays = {f"x_{suffix}": X, f"y_{suffix}": Y}
    data = load_data(store(tmp_path / "d.npz", x_train=X, y_train=Y, **arrays))
    assert (len(data.val), data.held_out) == (6, f"x_{suffix}")


def test_names_of_bytes_and_escapes(tmp_path):
    path = store(tmp_path / "d.npz", x=X, y=Y, classes=np.array([b"a", b"b", b"\x1b[2J"]))
    assert load_data(path).classes == ("a", "b", "\x1b[2J")
    with pytest.raises(ValueError) as caught:
        load_data(store(tmp_path / "e.npz", **{"\x1b[2J": X}))
    assert str(caught.value).isprintable()
