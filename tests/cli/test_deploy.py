"""`fast predict`, `fast evaluate` and `fast export` on a run of `fast finetune`."""

import csv
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from fast.cli import main
from fast.cli.task.run import own_columns
from fast.models.saved.description import classes_beside

RUN = ("--steps", "30", "--eval-every", "10", "--lr", "0.01", "--output", "out")


@pytest.fixture(scope="module")
def finished(pretrained, job_args, tmp_path_factory):
    """A folder with the files of a job, and its finished run in `out`."""
    folder = tmp_path_factory.mktemp("finished")
    for file in pretrained.glob("*.*"):
        shutil.copy2(file, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("FAST_DEVICE", "cpu")
        assert main(["finetune", *job_args, *RUN]) == 0
    return folder


@pytest.fixture
def run(finished, capsys, monkeypatch):
    """`run.fast(*args)` in the folder of the finished run."""
    monkeypatch.chdir(finished)

    def fast(*args):
        code = main([str(a) for a in args])
        return code, *capsys.readouterr()

    result = json.loads((finished / "out" / "result.json").read_text())
    return SimpleNamespace(fast=fast, folder=finished, result=result)


def save_picture(array, path):
    image = pytest.importorskip("PIL.Image", reason="pictures need pillow")
    image.fromarray(array).save(path)


def test_a_run_says_what_comes_next(job):
    code, out, err = job.fast("finetune", *job.args, "--steps", 2, "--output", "my run")
    assert code == 0, err
    assert "\n  fast predict 'my run' PATH...  " in out
    assert "\n  fast evaluate 'my run'  " in out


def test_pictures_are_answered_as_in_training(run):
    arrays = np.load("target.npz")
    (run.folder / "new").mkdir()
    for i in range(8):
        save_picture(arrays["x_test"][i], run.folder / "new" / f"{i}.png")
    (run.folder / "new" / "._0.png").write_bytes(b"litter")
    code, out, err = run.fast("predict", "out", "new", "--top", 99)
    assert code == 0, err
    assert out.split()[:9] == ["input", "class", "%", "2.", "%", "3.", "%", "4.", "%"]
    assert out.split()[9].startswith("---")  # there are four classes
    code, out, err = run.fast("predict", "out", "new", "--top", 2, "--csv", "answers.csv")
    assert code == 0, err
    with open("answers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["input"] for row in rows] == [f"new/{i}.png" for i in range(8)]
    assert [row["label"] for row in rows] == [str(y) for y in arrays["y_test"][:8]]
    for row in rows:
        assert sum(float(row[c]) for c in "0123") == pytest.approx(1, abs=1e-4)
        assert float(row["probability"]) == max(float(row[c]) for c in "0123")
    assert re.search(r"^new/0.png +0 +[\d.]+ +\d +[\d.]+$", out, flags=re.MULTILINE)


def test_an_empty_name_is_no_guess(run):
    """The files of the current folder were answered, and what the run held out evaluated on."""
    for command, name in (("predict", "PATH"), ("evaluate", "DATA")):
        code, _, err = run.fast(command, "out", "")
        assert code == 2
        assert f"argument {name}: is empty; is a variable of the shell not set?" in err


def test_the_source_is_answered_too(run):
    code, _, err = run.fast("evaluate", "out", "source.npz", "--task", "source", "-o", "report")
    assert code == 0, err
    numbers = json.loads((run.folder / "report" / "evaluation.json").read_text())
    assert numbers["accuracy"] == run.result["source_accuracy"]
    assert numbers["samples"] == 90
    assert run.fast("evaluate", "out", "--task", "source")[0] == 0  # what job.json names
    again = json.loads((run.folder / "out" / "evaluation-source" / "evaluation.json").read_text())
    assert again["accuracy"] == run.result["source_accuracy"]


def test_what_was_held_out_is_evaluated_on(run):
    code, out, err = run.fast("evaluate", "out")
    assert code == 0, err
    assert "80 samples (target task)" in out
    numbers = json.loads((run.folder / "out" / "evaluation-target" / "evaluation.json").read_text())
    assert numbers["accuracy"] == run.result["target_accuracy"]
    report = (run.folder / "out" / "evaluation-target" / "report.html").read_text()
    assert "data:image/png;base64," in report
    assert "http" not in report.replace("http-equiv", "")
    if numbers["mistakes"]:
        assert "data:image/jpeg;base64," in report


def test_what_a_run_held_out_is_found_in_data_that_were_moved(job):
    """All samples, most of which it was trained on, would be answered too well."""
    arrays = np.load("target.npz")
    one_file = {"x": arrays["x_train"], "y": arrays["y_train"]}
    np.savez("drawn.npz", **one_file)
    args = [*job.args, "--data", "drawn.npz", "--source-inputs", "source.npz"]
    assert job.fast("finetune", *args, *RUN)[0] == 0
    shutil.copy("drawn.npz", "copy.npz")
    for name in ("drawn.npz", "copy.npz"):
        code, out, err = job.fast("evaluate", "out", name)
        assert code == 0, err
        assert f"{name} (20 % of each class)" in out
        assert "of 40 samples (target task)" in out
    np.savez("other.npz", x=arrays["x_test"], y=arrays["y_test"])
    assert "of 80 samples (target task)" in job.fast("evaluate", "out", "other.npz")[1]
    np.savez("drawn.npz", x=arrays["x_train"][:-1], y=arrays["y_train"][:-1])
    join = ("join", "out", "--output", "joined")
    for command in (("evaluate", "out"), ("evaluate", "out", "drawn.npz"), join):
        code, _, err = job.fast(*command)
        assert code == 2
        assert "has other samples than the run was started with" in err


def test_files_that_cannot_be_read(run):
    arrays = np.load("target.npz")
    for i, label in enumerate(arrays["y_test"][:12]):
        (run.folder / "labelled" / str(label)).mkdir(parents=True, exist_ok=True)
        save_picture(arrays["x_test"][i], run.folder / "labelled" / str(label) / f"{i}.png")
    (run.folder / "labelled" / "0" / "bad.png").write_bytes(b"\x89PNG no picture")
    code, _, err = run.fast("evaluate", "out", "labelled")
    assert code == 2
    assert "bad.png: not a readable image" in err
    assert "--skip-broken" in err
    code, out, err = run.fast("evaluate", "out", "labelled", "--skip-broken", "-o", "skipped")
    assert code == 0, err
    assert "fast: note: labelled/0/bad.png: left out" in err
    assert "of 12 samples" in out
    numbers = json.loads((run.folder / "skipped" / "evaluation.json").read_text())
    assert numbers["samples"] == 12
    for mistake in numbers["mistakes"]:
        assert mistake["name"].split("/")[-2] == mistake["label"]


def test_what_has_no_labels_is_for_predict(run):
    (run.folder / "flat").mkdir()
    save_picture(np.load("target.npz")["x_test"][0], run.folder / "flat" / "0.png")
    code, _, err = run.fast("evaluate", "out", "flat")
    assert code == 2
    assert "flat: has no labels to compare with" in err
    assert "fast predict out flat says what the run takes it for" in err


def test_many_answers_are_counted(run, monkeypatch):
    monkeypatch.setattr("fast.cli.commands.saved.predict.FEW", 3)
    monkeypatch.setattr("fast.cli.commands.saved.predict.SHOWN", 3)
    arrays = np.load("target.npz")
    (run.folder / "many").mkdir()
    for i in range(5):
        save_picture(arrays["x_test"][4 * i], run.folder / "many" / f"{i}.png")
    code, out, _ = run.fast("predict", "out", "many")
    assert (code, out.count("many/")) == (0, 5)  # no terminal: another program may want all
    assert out.endswith("\n5 inputs: 0 5\n")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    code, out, _ = run.fast("predict", "out", "many")
    assert out.count("many/") == 3
    assert "... and 2 more: --csv FILE writes all" in out


def test_a_strangers_network_is_not_run(run):
    shutil.copytree("out", "stranger")
    job_file = run.folder / "stranger" / "job.json"
    job_file.write_text(job_file.read_text().replace('"signature": "', '"signature": "0'))
    code, _, err = run.fast("export", "stranger", "--format", "safetensors", "-o", "theirs")
    assert code == 2
    assert "was not started by you on this machine, and a network is code" in err
    assert not (run.folder / "theirs").exists()


def test_columns_of_the_run_are_taken_where_a_table_has_them(tmp_path):
    job = {"input_column": "Ticket text", "label_column": "Category"}
    (tmp_path / "all.csv").write_text("id,Ticket text,Category\n1,help,Login\n")
    (tmp_path / "new.csv").write_text("id,Ticket text\n1,help\n")
    (tmp_path / "other.csv").write_text("id,words\n1,help\n")
    (tmp_path / "lines.txt").write_text("help\n")
    paths = {
        name: str(tmp_path / name) for name in ("all.csv", "new.csv", "other.csv", "lines.txt")
    }
    assert own_columns(job, [paths["all.csv"]]) == job
    new = {"input_column": "Ticket text"}
    assert own_columns(job, [paths["all.csv"], paths["new.csv"], paths["lines.txt"]]) == new
    assert own_columns(job, [paths["all.csv"], paths["other.csv"]]) == {}
    assert own_columns(job, [paths["lines.txt"]]) == own_columns({}, [paths["all.csv"]]) == {}


def test_export(run):
    code, out, err = run.fast("export", "out", "--format", "safetensors", "--output", "plain")
    assert code == 0, err
    assert out == "plain: README.md, model.safetensors, preprocessing.json\n"
    facts = json.loads((run.folder / "plain" / "preprocessing.json").read_text())
    assert facts["images"]["mean"] == [0.5]
    assert facts["outputs"]["logits"]["classes"] == ["0", "1", "2", "3"]
    assert classes_beside(run.folder / "plain" / "model.safetensors") == ["0", "1", "2", "3"]
    code, _, err = run.fast("export", "out", "--format", "safetensors", "-o", "plain")
    assert code == 2
    assert "plain: is not empty; name another folder" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("predict", "out"), "the following arguments are required: PATH"),
        (("predict", "none", "x.png"), "none: no such folder"),
        (("predict", "out", "none.png"), "none.png: no such file or folder"),
        (("predict", "out", "target.npz"), "target.npz: holds arrays: fast evaluate reads it"),
        (("predict", "out", "x.png", "--top", 0), "--top must be at least 1; got 0"),
        (("predict", "out", "x.png", "--csv", "out"), "--csv out: is a folder; name a file"),
        (("predict", "out", "x.png", "--csv", "/proc/x.csv"), "--csv /proc: cannot be written to"),
        (("evaluate", "out", "none"), "none: no such file or folder"),
        (("export", "out"), "--output must be given"),
        (("export", "out", "--format", "hf", "-o", "x"), "'hf' is for networks of transformers"),
        (("export", "out", "--format", "timm", "-o", "x"), "format 'timm' is for networks of timm"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(run, args, message):
    code, _, err = run.fast(*args)
    assert code == 2
    assert message in err.splitlines()[-1]
    assert not (run.folder / "x").exists()
