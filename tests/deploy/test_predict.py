"""Predictions of pictures, texts and tensors."""

from __future__ import annotations

import csv
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fast
from fast.data.images.format import ImageFormat
from fast.data.sources import DataWarning
from fast.deploy.raw import raw_inputs
from fast.models.preparation import Preparation, read_preparation
from networks import ConvNet, images

Image = pytest.importorskip("PIL.Image", reason="pictures need pillow")
FORM = ImageFormat(size=8, resize=10, mean=(0.4,), std=(0.3,), channels=1)


@pytest.fixture
def predictor(adapted):
    """Takes pictures."""
    return replace(adapted.result._predictor(), preparation=Preparation(images=FORM))


@pytest.fixture
def pictures(tmp_path):
    """Colour, grey and transparent pictures in a folder, with the usual mess."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    made = {"a.jpg": (40, 30, 3), "b.png": (25, 25, 4), "more/c.png": (11, 17)}
    for name, shape in made.items():
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / name)
    (folder / "._a.jpg").write_bytes(b"litter")
    stream = io.BytesIO()
    Image.open(folder / "a.jpg").save(stream, "JPEG")
    (folder / "wrong.png").write_bytes(stream.getvalue())
    return folder


def pixels(path):
    picture = Image.open(path)
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return FORM.prepare(picture.convert("L"))


def test_classes_have_the_names_that_the_network_has_for_them(tmp_path):
    network = ConvNet(4)
    network.config = SimpleNamespace(id2label=dict(enumerate("abcd")))
    x, y = images(24, 4)
    result = fast.finetune(network, (x, y), head="keep", steps=2, progress=False)
    assert result.predict(x).classes == list("abcd")
    assert fast.load(result.save(tmp_path / "run"), ConvNet(4)).predict(x).classes == list("abcd")


def test_pictures_of_another_size_than_the_run_kept_are_refused(predictor, tmp_path):
    kept = replace(predictor, preparation=Preparation(images=replace(FORM, size=None, resize=None)))
    for size in (8, 16):
        Image.new("L", (size, size)).save(tmp_path / f"{size}.png")
    assert len(kept.predict(tmp_path / "8.png")) == 1
    with pytest.raises(ValueError, match=r"16\.png: .* is \[1, 16, 16\], .* of \[1, 8, 8\]"):
        kept.predict(tmp_path / "16.png")


def test_paths_go_through_the_pipeline_of_the_run(predictor, pictures):
    answers = predictor.predict(pictures)
    assert answers.names == [str(pictures / n) for n in ("a.jpg", "b.png", "wrong.png")] + [
        str(pictures / "more" / "c.png")
    ]
    x = torch.stack([pixels(name) for name in answers.names])
    assert torch.equal(answers.logits, predictor.predict(x).logits)
    assert answers.classes == ["ant", "bee", "cat", "dog"]
    one_by_one = predictor.predict([pictures], batch_size=1)
    torch.testing.assert_close(one_by_one.logits, answers.logits, rtol=1e-5, atol=1e-5)


def test_pictures_in_memory_are_as_files(predictor, pictures):
    names = ["a.jpg", "b.png", "more/c.png"]
    from_files = predictor.predict([pictures / name for name in names])
    in_memory = predictor.predict([Image.open(pictures / name) for name in names])
    assert torch.equal(in_memory.logits, from_files.logits)
    one = predictor.predict(np.asarray(Image.open(pictures / "more" / "c.png"))[None])
    # Arrays are resized by torch, files by Pillow.
    torch.testing.assert_close(one.logits[0], from_files.logits[2], rtol=0.1, atol=0.1)


def test_one_picture_is_not_taken_for_many_grey_ones(predictor, pictures):
    colours = replace(predictor, preparation=Preparation(images=replace(FORM, channels=3)))
    pixels = np.asarray(Image.open(pictures / "a.jpg"))
    assert list(raw_inputs([pixels, pixels[..., 0]], predictor.preparation)[1]) == [
        "picture 0", "picture 1",
    ]  # fmt: skip
    as_file = predictor.predict(str(pictures / "wrong.png")).logits
    stored = np.asarray(Image.open(pictures / "wrong.png"))
    torch.testing.assert_close(predictor.predict([stored]).logits, as_file)
    with pytest.raises(ValueError, match=r"\[40, 30, 3\] is one picture: give a list"):
        colours.predict(pixels)
    for either in (colours, predictor):
        with pytest.raises(ValueError, match=r"\[40, 30\] is one picture: give a list"):
            either.predict(pixels[..., 0])
    with pytest.raises(ValueError, match=r"array\[None\], or three grey ones, array\[:, None\]"):
        colours.predict(pixels.transpose(2, 0, 1))


def test_a_table_names_its_files(predictor, pictures):
    (pictures / "list.csv").write_text("id,Filename\n1,a.jpg\n2,more/c.png\n")
    answers = predictor.predict(str(pictures / "list.csv"))
    assert [name.rpartition("photos/")[2] for name in answers.names] == ["a.jpg", "more/c.png"]
    with pytest.raises(ValueError, match=r"has no column picture; it has id, Filename: name the"):
        predictor.predict(pictures / "list.csv", column="picture")


def test_a_broken_picture_is_named_or_left_out(predictor, pictures):
    (pictures / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    with pytest.raises(ValueError, match=r"broken.jpg: not a readable image"):
        predictor.predict(pictures)
    answers = predictor.predict(pictures, skip_broken=True)
    assert list(answers.unreadable) == [str(pictures / "broken.jpg")]
    assert len(answers) == 4
    rest = [n for n in answers.names]
    assert torch.equal(answers.logits, predictor.predict(rest).logits)


def test_what_is_no_input_is_said(predictor, adapted, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.npz").write_bytes(b"")
    for inputs, message in (
        (tmp_path / "none.jpg", "none.jpg: no such file or folder"),
        (tmp_path / "empty", "there are no images in this folder"),
        (7, "inputs must be paths, pictures of Pillow, uint8 arrays, or tensors"),
        ([], "inputs: there are none"),
        (tmp_path / "a.npz", "a.npz: holds arrays: fast evaluate reads it"),
        (torch.zeros(2, 5), r"the network does not take these inputs \(\[2, 5\]"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            predictor.predict(inputs)
    with pytest.raises(ValueError, match=r"inputs must be tensors as the network takes them: how"):
        adapted.result.predict("photo.jpg")
    with pytest.raises(ValueError, match="task must be target, source or both; got 'old'"):
        adapted.result.predict(adapted.x, task="old")
    x = adapted.x[:2].clone()
    x[0, 0, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="answers to 1 of 2 samples are NaN or infinite"):
        adapted.result.predict(x)


def test_a_text_file_gives_the_lines_that_training_reads(tmp_path):
    (tmp_path / "reviews.txt").write_text("  a good film \n\na bad one\n")
    preparation = Preparation(tokenizer=object())
    raw, names = raw_inputs([tmp_path / "reviews.txt", "as it is "], preparation)
    assert raw.inputs == names == ["a good film", "a bad one", "as it is "]


def test_each_file_in_a_folder_of_texts_is_a_text(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "1.txt").write_text("a good film\nwith two lines\n")
    (tmp_path / "new" / "2.txt").write_text("a bad one\n")
    (tmp_path / "new" / "3.docx").write_bytes(b"PK")
    with pytest.warns(DataWarning) as notes:
        raw, names = raw_inputs(tmp_path / "new", Preparation(tokenizer=object()))
    assert raw.inputs == ["a good film\nwith two lines", "a bad one"]
    assert names == [str(tmp_path / "new" / "1.txt"), str(tmp_path / "new" / "2.txt")]
    said = [str(note.message) for note in notes]
    assert said[0].endswith("new: files that are not read as texts are left out: 1 .docx")
    assert "new: each file in it is one text (2); a file that is named itself has" in said[1]


def test_what_a_folder_holds_besides_pictures_is_told(predictor, pictures, tmp_path):
    (pictures / "IMG_7.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.warns(DataWarning, match=r"left out: .*1 \.heic \(Pillow does not read them"):
        assert len(predictor.predict(pictures)) == 4
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "IMG_8.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(ValueError, match="phone: there are no images in this folder; it has 1"):
        predictor.predict(tmp_path / "phone")
    (tmp_path / "really.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    with pytest.raises(ValueError, match=r"really.jpg: .*it is HEIC.*convert it to JPEG"):
        predictor.predict(tmp_path / "really.jpg")


def test_predictions_are_a_sequence(adapted, tmp_path):
    answers = adapted.result.predict(adapted.x[:12])
    probabilities = adapted.result.predict(adapted.x[:12]).logits.softmax(1)
    first = answers[0]
    assert (first.name, first.label) == ("0", answers.labels[0])
    assert first.probability == pytest.approx(float(probabilities[0].max()))
    assert [label for label, _ in first.top] == [
        answers.classes[i] for i in probabilities[0].argsort(descending=True).tolist()
    ]
    assert [p.name for p in answers] == [str(i) for i in range(12)]
    assert answers[-1].name == "11"
    assert repr(answers).endswith("... and 2 more")
    with open(answers.write_csv(tmp_path / "answers.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == answers.labels
    assert float(rows[3]["bee"]) == pytest.approx(float(probabilities[3, 1]), abs=1e-5)


def test_names_that_are_not_utf8_are_written_by_their_codes(adapted, tmp_path):
    """As files from archives of other systems have them; the text is UTF-8 in every locale."""
    answers = replace(adapted.result.predict(adapted.x[:2]), names=["w\udce4.png", "Löwe.png"])
    text = answers.write_csv(tmp_path / "answers.csv").read_bytes().decode("utf-8")
    assert [line.partition(",")[0] for line in text.splitlines()[1:]] == [
        "w\\udce4.png",
        "Löwe.png",
    ]


def test_the_preparation_is_saved_in_numbers_and_words(tmp_path):
    Preparation(images=FORM).save(tmp_path)
    assert read_preparation(tmp_path).images == replace(FORM, mean=[0.4], std=[0.3])
    words = " ".join(Preparation(images=FORM).words)
    assert "Resize the shorter side to 10 pixels" in words
    assert "central square of 8 pixels" in words
    assert "subtract mean (0.4) and divide by std (0.3)" in words
    assert read_preparation(tmp_path / "none") == Preparation()
    (tmp_path / "preprocessing.json").write_text('{"images": {"size": "large"}}')
    with pytest.raises(ValueError, match=r"preprocessing.json is damaged or was changed"):
        read_preparation(tmp_path)


def test_threads_take_turns(adapted):
    """One that asked for the source's classes switched the network for all of them."""
    x = adapted.x[:8]
    expected = adapted.result.predict(x).logits
    with ThreadPoolExecutor(1) as pool:
        with adapted.result._predictor().answering("source"):
            other = pool.submit(adapted.result.predict, x)
            with pytest.raises(TimeoutError):
                other.result(timeout=0.2)
        assert torch.equal(other.result().logits, expected)


def test_a_network_of_float64_gets_its_numbers_as_they_are(tmp_path):
    """They became float32, which it does not take; an export was given float64, and failed, too."""
    x, y = images(40, 4, seed=1)
    x = x.double()
    result = fast.finetune(ConvNet().double(), (x, y), steps=1)
    assert torch.equal(result.predict(x).logits, result.evaluate((x, y)).logits)
    assert (result.export(tmp_path / "served", "torch.export") / "model.pt2").is_file()
