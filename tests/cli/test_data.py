"""What the command line says of the data before it trains, and what it cannot be given."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fast.data.sources import load_data

Image = pytest.importorskip("PIL.Image", reason="image files need Pillow")
SHORT = ("--steps", 2, "--output", "out")


def photos(folder, counts, size=(8, 8)):
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 256, size[::-1], np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


def run(job, *options):
    return job.fast("finetune", *job.args[:4], "--data", "photos", *options, *SHORT)


def test_classes_samples_and_preprocessing_are_printed_and_saved(job):
    photos(job.folder / "photos" / "Train", {"cat": 4, "dog": 3}, (12, 10))
    photos(job.folder / "photos" / "Test", {"cat": 2}, (12, 10))
    code, out, err = run(job, "--input-size", 8, "--std", "0.25")
    assert code == 0, err
    assert out.partition("\n")[2].startswith(  # after the line that says what is read
        "data: 2 classes, 7 training samples, 2 held out (folder Test)\n"
        "classes, in order: cat 4+2, dog 3+0\n"
        "images: 12x10, shorter side to 8 (bicubic), central 8x8, mean 0.5 (the network's mean and "
        "std), std 0.25 (option)\n"
    )
    assert "1 of 2 classes have no held-out sample (dog)" in err
    saved = json.loads((job.folder / "out" / "data.json").read_text())
    assert saved["data"]["samples"] == {"train": [4, 3], "val": [2, 0]}
    assert saved["images"]["std"] == [0.25]
    assert saved["images"]["origin"] == {
        "size": "option",
        "mean": "the network's mean and std",
        "std": "option",
    }


def test_many_classes_are_counted(job):
    photos(job.folder / "photos", {f"{i:02}": 2 + i % 3 for i in range(20)})
    code, out, err = run(job)
    assert code == 0, err
    assert "classes, in order: 00, 01, 02 and 17 more; 1 to 3 samples each" in out


def test_an_unknown_normalisation_is_asked_for(job):
    nets = job.folder / "nets.py"
    nets.write_text(nets.read_text().replace("mean = std = 0.5", ""))
    code, _, err = job.fast("finetune", *job.args, *SHORT)
    assert code == 2
    assert "--mean and --std: the network nets.py:Net(3) does not say how" in err
    assert "pass both: imagenet" in err
    code, _, err = job.fast("finetune", *job.args, *SHORT, "--mean", "none")
    assert code == 2
    assert "pass the other, too" in err
    code, out, err = job.fast("finetune", *job.args, *SHORT, "--mean", "none", "--std", "none")
    assert code == 0, err
    assert "mean 0, std 1 (option)" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mean", "123.7"], "mean is (123.7,), and images are in 0..1"),
        (["--val-fraction", "nan"], "--val-fraction: must be a share from 0 to less than 1"),
        (["--resize", 4, "--input-size", 8], "resize is 4: less than the input size 8"),
    ],
)
def test_options_that_cannot_be_meant(job, options, message):
    photos(job.folder / "photos", {"cat": 4, "dog": 4})
    code, _, err = run(job, *options)
    assert code == 2
    assert message in err


def test_a_folder_beside_its_table_is_no_class(job):
    (job.folder / "table" / "img").mkdir(parents=True)
    for i in range(2):
        (job.folder / "table" / "img" / f"{i}.png").write_bytes(b"")
    (job.folder / "table" / "labels.CSV").write_text("path,label\nimg/0.png,a\n")
    code, _, err = job.fast("finetune", *job.args, "--data", "table", "--plan")
    assert code == 2
    assert "one class only, 'img'; it also has labels.CSV: name the table" in err


def test_suffixes_may_be_in_capitals(job):
    (job.folder / "target.npz").rename(job.folder / "T.NPZ")
    assert job.fast("finetune", *job.args, "--data", "T.NPZ", "--plan")[0] == 0
    (job.folder / "T.CSV").write_text("what,kind,n\n0.5,a,1\n0.1,b,2\n")
    columns = ("--input-column", "nope", "--label-column", "kind")
    err = job.fast("finetune", *job.args, "--data", "T.CSV", *columns, "--plan")[2]
    assert "T.CSV: no column 'nope'; --input-column can be" in err


def test_options_of_images_are_for_images(job):
    for name, text in (("good", "fine"), ("bad", "awful")):
        (job.folder / "texts" / name).mkdir(parents=True)
        for i in range(2):
            (job.folder / "texts" / name / f"{i}.txt").write_text(text)
    options = ("--data", "texts", "--input-size", "8", "--plan")
    err = job.fast("finetune", *job.args[:4], *options)[2]
    assert "--input-size is for images, and --data is texts: drop the option" in err


def test_broken_images_are_left_out_where_asked(job):
    photos(job.folder / "photos", {"cat": 6, "dog": 6})
    for name in ("cat/1.png", "dog/4.png"):
        (job.folder / "photos" / name).write_bytes(b"no image")
    code, _, err = run(job)
    assert code == 2
    assert "2 cannot be read" in err
    assert "cat/1.png" in err
    assert "dog/4.png" in err
    code, _, err = run(job, "--skip-broken")
    assert code == 0, err
    assert "--skip-broken: 2 images cannot be read, and are left out: " in err
    saved = json.loads((job.folder / "out" / "data.json").read_text())
    assert sum(map(sum, saved["data"]["samples"].values())) == 10
    assert len(saved["images"]["skipped"]) == 2


def test_so_are_they_when_the_run_is_evaluated(job):
    photos(job.folder / "photos", {"cat": 10, "dog": 10})
    held_out = load_data("photos").with_val(0.2).val.inputs.names
    Path(held_out[0]).write_bytes(b"no image")
    code, _, err = run(job, "--skip-broken")
    assert code == 0, err
    code, _, err = job.fast("evaluate", "out")
    assert code == 0, err
    assert f"{held_out[0]}: left out" in err
    numbers = json.loads((job.folder / "out/evaluation-target/evaluation.json").read_text())
    result = json.loads((job.folder / "out/result.json").read_text())
    assert numbers["samples"] == len(held_out) - 1 == 3
    assert numbers["accuracy"] == result["target_accuracy"]


def test_an_evaluation_of_other_data_has_a_folder_of_its_own(job):
    """Where copies of training photos are among them, the answers to these are known."""
    photos(job.folder / "photos", {"cat": 10, "dog": 10})
    assert run(job)[0] == 0
    photos(job.folder / "other", {"cat": 2, "dog": 2})
    for file in (job.folder / "other").rglob("*.png"):
        file.write_bytes(file.read_bytes() + b"another")
    counts = {"evaluation-target": 4, "evaluation-target-2": 5}
    for args, copied in (([], False), (["other"], False), (["other"], True), ([], False)):
        if copied:
            shutil.copy("photos/cat/3.png", "other/cat/renamed.png")
            shutil.rmtree("out/evaluation-target-2")
        code, _, err = job.fast("evaluate", "out", *args)
        assert code == 0, err
        told = "files that are in photos, too: 1 (other/cat/renamed.png is "
        assert (told in err.replace(f"{job.folder}/", "")) == copied
    for name, samples in counts.items():
        assert json.loads(Path("out", name, "evaluation.json").read_text())["samples"] == samples
    assert not Path("out/evaluation-target-3").exists()


def test_one_class_can_be_evaluated_alone(job):
    photos(job.folder / "photos", {"cat": 10, "dog": 10})
    assert run(job)[0] == 0
    photos(job.folder / "cats", {"cat": 3})
    code, out, err = job.fast("evaluate", "out", "cats")
    assert code == 0, err
    assert "of 3 samples (target task)" in out
    code, _, err = job.fast("evaluate", "out", "cats/cat")
    assert code == 2
    assert "cats/cat: has no labels to compare with" in err


def test_copies_of_photos_are_told(job):
    data = job.folder / "photos"
    photos(data, {"train/cat": 4, "train/dog": 1, "val/cat": 1, "val/dog": 1})
    for number, file in enumerate(sorted(data.rglob("*.png"))):
        Image.new("L", (8, 8), number).save(file)
    code, _, err = run(job, "--mean", 0.5)
    assert code == 0, err
    assert "held-out files" not in err
    shutil.copy(data / "train/cat/0.png", data / "val/cat/copy.png")
    shutil.copy(data / "train/cat/1.png", data / "train/dog/copy.png")
    for name in ("cat", "dog"):  # downloads that broke off are no copies
        (data / "val" / name / "empty.png").touch()
    code, _, err = job.fast(
        "finetune", *job.args[:4], "--data", "photos", "--skip-broken", "--plan"
    )
    assert code == 0, err
    pair = "photos/val/cat/copy.png is photos/train/cat/0.png"
    assert f"held-out files that are trained on, too: 1 ({pair})" in err
    pair = "photos/train/dog/copy.png is photos/train/cat/1.png"
    assert f"files that are in another class, too: 1 ({pair})" in err


def test_folds_name_classes_that_are_too_few_for_them(job):
    photos(job.folder / "photos", {"cat": 6, "dog": 1})
    code, _, err = job.fast("finetune", *job.args[:4], "--data", "photos", "--folds", 3, "--plan")
    assert code == 0, err
    assert "1 of 2 classes have fewer samples than --folds 3 (dog)" in err


def test_all_may_be_trained_on(job):
    photos(job.folder / "photos", {"cat": 4, "dog": 1})
    code, out, err = run(job, "--val-fraction", 0)
    assert code == 0, err
    assert "data: 2 classes, 5 training samples, none held out" in out
    assert (job.folder / "out" / "model.safetensors").exists()
    code, _, err = job.fast("compare", *job.args[:4], "--data", "photos", "--val-fraction", 0)
    assert code == 2
    assert "--val-fraction 0: what is compared is measured on held-out samples" in err


def test_names_do_not_reach_the_terminal_raw(job):
    photos(job.folder / "photos", {"\x1b[2Jcat": 4, "dog\nfast: error: no": 1})
    (job.folder / "photos" / "\x1b[2Jcat" / "a.\x1b[3J").write_bytes(b"")
    code, out, err = run(job)
    assert code == 0, err
    assert "\x1b" not in out + err
    assert not any(line.startswith("fast: error") for line in (out + err).splitlines())


def test_a_text_network_is_not_given_images(job):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=8, intermediate_size=16, **shape)
    transformers.BertForSequenceClassification(config).save_pretrained("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
    (job.folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer("vocab.txt").save_pretrained("bert")
    spec = ("--model", "transformers:bert", "--data", "target.npz", "--mean", "0.5", "--std", "1")
    code, _, err = job.fast("finetune", *spec, *SHORT)
    assert code == 2
    assert "the data are images, and the network takes texts" in err


def of_classes(folder, names, spots):
    """Pictures of classes 0, 1, ... of `spots` in folders of these names."""
    images, labels = spots
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in np.flatnonzero(labels == label)[:8]:
            Image.fromarray(images[i]).save(folder / name / f"{i}.png")


@pytest.mark.filterwarnings("default::fast.data.sources.DataWarning")
def test_classes_of_the_source_have_the_network_s_names_or_numbers(job):
    source = np.load("source.npz")
    spots = source["x_test"], source["y_test"]
    for folder, names in {"words": "cba", "numbers": "012"}.items():
        of_classes(job.folder / folder, names, spots)
    files = ",2\n".join(map(str, Path("numbers/2").iterdir()))
    (job.folder / "one.csv").write_text(f"file,label\n{files},2\n")
    told = "--source words: the classes a, b, c are taken in this order for the network's outputs"
    for data, note in {"words": told, "numbers": "", "one.csv": ""}.items():
        args = (*job.args[:6], "--source", data, *SHORT[:2], "--output", f"of-{data}")
        code, _, err = job.fast("finetune", *args)
        assert code == 0, err
        assert ("in this order" in err, note in err) == (bool(note), True)
        result = json.loads((job.folder / f"of-{data}" / "result.json").read_text())
        assert (result["source_accuracy_before"] > 0.9) == (data != "words")
    for data, right in {"words": False, "numbers": True, "one.csv": True}.items():
        code, out, err = job.fast("evaluate", "of-numbers", data, "--task", "source")
        assert code == 0, err
        assert ("in this order" in err) != right
        assert ("100.0 % right" in out) == right


def test_labels_of_source_inputs_beyond_the_head_s_ask_for_features(job):
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), np.uint8)
    np.savez("others.npz", x=images, y=np.arange(20) % 5)
    code, _, err = job.fast("finetune", *job.args, "--source-inputs", "others.npz", "--plan")
    assert code == 0, err
    assert "label 4, and the network's own head has 3 classes: what is forgotten is mea" in err


def test_a_kept_head_has_the_names_of_the_run_that_it_is_of(job):
    images = np.load("target.npz")
    spots = images["x_train"], images["y_train"]
    of_classes(job.folder / "photos", ("one", "two", "three", "four"), spots)
    code, _, err = run(job)
    assert code == 0, err
    kept = ("--model", "nets.py:Net(4)", "--weights", "out/model.safetensors", "--head", "keep")
    shown = {"names": ("two", "ONE"), "numbers": ("1", "0"), "strange": ("one", "five")}
    for folder, (one, zero) in shown.items():
        of_classes(job.folder / folder, (zero, one), spots)
    for folder in ("names", "numbers"):
        code, out, err = job.fast("finetune", *kept, "--data", folder, "--plan")
        assert code == 0, err
        assert "classes, in order: four" in out
    code, _, err = job.fast("finetune", *kept, "--data", "strange", "--plan")
    assert code == 2
    assert (
        "2 classes with names (five, one), and the network's own head has 4 classes (four," in err
    )
    code, _, err = job.fast("finetune", *job.args[:4], "--head", "keep", "--data", "photos")
    assert code == 2
    assert "has 3 classes: nothing says which is which" in err
