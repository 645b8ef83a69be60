"""`torchrun -m fast finetune`: several processes, one run."""

import json

import numpy as np
import pytest
import torch.distributed as dist

from torchrun import torchrun

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo here"
)


@pytest.mark.slow
def test_two_processes_make_one_run(job):
    options = ("--steps", "10", "--lr", "0.01", "--source-inputs", "source.npz", "--output", "out")
    text = torchrun(2, "fast", "finetune", *job.args, *options)
    assert text.count("saved in out") == 1
    assert text.count("classes, in order") == 1
    assert text.count("the same samples as --source") == 1
    assert text.count("the head alone for up to") == 1
    lines = (job.folder / "out" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(11))
    result = json.loads((job.folder / "out" / "result.json").read_text())
    assert result["target_accuracy"] == json.loads(lines[-1])["target_accuracy"]
    assert [path.name for path in job.folder.iterdir() if path.is_dir()] == ["out"]

    text = torchrun(2, "fast", "finetune", *job.args, *options, fails=True)
    assert "--output out: exists" in text


@pytest.mark.slow
def test_one_of_two_processes_writes_the_accuracies_of_folds(job):
    options = ("--steps", "2", "--folds", "2", "--data", "drawn.npz", "--output", "new/folds")
    arrays = np.load("target.npz")
    np.savez("drawn.npz", x=arrays["x_train"], y=arrays["y_train"])
    text = torchrun(2, "fast", "finetune", *job.args, *options)
    assert text.count("saved in new/folds/folds.json") == 1
    assert len(json.loads((job.folder / "new/folds/folds.json").read_text())["runs"]) == 2
    text = torchrun(2, "fast", "finetune", *job.args, *options, fails=True)
    assert "error: --output new/folds: exists; name another" in text
    assert "raised RuntimeError" not in text
