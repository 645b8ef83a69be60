"""Images to network input, against numpy and Pillow."""

import numpy as np
import pytest
import torch

from fast.data.images import pixels as images
from fast.data.images.format import ImageFormat
from fast.data.images.pixels import PreparedImages, prepare_images, prepared_by
from fast.data.sources import EncodedImages, FileReport, Split

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (5, 6, 6, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (5, 6, 6), dtype=np.uint8)
LABELS = np.array([0, 1, 0, 1, 1])


def arrays(images, labels=None):
    return Split(inputs=images, labels=np.zeros(len(images), int) if labels is None else labels)


def files(paths):
    return arrays(EncodedImages(names=paths, open=paths.__getitem__))


def test_scaling_and_normalisation():
    form = ImageFormat(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    x, y = prepare_images(arrays(COLOUR, LABELS), form)
    expected = (COLOUR / 255.0 - form.mean) / form.std
    np.testing.assert_allclose(x.numpy(), expected.transpose(0, 3, 1, 2), atol=1e-6)
    assert x.dtype == torch.float32
    assert y.tolist() == LABELS.tolist()


def test_the_callers_array_is_left_alone():
    before = GREY.copy()
    prepare_images(arrays(GREY), ImageFormat())
    np.testing.assert_array_equal(GREY, before)


def test_channels_first_arrays_are_the_same_images():
    a, _ = prepare_images(arrays(COLOUR), ImageFormat())
    b, _ = prepare_images(arrays(COLOUR.transpose(0, 3, 1, 2).copy()), ImageFormat())
    assert torch.equal(a, b)


def test_grey_is_repeated_and_colour_is_weighed():
    x, _ = prepare_images(arrays(GREY), ImageFormat(channels=3))
    assert x.shape == (5, 3, 6, 6)
    assert torch.equal(x[:, 0], x[:, 2])
    x, _ = prepare_images(arrays(COLOUR), ImageFormat(channels=1, mean=(0,), std=(1,)))
    expected = (COLOUR / 255.0) @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(x[:, 0].numpy(), expected, atol=1e-5)
    with_alpha = np.concatenate([COLOUR, COLOUR[..., :1]], axis=-1)
    x, _ = prepare_images(arrays(with_alpha), ImageFormat(channels=3))
    assert x.shape == (5, 3, 6, 6)


def test_resize_takes_the_central_square_and_stays_in_range():
    wide = np.zeros((1, 8, 16, 1), np.uint8)
    wide[:, :, 4:12] = 255
    x, _ = prepare_images(arrays(wide), ImageFormat(size=4, mean=(0,), std=(1,)))
    assert x.shape == (1, 1, 4, 4)
    assert x.min() >= 0
    assert x.max() <= 1
    assert x[0, 0, :, 1:3].min() > 0.95


def test_wrong_numbers_of_values():
    with pytest.raises(ValueError, match="mean has 2 values but the images have 3 channels"):
        prepare_images(arrays(COLOUR), ImageFormat(mean=(0.5, 0.5)))
    with pytest.raises(ValueError, match="std must be positive"):
        ImageFormat(std=(0.0,))
    with pytest.raises(ValueError, match="input size must be positive"):
        ImageFormat(size=0)
    with pytest.raises(ValueError, match="uint8 images must be"):
        prepare_images(arrays(np.zeros((5, 6, 6, 7), np.uint8)), ImageFormat())


class TestFiles:
    @pytest.fixture
    def image_class(self):
        return pytest.importorskip("PIL.Image", reason="image files need Pillow")

    def files(self, image_class, folder, sizes):
        paths = []
        for i, size in enumerate(sizes):
            pixels = RNG.integers(0, 256, (*size, 3), dtype=np.uint8)
            path = folder / f"{i}.png"
            image_class.fromarray(pixels).save(path)
            paths.append(str(path))
        return files(paths)

    def test_any_size_becomes_the_wanted_one(self, image_class, tmp_path):
        split = self.files(image_class, tmp_path, [(8, 8), (12, 20), (30, 9)])
        x, _ = prepare_images(split, ImageFormat(size=8))
        assert x.shape == (3, 3, 8, 8)

    def test_differing_sizes_need_an_input_size(self, image_class, tmp_path):
        split = self.files(image_class, tmp_path, [(8, 8), (8, 9)])
        with pytest.raises(ValueError, match=r"1\.png: .* is \[3, 8, 9\].*give an input size"):
            prepare_images(split, ImageFormat())

    def test_colour_modes(self, image_class, tmp_path):
        deep = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
        modes = {"1": None, "L": None, "P": None, "RGBA": None, "CMYK": None, "I;16": deep}
        paths = []
        for i, (mode, pixels) in enumerate(modes.items()):
            path = tmp_path / f"{i}.{'jpg' if mode == 'CMYK' else 'png'}"
            if pixels is None:
                image_class.new("L", (8, 8), 255).convert(mode).save(path)
            else:
                image_class.fromarray(pixels).save(path)
            paths.append(str(path))
        split = files(paths)
        x, _ = prepare_images(split, ImageFormat(channels=3, mean=(0,), std=(1,)))
        assert x[:5].min() > 0.98
        np.testing.assert_allclose(x[5, 0].numpy(), deep / 65535, atol=1 / 255)

        image_class.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "f.tiff")
        split = arrays(EncodedImages(names=["f.tiff"], open=lambda i: str(tmp_path / "f.tiff")))
        with pytest.raises(ValueError, match=r"f\.tiff: .* mode F have no known range"):
            prepare_images(split, ImageFormat())

    def test_colour_and_grey_files_cannot_be_mixed_unasked(self, image_class, tmp_path):
        for i, mode in enumerate(("L", "RGB")):
            image_class.new(mode, (8, 8)).save(tmp_path / f"{i}.png")
        paths = [str(tmp_path / f"{i}.png") for i in range(2)]
        split = files(paths)
        with pytest.raises(ValueError, match=r"1\.png: .*convert them to one colour mode"):
            prepare_images(split, ImageFormat())
        assert prepare_images(split, ImageFormat(channels=3))[0].shape == (2, 3, 8, 8)

    def test_arrays_and_files_are_fit_alike(self, image_class, tmp_path):
        pixels = RNG.integers(0, 256, (1, 40, 60, 3), dtype=np.uint8)
        path = str(tmp_path / "a.png")
        image_class.fromarray(pixels[0]).save(path)
        form = ImageFormat(size=12, mean=(0,), std=(1,))
        a, _ = prepare_images(arrays(pixels), form)
        b, _ = prepare_images(files([path]), form)
        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=3 / 255)

    def test_resize_agrees_with_pillow(self, image_class, tmp_path):
        split = self.files(image_class, tmp_path, [(40, 40)])
        x, _ = prepare_images(split, ImageFormat(size=12, mean=(0,), std=(1,)))
        with image_class.open(split.inputs.open(0)) as image:
            expected = np.asarray(image.resize((12, 12), image_class.Resampling.BICUBIC)) / 255
        # Pillow rounds to bytes between its two passes.
        np.testing.assert_allclose(x[0].permute(1, 2, 0).numpy(), expected, atol=3 / 255)

    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("size", [1, 7, 16, 50])
    def test_batches_are_full_and_in_order(self, image_class, tmp_path, workers, size):
        split = self.files(image_class, tmp_path, [(8, 8)] * 40)
        (tmp_path / "5.png").write_bytes(b"not an image")
        report = FileReport()
        good, labels = prepare_images(split, ImageFormat(), FileReport())
        batches = list(prepared_by(split, ImageFormat(), "none").batches(size, report, workers))
        assert [len(y) for _, y in batches[:-1]] == [size] * (len(batches) - 1)
        assert torch.equal(torch.cat([x for x, _ in batches]), good)
        assert torch.equal(torch.cat([y for _, y in batches]), labels)
        assert list(report.broken) == [split.inputs.names[5]]

    @pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"not an image"])
    def test_a_broken_image_is_named(self, image_class, tmp_path, damage):
        split = self.files(image_class, tmp_path, [(64, 64)] * 3)
        path = tmp_path / "1.png"
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(ValueError, match=r"1\.png: not a readable image"):
            prepare_images(split, ImageFormat())

    def test_what_is_too_large_for_memory_is_read_lazily(self, image_class, tmp_path, monkeypatch):
        split = self.files(image_class, tmp_path, [(8, 8)] * 3)
        cached, labels = prepare_images(split, ImageFormat())
        monkeypatch.setattr(images, "CACHE_BYTES", 1)
        lazy = prepare_images(split, ImageFormat())
        assert isinstance(lazy, PreparedImages)
        assert len(lazy) == 3
        for i in range(3):
            x, y = lazy[i]
            assert torch.equal(x, cached[i])
            assert y == labels[i]
