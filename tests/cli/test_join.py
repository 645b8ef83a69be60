"""`fast join`: from the folder of a run to one network for both tasks."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import fast
from fast.cli import main
from fast.merge.join import join_heads
from fast.merge.join_parts import saved_heads
from fast.merge.joined import load_joined
from fast.models.load import load_model

ADAPT = ("--steps", 40, "--source-inputs", "source.npz", "--output", "out", "--no-progress")


@pytest.fixture(scope="module", params=["frozen", "per_task"])
def run_folder(request, pretrained, job_args, tmp_path_factory):
    """What `fast finetune --output` leaves, made once."""
    folder = tmp_path_factory.mktemp("adapted")
    shutil.copytree(pretrained, folder, dirs_exist_ok=True)
    args = [a for a in job_args if a not in ("--source", "source.npz")]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        options = (*args, *map(str, ADAPT), "--batch-norm", request.param)
        assert main(["finetune", *options]) == 0
    return folder / "out", 1 if request.param == "frozen" else 2


@pytest.fixture
def adapted(job, run_folder):
    # The job file names the data by its path, in the folder that the run was made in.
    shutil.copytree(run_folder[0], job.folder / "out")
    return job


def test_a_run_becomes_one_network(adapted, run_folder):
    (adapted.folder / "old.txt").write_text("left\nmiddle\nright\n")
    code, out, err = adapted.fast("join", "out", "-o", "both", "--source-classes", "old.txt")
    assert code == 0, err
    passes = run_folder[1]
    assert f"7 classes in one softmax; {passes} forward pass" in out
    facts = json.loads((adapted.folder / "both/join.json").read_text())
    assert facts["rows"][:3] == ["left", "middle", "right"]
    assert json.loads((adapted.folder / "both/result.json").read_text())["classes"] == facts["rows"]
    assert (adapted.folder / "both/data.json").is_file()

    def images(file, part):
        return ((torch.from_numpy(np.load(file)[part]).float() / 255 - 0.5) / 0.5)[:, None]

    x_old, x = images("source.npz", "x_test"), images("target.npz", "x_test")
    joined = load_joined("both", load_model("nets.py:Net(3)").model)
    assert joined.passes == passes
    right = [
        (joined(rows).argmax(1) == first + torch.from_numpy(np.load(file)["y_test"])).float().mean()
        for rows, file, first in ((x_old, "source.npz", 0), (x, "target.npz", 3))
    ]
    assert min(right) > 0.9
    loaded = fast.load("both", "nets.py:Net(3)")
    answers = loaded.predict(x)
    assert loaded.classes == facts["rows"]
    torch.testing.assert_close(answers.logits, joined(x).detach(), rtol=1e-4, atol=1e-4)

    check_tasks(adapted, loaded, x, torch.from_numpy(np.load("target.npz")["y_test"]))

    # Python gives the same network, from the same samples in the same order.
    heads = saved_heads("out", load_model("nets.py:Net(3)").model, x)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(x_old)))
    y = torch.from_numpy(np.load("target.npz")["y_test"])
    same = join_heads(heads, x_old[order], (x, y))
    torch.testing.assert_close(same(x), joined(x), rtol=1e-3, atol=1e-3)


def check_tasks(adapted, loaded, x, y):
    """A joined network answers with all classes, or with those of one task."""
    whole = loaded.predict(x)
    assert loaded.task_of(None) == "both"
    assert torch.equal(whole.logits, loaded.predict(x, task="both").logits)
    old, new = (loaded.predict(x, task=task) for task in ("source", "target"))
    assert (old.classes, new.classes) == (loaded.classes[:3], loaded.classes[3:])
    assert torch.equal(torch.cat([old.logits, new.logits], 1), whole.logits)

    array = np.load("target.npz")["x_test"][0]
    pytest.importorskip("PIL.Image", reason="pictures need pillow").fromarray(array).save("a.png")
    for task, classes in (((), 7), (("--task", "target"), 4), (("--task", "source"), 3)):
        code, out, err = adapted.fast("predict", "both", "a.png", "--top", 9, *task)
        assert code == 0, err
        assert len(out.splitlines()[-1].split()) == 1 + 2 * classes
    code, _, err = adapted.fast("predict", "out", "a.png", "--task", "both")
    assert (code, "fast join RUN --source-inputs OLD" in err) == (2, True)

    code, out, err = adapted.fast("evaluate", "both", "target.npz")
    assert (code, "its classes are numbers, which do not say whose" in err) == (2, True)
    code, out, err = adapted.fast("evaluate", "both", "--task", "target")
    assert (code, "(target task)" in out) == (0, True), err
    numbers = json.loads(Path("both/evaluation-target/evaluation.json").read_text())
    assert numbers["accuracy"] == loaded.evaluate((x, y), task="target").accuracy
    assert loaded.evaluate((x, y + 3)).accuracy > 0.9
    code, _, err = adapted.fast("finetune", "--resume", "both")
    assert (code, "Traceback" in err) == (2, False), err


def test_few_photos_join_on_those_that_were_trained_on(adapted):
    """And source inputs need no labels, unless their labels are asked for."""
    few, old = np.load("target.npz"), np.load("source.npz")
    few = {n: few[n][: 24 if n.endswith("train") else 8] for n in few.files}
    np.savez(adapted.folder / "few.npz", **few)
    np.savez(adapted.folder / "old.npz", x=old["x_test"])
    args = ("join", "out", "--data", "few.npz", "--source-inputs", "old.npz", "-o", "both")
    code, _, err = adapted.fast(*args)
    assert code == 0, err
    assert "the run held out 8 samples, and joining takes at least 10: samples that it tr" in err
    assert "fast: note: --source-inputs old.npz: 90 samples without labels" in err
    code, _, err = adapted.fast(*args, "--source-labelled")
    assert (code, "old.npz has no labels that can be used; drop the option" in err) == (2, True)


def test_what_is_missing_is_named(adapted):
    for args, message in (
        (("out",), "--output must be given"),
        (("nowhere", "-o", "both"), "RUN nowhere: no such folder"),
        (("out", "-o", "out"), "is the run itself"),
        (("out", "-o", "."), "--output .: is not empty; name another folder"),
        (("out", "-o", "both", "--source-classes", "none.txt"), "cannot be read"),
    ):
        code, _, err = adapted.fast("join", *args)
        assert code == 2
        assert message in err
    (adapted.folder / "both").mkdir()  # a full disk stopped it before
    shutil.copy("out/data.json", "both")
    (adapted.folder / "two.txt").write_text("left\nright\n")
    code, _, err = adapted.fast("join", "out", "-o", "both", "--source-classes", "two.txt")
    assert (code, "has 2 names; the old head has 3 classes" in err) == (2, True)
