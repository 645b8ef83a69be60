"""The folder of `fast finetune`: whose it is, what an interrupted run leaves, --resume."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from fast.cli import folders
from fast.cli.commands import finetune
from interruption import dying_at

RUN = ("--steps", 30, "--eval-every", 10, "--lr", 0.01, "--output", "out")


def test_resume_gives_the_same_weights_as_an_uninterrupted_run(job, monkeypatch, tmp_path_factory):
    job.fast("finetune", *job.args, *RUN[:-1], "whole", "--flip")
    with dying_at(25, KeyboardInterrupt()):
        code, _, err = job.fast("finetune", *job.args, *RUN[:-1], "cut", "--flip")
    assert code == 130
    assert "to go on: fast finetune --resume cut" in err
    assert not (job.folder / "cut" / "model.safetensors").exists()

    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    code, out, err = job.fast("finetune", "--resume", job.folder / "cut")
    assert code == 0, err
    assert "30 steps" in out
    whole, cut = (load_file(job.folder / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_resume_takes_no_other_options(job):
    job.fast("finetune", *job.args, *RUN)
    code, _, err = job.fast("finetune", "--resume", "out", "--lr", 0.1)
    assert code == 2
    assert "--resume goes on exactly as out/job.json says; drop --lr" in err
    code, _, err = job.fast("finetune", "--resume", "out", "--val-fraction", 0.2)  # the default
    assert code == 2
    assert "drop --val-fraction" in err
    code, _, err = job.fast("finetune", "--resume", "nowhere")
    assert code == 2
    assert "--resume nowhere: no such folder" in err


def test_a_run_whose_data_have_moved_goes_on_with_them(job):
    with dying_at(15, KeyboardInterrupt()):
        assert job.fast("finetune", *job.args, *RUN)[0] == 130
    code, _, err = job.fast("finetune", "--resume", "out", "--data", "source.npz")
    assert code == 2
    assert "as out/job.json says; drop --data" in err  # they are there
    target = job.folder / "target.npz"
    target.rename(job.folder / "moved.npz")
    join = ("join", "out", "--source-inputs", "source.npz", "--output", "joined")
    for command in (("finetune", "--resume", "out"), join):
        code, _, err = job.fast(*command)
        assert code == 2
        assert f"{target} is not there any more: name it where it is now, --data PATH" in err
    code, _, err = job.fast("finetune", "--resume", "out", "--data", "source.npz")
    assert code == 2
    code, _, err = job.fast("finetune", "--resume", "out", "--data", "moved.npz", "--card", "x")
    assert code == 2
    assert "drop --card" in err
    code, out, err = job.fast("finetune", "--resume", "out", "--data", "moved.npz")
    assert code == 0, err
    assert "30 steps" in out
    code, _, err = job.fast("evaluate", "out")
    assert code == 2
    assert f"RUN out: its --data {target} is not there any more" in err
    assert "name it where it is now, fast evaluate out DATA" in err
    assert job.fast("evaluate", "out", "moved.npz")[0] == 0


def test_a_run_that_is_finished_says_so(job):
    assert job.fast("finetune", *job.args, *RUN)[0] == 0
    before = (job.folder / "out" / "history.jsonl").read_text()
    code, out, err = job.fast("finetune", "--resume", "out")
    assert code == 0, err
    assert "note: out: its run is finished: nothing is trained" in err
    assert "saved in out" in out
    assert (job.folder / "out" / "history.jsonl").read_text() == before
    _, _, err = job.fast("finetune", "--resume", "out", "--steps", 90)
    assert "drop --steps, or start a new run with it" in err


def test_output_is_never_overwritten(job):
    (job.folder / "out").mkdir()
    (job.folder / "out" / "thesis.txt").write_text("x")
    code, _, err = job.fast("finetune", *job.args, *RUN)
    assert code == 2
    assert "--output out: exists" in err


def test_runs_that_start_together_have_folders_of_their_own(job, monkeypatch):
    """The second looks for its folder while the first has just taken its own, and fails."""
    claim, results = folders._claim, []

    def claim_and_start_another(spec):
        folder = claim(spec)
        if not results:
            results.append(None)
            with dying_at(0, ValueError("no")):
                results.append(job.fast("finetune", *job.args, "--steps", 4)[0])
            (folder / "notes.txt").write_text("mine")
        return folder

    monkeypatch.setattr(folders, "_claim", claim_and_start_another)
    code, out, err = job.fast("finetune", *job.args, "--steps", 4)
    assert code == 0, err
    assert results[1] == 2
    assert "saved in runs/Net-target-fast\n" in out
    assert [p.name for p in (job.folder / "runs").iterdir()] == ["Net-target-fast"]


def test_a_failing_run_removes_its_own_files_only(job, monkeypatch):
    claim = folders._claim

    def claim_with_notes(spec):
        folder = claim(spec)
        (folder / "notes.txt").write_text("mine")
        return folder

    monkeypatch.setattr(folders, "_claim", claim_with_notes)
    with dying_at(5, ValueError("no")):
        assert job.fast("finetune", *job.args, *RUN)[0] == 2
    assert [p.name for p in (job.folder / "out").iterdir()] == ["notes.txt"]


def test_a_folder_claimed_by_another_is_refused(job, monkeypatch):
    for module in (finetune, folders):
        monkeypatch.setattr(module, "check_new", lambda folder: None)  # both saw it empty
    (job.folder / "out").mkdir()
    (job.folder / "out" / "job.json").write_text("{}")
    code, _, err = job.fast("finetune", *job.args, *RUN)
    assert code == 2
    assert "--output out: another run has just started there" in err
    assert (job.folder / "out" / "job.json").read_text() == "{}"


@pytest.mark.parametrize("error", [RuntimeError("no"), ValueError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("output", ["new/deep/out", "empty"])
def test_a_run_without_a_checkpoint_leaves_nothing_and_can_be_run_again(job, error, output):
    (job.folder / "empty").mkdir()
    with dying_at(5, error):
        code, _, err = job.fast("finetune", *job.args, *RUN[:-1], output)
        assert code in (1, 2, 130)
        assert "--resume" not in err
    assert not (job.folder / "new").exists()
    assert list((job.folder / "empty").iterdir()) == []
    code, _, err = job.fast("finetune", *job.args, *RUN[:-1], output)
    assert code == 0, err


def test_a_run_with_a_checkpoint_is_kept(job):
    with dying_at(25, ValueError("no")):
        assert job.fast("finetune", *job.args, *RUN)[0] == 2
    code, _, err = job.fast("finetune", "--resume", "out")
    assert code == 0, err


def test_resuming_a_folder_without_checkpoints_leaves_it(job):
    code, _, err = job.fast("finetune", *job.args, *RUN)
    assert code == 0, err
    (checkpoint,) = (job.folder / "out").glob("checkpoint-*")
    shutil.rmtree(checkpoint)
    kept = sorted(p.name for p in (job.folder / "out").iterdir())
    code, _, err = job.fast("finetune", "--resume", "out")
    assert code == 2
    assert "nothing to resume from" in err
    assert sorted(p.name for p in (job.folder / "out").iterdir()) == kept
