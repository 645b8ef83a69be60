"""CSV, Parquet and data frames; texts and sounds as files."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fast.data.audio.waveforms import SoundFormat, read_audio, resampled
from fast.data.sources import DataWarning, EncodedAudio, EncodedImages, FileReport, load_data
from fast.data.sources.files import repeated_samples
from fast.data.sources.names import FILES, TEXTS
from fast.data.sources.table import read_inputs
from helpers import write_wav

pytestmark = pytest.mark.filterwarnings("ignore::fast.data.sources.DataWarning")


def write_csv(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(path)


def test_texts_and_names_of_classes(tmp_path):
    file = write_csv(tmp_path / "d.csv", "text,label", '"so, so",bad', "fine,good", "ok,good")
    with pytest.warns(DataWarning, match="columns: inputs in text, labels in label"):
        data = load_data(file)
    assert data.train.inputs == ["so, so", "fine", "ok"]
    assert data.classes == ("bad", "good")
    assert data.train.labels.tolist() == [0, 1, 1]
    assert data.val is None


def test_paths_are_from_the_table_and_numbers_sort_as_numbers(tmp_path):
    for i in range(3):
        (tmp_path / "imgs").mkdir(exist_ok=True)
        (tmp_path / "imgs" / f"{i}.png").touch()
    rows = [f"imgs/{i}.png,{label}" for i, label in enumerate((10, 2, 10))]
    data = load_data(
        write_csv(tmp_path / "t.tsv", *(r.replace(",", "\t") for r in ("file,kind", *rows)))
    )
    assert isinstance(data.train.inputs, EncodedImages)
    assert data.train.inputs.open(1) == str(tmp_path / "imgs" / "1.png")
    assert data.classes == ("2", "10")
    assert data.train.labels.tolist() == [1, 0, 1]


def test_a_column_may_say_the_split(tmp_path):
    rows = ["a,x,train", "b,y,train", "c,x,valid", "d,x,test"]
    data = load_data(write_csv(tmp_path / "d.csv", "text,label,split", *rows))
    assert (data.train.inputs, data.val.inputs) == (["a", "b"], ["c"])
    assert data.held_out == "split by column split"


def test_rows_of_other_splits_are_told(tmp_path):
    rows = ["a,x,train", "b,y,train", "c,x,valid", "d,x,test", "e,y,test", "f,y,"]
    data = load_data(write_csv(tmp_path / "d.csv", "text,label,split", *rows))
    assert data.notes[1:] == (
        "split by column split",
        "rows whose split is empty are not used: 1",
        "rows whose split is test are not used: 2",
    )


def test_a_split_that_is_not_understood_is_told(tmp_path):
    data = load_data(write_csv(tmp_path / "d.csv", "text,label,split", "a,x,1", "b,y,2"))
    assert data.val is None
    assert data.notes[-1] == "column split is no split into train and val: 1, 2"


def test_nearly_the_same_names_of_classes_are_told(tmp_path):
    data = load_data(write_csv(tmp_path / "d.csv", "text,label", "a,Dog 1", "b,dog1", "c,cat"))
    assert data.classes == ("Dog 1", "cat", "dog1")
    assert data.notes[-1] == "classes of nearly the same name, each for itself: Dog 1 and dog1"


def pictures(folder, *names):
    for name in names:
        (folder / name).touch()


def test_a_file_in_several_rows_is_told(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(bytes([i]))
    rows = ["0.png,x", "1.png,y", "0.png,x", "2.png,y"]
    data = load_data(write_csv(tmp_path / "d.csv", "file,label", *rows))
    assert len(data.train) == 4
    assert repeated_samples(data) == []  # nothing is held out
    (note,) = repeated_samples(data, folds=True)
    assert f"files that repeat another: 1 ({tmp_path / '0.png'})" in note
    (note,) = repeated_samples(data.with_val(0.5))
    assert f"held-out files that are trained on, too: 1 ({tmp_path / '0.png'})" in note
    rows = ["0.png,x,train", "1.png,y,train", "1.png,y,val", "2.png,y,val"]
    (note,) = repeated_samples(load_data(write_csv(tmp_path / "s.csv", "file,label,split", *rows)))
    assert "held-out files that are trained on, too: 1" in note


def test_a_text_in_several_rows_is_told(tmp_path):
    rows = ["a film,x,train", "b film,y,train", " a film,x,val", "b film,x,val", "c,y,val"]
    data = load_data(write_csv(tmp_path / "d.csv", "text,label,split", *rows))
    held_out, strange = repeated_samples(data)
    assert held_out.startswith("held-out texts that are trained on, too: 2 ('a film', 'b film');")
    assert strange == "texts that are in another class, too: 1 ('b film')"
    long = "one film after another " * 9
    data = load_data(write_csv(tmp_path / "l.csv", "text,label", f"{long},x", f"{long},x", ",y"))
    (note,) = repeated_samples(data, folds=True)
    assert note.startswith(
        "texts that repeat another: 1 ('one film after another one film after...')"
    )


def test_a_file_with_two_labels_is_refused(tmp_path):
    pictures(tmp_path, "0.png", "1.png")
    file = write_csv(tmp_path / "d.csv", "file,label", "0.png,x", "1.png,y", "0.png,y")
    with pytest.raises(ValueError, match=r"0\.png has several labels, x, y"):
        load_data(file)


def test_a_table_for_each_split(tmp_path):
    write_csv(tmp_path / "train.csv", "text,label", "a,x", "b,y")
    write_csv(tmp_path / "test.csv", "text,label", "c,y")
    data = load_data(str(tmp_path))
    assert (data.train.inputs, data.val.inputs) == (["a", "b"], ["c"])
    assert data.val.labels.tolist() == [1]
    write_csv(tmp_path / "test.csv", "text,label", "c,z")
    with pytest.raises(ValueError, match="classes of val are not in train: z"):
        load_data(str(tmp_path))


def test_class_folders_beside_a_table_are_the_data(tmp_path):
    write_csv(tmp_path / "train.csv", "id,label", "a,x", "b,y")
    for name in ("train/x", "train/y"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "0.png").touch()
    assert load_data(str(tmp_path)).classes == ("x", "y")


def test_parquet_and_data_frames(tmp_path):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    frame = pandas.DataFrame({"review": ["a", "b", "c"], "stars": [1.0, 5.0, 1.0]})
    frame.to_parquet(tmp_path / "d.parquet")
    with pytest.warns(DataWarning, match="the data frame: columns: inputs in review"):
        read = load_data(frame, label_column="stars")
    for data in (load_data(str(tmp_path / "d.parquet")), read):
        assert data.classes == ("1", "5")
        assert data.train.inputs == ["a", "b", "c"]
    vectors = pandas.DataFrame({"embedding": [[1.0, 2.0], [3.0, 4.0]], "label": ["x", "y"]})
    data = load_data(vectors, input_column="embedding")
    assert data.train.inputs.tolist() == [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize("column", [*FILES, "File Path", "file-name", "IMAGE"])
def test_a_table_is_predicted_from_the_column_that_it_is_trained_on(tmp_path, column):
    (tmp_path / "a.png").touch()
    (tmp_path / "b.png").touch()
    rows = ["0,a.png,3,x", "1,b.png,4,y"]
    file = write_csv(tmp_path / "d.csv", f"id, {column},size,label", *rows)
    assert load_data(file).train.inputs.names == [str(tmp_path / n) for n in ("a.png", "b.png")]
    assert read_inputs(tmp_path / "d.csv", None, FILES).names == load_data(file).train.inputs.names


@pytest.mark.parametrize("column", TEXTS)
def test_so_is_one_of_texts(tmp_path, column):
    file = write_csv(tmp_path / "d.csv", f"id,{column},size,label", "0,a,3,x", "1,b,4,y")
    assert load_data(file).train.inputs == ["a", "b"]
    assert read_inputs(tmp_path / "d.csv", None, TEXTS) == ["a", "b"]


@pytest.mark.parametrize(("between", "encoding"), [(";", "utf-8-sig"), ("\t", "utf-16")])
def test_tables_of_spreadsheets(tmp_path, between, encoding):
    text = "Text , Label\nschön,gut \nübel,schlecht\nfein,gut\n".replace(",", between)
    (tmp_path / "d.csv").write_text(text, encoding=encoding)
    data = load_data(str(tmp_path / "d.csv"))
    assert data.classes == ("gut", "schlecht")
    assert data.train.inputs == ["schön", "übel", "fein"]


def test_another_encoding_is_not_guessed(tmp_path):
    (tmp_path / "d.csv").write_text("text,label\nschön,gut\n", encoding="windows-1252")
    with pytest.raises(ValueError, match=r"not UTF-8, but perhaps Windows-1252 .* save it"):
        load_data(str(tmp_path / "d.csv"))


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (["text,label", "a,x", "b"], {}, "row 1, .* has 1 cells, and there are 2 columns"),
        (["text,label"], {}, "has no rows"),
        (["a,a", "1,2"], {}, "two columns have one name: a"),
        (["a,b,c", "1,2,3"], {}, "say which column to use with --input-column: a, b, c .*first"),
        (["text", "a"], {}, "has no column of labels, only text"),
        (["text,label", "a,"], {}, "label: empty cells: 1 of 1, the first in row 0"),
        (["text,label", "a,x"], {"label_column": "y"}, "no column 'y'; --label-column can be"),
        (["text,label", 'a,"[""x"", ""y""]"'], {}, r"several labels .*docs/any-loss\.md"),
        (["path,label", "a.jpg,x"], {}, "1 file is not there: a.jpg"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, rows, columns, message):
    pytest.importorskip("PIL.Image", reason="image files need Pillow")
    with pytest.raises(ValueError, match=message):
        load_data(write_csv(tmp_path / "d.csv", *rows), **columns)


def test_text_files_in_class_folders(tmp_path):
    for i, name in enumerate(("train/neg", "train/pos", "test/neg", "test/pos")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "0.txt").write_text(f" text {i}\n", encoding="utf-8")
    data = load_data(str(tmp_path))
    assert data.classes == ("neg", "pos")
    assert (data.train.inputs, data.val.inputs) == (["text 0", "text 1"], ["text 2", "text 3"])


def test_empty_texts_are_counted(tmp_path):
    (tmp_path / "t.csv").write_text('text,label\ngood,a\n,a\n" ",b\nbad,b\n')
    with pytest.warns(DataWarning, match="texts that are empty: 2 of 4"):
        load_data(str(tmp_path / "t.csv"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_text_files_of_other_encodings(tmp_path, encoding):
    for name in ("neg", "pos"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.txt").write_text("très bien", encoding=encoding)
    assert load_data(str(tmp_path)).train.inputs == ["très bien"] * 2
    (tmp_path / "pos" / "0.txt").write_text("très bien", encoding="latin-1")
    with pytest.raises(ValueError, match=r"0\.txt: is not UTF-8, but perhaps Windows-1252"):
        load_data(str(tmp_path))


@pytest.mark.parametrize("split", [False, True])
def test_text_files_with_a_sample_in_each_line(tmp_path, split):
    for folder in ("train", "val") if split else (".",):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "ham.txt").write_text("hi\n\nhello\n")
        (tmp_path / folder / "spam.txt").write_text("buy\n")
    data = load_data(str(tmp_path))
    assert data.classes == ("ham", "spam")
    assert data.train.inputs == ["hi", "hello", "buy"]
    assert data.train.labels.tolist() == [0, 0, 1]
    assert (data.val is not None) is split


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_wav_files(tmp_path, width, channels):
    tone = write_wav(tmp_path / "a.wav", width=width, channels=channels)
    sound, rate = read_audio(lambda: str(tmp_path / "a.wav"))
    assert rate == 8000
    np.testing.assert_allclose(sound, tone, atol=1.2 / 2 ** (8 * width - 1) + 1e-6)


def test_a_sound_keeps_its_pitch_at_another_rate():
    t = np.arange(8000) / 8000
    sound = resampled(np.sin(2 * np.pi * 440 * t).astype(np.float32), 8000, 16000)
    assert len(sound) == 16000
    spectrum = np.abs(np.fft.rfft(sound))
    assert int(spectrum.argmax()) == 440  # one second: bins of 1 Hz
    assert np.sort(spectrum)[-2] < 0.02 * spectrum.max()


def sounds(tmp_path, rates=(8000, 8000)):
    for i, rate in enumerate(rates):
        write_wav(tmp_path / f"{'ab'[i % 2]}" / f"{i}.wav", 0.1 * (i + 1), rate)
    return load_data(str(tmp_path)).train


def test_sounds_in_class_folders(tmp_path):
    split = sounds(tmp_path)
    assert isinstance(split.inputs, EncodedAudio)
    x, y = SoundFormat(seconds=0.15)(split)
    assert x.shape == (2, 1200)
    assert y.tolist() == [0, 1]
    assert (x[0, 800:] == 0).all()
    assert x[1, 800:].abs().max() > 0.4


def test_sounds_of_several_rates_need_a_network_that_says_its_own(tmp_path):
    split = sounds(tmp_path, (8000, 16000))
    with pytest.raises(ValueError, match="rates of 8000, 16000 Hz"):
        SoundFormat(seconds=1)(split)
    assert SoundFormat(seconds=1, rate=16000)(split)[0].shape == (2, 16000)
    assert SoundFormat(seconds=1).with_rate_of(split).rate == 8000
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    extractor = transformers.Wav2Vec2FeatureExtractor()
    inputs, _ = SoundFormat(seconds=1, rate=16000, extractor=extractor)(split)
    assert inputs["input_values"].shape == (2, 3200)
    assert inputs["input_values"].dtype == torch.float32


def test_a_broken_sound_is_named(tmp_path):
    split = sounds(tmp_path)
    for content in (b"", b"RIFF"):
        (tmp_path / "b" / "1.wav").write_bytes(content)
        with pytest.raises(ValueError, match=r"1\.wav: not .* \(it is empty or ends too early\)"):
            SoundFormat(seconds=1)(split)
    (tmp_path / "b" / "1.wav").write_bytes(b"ID3 is no WAV file")
    with pytest.raises(ValueError, match=r"1\.wav: not a readable sound .*pip install soundfile"):
        SoundFormat(seconds=1)(split)
    report = FileReport()
    assert len(SoundFormat(seconds=1)(split, report)[0]) == 1
    assert list(report.broken) == [str(tmp_path / "b" / "1.wav")]


def test_notes_beside_pictures_are_no_texts(tmp_path):
    """YOLO's layout: a text file for each picture says where the objects are."""
    for name in ("a.jpg", "a.txt", "b.jpg", "b.txt"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="class"):
        load_data(str(tmp_path))
