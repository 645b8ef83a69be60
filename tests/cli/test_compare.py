"""`fast compare`: table, files, and runs that are not repeated."""

import base64
import contextlib
import dataclasses
import io
import json
import os
import re
import shutil

import pytest

import fast
from fast.cli import main, run_key
from fast.cli.spec.task import TaskSpec
from fast.train.config import TrainConfig

COMPARE = ("--methods", "fast,vanilla", "--seeds", "0,1", "--steps", 6, "--output", "out")


@pytest.fixture(scope="module")
def compared(pretrained, job_args, tmp_path_factory):
    """(folder, output of the command) of one comparison, read by all tests here."""
    folder = tmp_path_factory.mktemp("compared")
    shutil.copytree(pretrained, folder, dirs_exist_ok=True)
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.chdir(folder)
        assert main(["compare", *job_args, *map(str, COMPARE)]) == 0
    return folder, out.getvalue()


@pytest.fixture
def done(compared, job):
    """`job` with that comparison in its folder, and the output."""
    shutil.copytree(compared[0] / "out", job.folder / "out")
    return job, compared[1]


def test_table_and_results(done):
    job, _ = done
    results = json.loads((job.folder / "out" / "results.json").read_text())
    runs = results["runs"]
    assert [(r["method"], r["seed"]) for r in runs] == [
        ("fast", 0), ("fast", 1), ("vanilla", 0), ("vanilla", 1)
    ]  # fmt: skip
    assert [row["method"] for row in results["summary"]] == ["fast", "vanilla"]
    mean = 50 * (runs[2]["target_accuracy"] + runs[3]["target_accuracy"])
    assert results["summary"][1]["target"].startswith(f"{mean:.1f} ± ")
    assert f"steps to vanilla's {mean:.1f}" in results["summary"][0]
    numbers = results["intervals"][1]
    assert (numbers["method"], numbers["seeds"]) == ("vanilla", 2)
    assert 100 * numbers["target"] == pytest.approx(mean)
    assert f" ± {100 * numbers['target_half']:.1f}" in results["summary"][1]["target"]
    assert results["machine"]["fast"] == fast.__version__
    assert runs[0]["history"][-1]["step"] == 6


def test_report_is_one_file_that_fetches_nothing(done):
    job, _ = done
    page = (job.folder / "out" / "report.html").read_text()
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 1
    figure = base64.b64decode(sources[0].removeprefix("data:image/png;base64,"))
    assert figure == (job.folder / "out" / "curves.png").read_bytes()
    assert figure.startswith(b"\x89PNG")
    assert "<td>vanilla</td>" in page
    assert "target.npz" in page


def test_finished_runs_are_kept_and_only_new_ones_are_run(done, monkeypatch):
    job, _ = done
    ran = []
    finetune = fast.finetune
    monkeypatch.setattr(
        fast, "finetune", lambda *a, **k: ran.append((k["method"], k["seed"])) or finetune(*a, **k)
    )
    before = json.loads((job.folder / "out" / "results.json").read_text())["runs"]
    args = [*job.args, *COMPARE]
    args[args.index("fast,vanilla")] = "fast,vanilla,l2-sp"
    code, out, err = job.fast("compare", *args)
    assert code == 0, err
    assert ran == [("l2-sp", 0), ("l2-sp", 1)]
    assert out.count("kept from before") == 4
    assert json.loads((job.folder / "out" / "results.json").read_text())["runs"][:4] == before


def test_another_job_is_run_again_and_the_runs_of_the_first_are_kept(done):
    job, _ = done
    first = {f: f.read_bytes() for f in (job.folder / "out" / "runs").iterdir()}
    args = [*job.args, *COMPARE]
    args[args.index(6)] = 8
    code, out, err = job.fast("compare", *args)
    assert code == 0
    assert "kept from before" not in out
    assert "fast: note: replaces out/results.json, made with other options (steps 6)" in err
    assert all(f.read_bytes() == content for f, content in first.items())
    runs = json.loads((job.folder / "out" / "results.json").read_text())["runs"]
    assert {r["history"][-1]["step"] for r in runs} == {8}
    code, out, _ = job.fast("compare", *job.args, *COMPARE)
    assert code == 0
    assert out.count("kept from before") == 4


def test_results_of_something_else_are_not_replaced(job):
    (job.folder / "out").mkdir()
    for text in ("[1]", "{", '{"options": 1}'):
        (job.folder / "out" / "results.json").write_text(text)
        code, _, err = job.fast("compare", *job.args, *COMPARE)
        assert code == 2
        assert "out/results.json " in err
        assert "move it away" in err
        assert (job.folder / "out" / "results.json").read_text() == text


@pytest.mark.filterwarnings("ignore:the loss at the end is")  # of what stays finite at that rate
def test_a_rate_that_diverges_is_not_chosen(job):
    options = (*COMPARE[4:], "--methods", "lp-ft,vanilla", "--eval-every", 3, "--lr")
    code, _, err = job.fast("compare", *job.args, *options, "1e30,0.001")
    assert code == 0, err
    assert "fast: note: vanilla seed 0 lr 1e+30 diverged: " in err
    runs = json.loads((job.folder / "out" / "results.json").read_text())["runs"]
    assert [r["lr"] for r in runs] == [0.001, 0.001]
    code, _, err = job.fast("compare", *job.args, *options, "1e30")
    assert code == 2
    assert "lower lr (1e+30)" in err


def test_a_changed_file_in_a_folder_is_another_job(tmp_path):
    def key(data):
        return run_key.run_key(TaskSpec(model="m.py:N", data=str(data)), TrainConfig())

    photos, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    for folder in (photos / "cat", elsewhere):
        folder.mkdir(parents=True)
        (folder / "1.png").write_bytes(b"1")
    (photos / "dog").symlink_to(elsewhere)
    (photos / "dangling").symlink_to(tmp_path / "nothing")
    keys = [key(photos)]
    assert key(photos) == keys[0]
    (photos / "cat" / "2.png").write_bytes(b"2")
    keys.append(key(photos))
    (photos / "cat" / "1.png").write_bytes(b"longer")
    keys.append(key(photos))
    os.utime(photos / "cat" / "2.png", ns=(1, 1))
    keys.append(key(photos))
    (photos / "cat" / "1.png").rename(photos / "cat" / "3.png")
    keys.append(key(photos))
    (elsewhere / "1.png").write_bytes(b"other")
    keys.append(key(photos))
    assert len(set(keys)) == 6


def test_all_that_decides_a_run_is_in_its_key(tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text("from parts import Net")
    (tmp_path / "parts.py").write_text("class Net: pass")
    task = TaskSpec(model=f"{tmp_path}/nets.py:Net(3)")
    config = TrainConfig(lr=0.1)

    def key(**changes):
        return run_key.run_key(task, dataclasses.replace(config, **changes))

    keys = [key()]
    assert key(lr=0.1, progress=False) == keys[0]
    keys += [key(lr=0.1000001), key(seed=1), key(head_steps=3)]
    keys.append(run_key.run_key(task, config, demo=True))
    keys.append(run_key.run_key(dataclasses.replace(task, max_length=7), config))
    (tmp_path / "parts.py").write_text("class Net: changed = True")
    keys.append(key())
    with monkeypatch.context() as patch:
        patch.setattr("torch.__version__", "9.9")
        keys.append(key())
    monkeypatch.setattr(run_key, "code_identity", lambda: "other code")
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_each_method_runs_at_its_better_learning_rate(job):
    code, out, err = job.fast(
        "compare", *job.args, *COMPARE[2:], "--methods", "vanilla", "--lr", "1e-6,0.01"
    )
    assert code == 0, err
    runs = json.loads((job.folder / "out" / "results.json").read_text())["runs"]
    assert [(r["seed"], r["lr"]) for r in runs] == [(0, 0.01), (1, 0.01)]
    assert "vanilla  seed 0 lr 1e-06: target" in out


def test_errors(job):
    code, _, err = job.fast("compare", *job.args, "--methods", "fast,adam")
    assert code == 2
    assert "--methods: no method 'adam'; there are fast," in err
    code, _, err = job.fast("compare", *job.args, "--seeds", "0,x")
    assert code == 2
    assert "must be whole numbers separated by commas; got '0,x'" in err
    code, _, err = job.fast("compare", *job.args, "--lr", "0.1,-1")
    assert code == 2
    assert "lr must be positive; got -1" in err
    code, _, err = job.fast("compare", "--data", "target.npz")
    assert code == 2
    assert "--model must be given" in err


def test_peft_that_cannot_be_imported_is_told_before_the_first_run(job, monkeypatch):
    def fail():
        raise ImportError("method 'adapter' needs peft, which is installed but cannot be imported")

    monkeypatch.setattr("fast.cli.runs.import_peft", fail)
    code, out, err = job.fast("compare", *job.args, "--methods", "vanilla,adapter", "--steps", 2)
    assert code == 2
    assert "--methods: method 'adapter' needs peft, which is installed but" in err
    assert "step" not in out


def test_all_methods_are_those_that_have_what_they_need(job):
    code, out, err = job.fast("compare", *job.args, "--methods", "all", "--steps", 2)
    assert code == 0, err
    assert "fast: note: replay is left out: replay trains on source inputs, and none were" in err
    assert all(f"\n{m} " in out for m in ("fast", "vanilla", "lp-ft", "l2-sp", "ewc"))
    left_out = "fast: note: adapter is left out: method 'adapter' needs"
    assert ("\nadapter " in out) != (left_out in err)
    code, _, err = job.fast("compare", *job.args, "--methods", "vanilla,replay", "--steps", 2)
    assert code == 2
    assert "--methods: replay trains on source inputs, and none were given" in err


def test_a_damaged_run_is_named(done):
    job, _ = done
    file = next((job.folder / "out" / "runs").glob("fast-seed0-*.json"))
    whole = json.loads(file.read_text())
    file.write_text(file.read_text()[:-20])
    code, _, err = job.fast("compare", *job.args, *COMPARE)
    assert code == 2
    assert f"{file.relative_to(job.folder)} is damaged" in err
    others = ([1], {"key": whole["key"], "method": "fast"})
    for wrong in (b"\xff", *(json.dumps(other).encode() for other in others)):
        file.write_bytes(wrong)
        code, _, err = job.fast("compare", *job.args, *COMPARE)
        assert code == 2
        assert f"{file.relative_to(job.folder)} is damaged" in err


def test_what_runs_of_several_seeds_will_do_is_told_once(job):
    args = ("--methods", "vanilla,l2-sp", "--seeds", "0,1", "--steps", 2, "--output", "out")
    code, _, err = job.fast("compare", *job.args, *args)
    assert code == 0, err
    plans = [line for line in err.splitlines() if ": 2 steps of" in line]
    assert [line.split(":")[0] for line in plans] == ["vanilla", "l2-sp"]
