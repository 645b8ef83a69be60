"""Image files as they are seen; those that cannot be read."""

import os

import numpy as np
import pytest
import torch

from fast.data.images import pixels as images
from fast.data.images.format import ImageFormat
from fast.data.images.pixels import prepare_images
from fast.data.sources import EncodedImages, FileReport, Split

Image = pytest.importorskip("PIL.Image", reason="image files need Pillow")
RAW = {"mean": (0,), "std": (1,)}


def split_of(*paths):
    names = [str(path) for path in paths]
    return Split(
        inputs=EncodedImages(names=names, open=names.__getitem__), labels=np.arange(len(names))
    )


def pixels(path, **form):
    """uint8 `[C, H, W]` of a file."""
    x, _ = prepare_images(split_of(path), ImageFormat(**RAW, **form))
    return (x[0] * 255).round().to(torch.uint8).numpy()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp"])
def test_photos_are_upright(tmp_path, orientation, suffix):
    stored = np.kron(np.arange(6).reshape(2, 3) * 40, np.ones((16, 16))).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(stored).convert("RGB").save(path, exif=exif)
    a = stored
    seen = [a, a[:, ::-1], a[::-1, ::-1], a[::-1], a.T, np.rot90(a, -1), a[::-1, ::-1].T]
    expected = [*seen, np.rot90(a)][orientation - 1]
    decoded = pixels(path)[0]
    assert decoded.shape == expected.shape
    assert np.abs(decoded.astype(int) - expected).mean() < 4


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGB", "L"])
def test_what_is_transparent_is_white(tmp_path, mode):
    picture = Image.new("RGBA", (4, 4), (0, 0, 0, 255))
    picture.paste((0, 0, 0, 0) if mode != "RGBA" else (200, 10, 10, 0), (0, 0, 4, 2))
    path = tmp_path / "a.png"
    if mode in ("RGBA", "LA"):
        picture.convert(mode).save(path)
    elif mode in ("P", "PA"):
        picture.quantize(4).save(path)
    else:  # one colour means transparent
        grey = np.repeat([7, 7, 0, 0], 4).reshape(4, 4).astype(np.uint8)
        colour = 7 if mode == "L" else (7, 7, 7)
        Image.fromarray(grey).convert(mode).save(path, transparency=colour)
    decoded = pixels(path, channels=3)
    assert (decoded[:, :2] == 255).all()
    assert (decoded[:, 2:] < 8).all()


def test_arrays_with_alpha_are_seen_as_files_are():
    x = np.zeros((1, 4, 4, 4), np.uint8)
    x[..., 0], x[:, 2:, :, 3] = 90, 255
    seen, _ = prepare_images(
        Split(inputs=x, labels=np.zeros(1, int)), ImageFormat(channels=3, **RAW)
    )
    assert (seen[0, :, :2] == 1).all()
    assert (seen[0, 0, 2:] * 255).round().eq(90).all()


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_sixteen_bits_are_rounded(tmp_path, suffix):
    deep = np.array([[0, 128, 129, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / f"a.{suffix}")
    assert pixels(tmp_path / f"a.{suffix}").tolist() == [[[0, 0, 1, 255]]]


def test_no_program_runs_on_a_file(tmp_path):
    """Pillow hands PostScript to an interpreter, whatever the file is called."""
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(path, "EPS")
    with pytest.raises(ValueError, match=r"a\.png: not a readable image"):
        pixels(path)


def test_a_bomb_is_refused(tmp_path, monkeypatch):
    Image.new("L", (400, 400)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"not a readable image .*decompression bomb"):
        pixels(tmp_path / "a.png")


def test_a_strip_is_not_enlarged_as_a_whole(tmp_path):
    Image.new("L", (1, 60_000), 50).save(tmp_path / "a.png")
    assert (pixels(tmp_path / "a.png", size=64) == 50).all()


@pytest.fixture
def some_broken(tmp_path):
    paths = [tmp_path / f"{i:02}.png" for i in range(20)]
    for i, path in enumerate(paths):
        if i % 2:
            path.write_bytes(b"no image")
        else:
            Image.new("L", (8, 8), 10 * i).save(path)
    return split_of(*paths)


def test_an_empty_file_is_called_empty(tmp_path):
    """A download that broke off, or a disk that was full."""
    (tmp_path / "0.jpg").touch()
    with pytest.raises(ValueError, match=r"0.jpg: not a readable image \(it is empty\)"):
        prepare_images(split_of(tmp_path / "0.jpg"), ImageFormat())


@pytest.mark.parametrize("cache", [images.CACHE_BYTES, 1])
def test_all_broken_images_are_named_at_once(some_broken, cache, monkeypatch):
    monkeypatch.setattr(images, "CACHE_BYTES", cache)
    with pytest.raises(ValueError) as caught:
        prepare_images(some_broken, ImageFormat())
    message = str(caught.value)
    assert "01.png: not a readable image (it is in no format that is read here" in message
    assert "; 10 cannot be read, also " in message
    assert all(f"{i:02}.png" in message for i in range(3, 20, 2))
    assert "--skip-broken" in message


@pytest.mark.parametrize("cache", [images.CACHE_BYTES, 1])
def test_broken_images_are_left_out_where_asked(some_broken, cache, monkeypatch):
    monkeypatch.setattr(images, "CACHE_BYTES", cache)
    report = FileReport()
    data = prepare_images(some_broken, ImageFormat(**RAW), report)
    rows = [data[i] for i in range(10)] if cache == 1 else list(zip(*data, strict=True))
    assert [round(float(x[0, 0, 0]) * 25.5) for x, _ in rows] == list(range(0, 20, 2))
    assert [int(y) for _, y in rows] == list(range(0, 20, 2))
    assert [os.path.basename(name) for name in report.broken] == [
        f"{i:02}.png" for i in range(1, 20, 2)
    ]
    assert report.sizes == {(8, 8)}


def test_a_split_of_broken_images_only(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.png: not a readable image"):
        prepare_images(split_of(tmp_path / "a.png"), ImageFormat(), FileReport())


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (
            {"mean": (123.7, 116.3, 103.5)},
            "mean is .*for 0..255, give 0.4851,0.4561,0.4059",
        ),
        ({"std": (58, 57, 57)}, "std is .*for 0..255, give 0.2275,"),
        ({"std": (float("nan"),)}, "std must be finite"),
        ({"size": 8, "resize": 4}, "resize is 4: less than the input size 8"),
        ({"resize": 4}, "resize is 4, and the side .* is not given: pass size"),
        ({"interpolation": "cubic"}, "interpolation must be one of nearest, "),
    ],
)
def test_formats_that_cannot_be_meant(form, message):
    with pytest.raises(ValueError, match=message):
        ImageFormat(**form)
