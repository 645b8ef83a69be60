"""job.json: what --resume reads of it, and that it runs no code of a stranger's."""

import hashlib
import hmac
import json
import shutil

import pytest

from fast.cli.job_file import _sign
from fast.files import JOB_FILE

RUN = ("--steps", 6, "--eval-every", 2, "--output", "out")
EVIL = 'open("ran", "w").close()\n'


@pytest.fixture
def finished(job):
    code, _, err = job.fast("finetune", *job.args, *RUN)
    assert code == 0, err
    return job


def forge(folder, signature=None, **changes):
    file = folder / JOB_FILE
    record = json.loads(file.read_text()) | changes
    record["signature"] = signature
    if signature == "by another key":
        del record["signature"]
        text = json.dumps(record, sort_keys=True).encode()
        record["signature"] = hmac.new(b"k" * 32, text, "sha256").hexdigest()
    file.write_text(json.dumps(record))


@pytest.mark.parametrize("signature", [None, "None", "0" * 64, "by another key", 3])
@pytest.mark.parametrize("command", [("finetune", "--resume"), ("curvature", "--checkpoint")])
def test_a_strangers_folder_runs_nothing(finished, signature, command):
    shutil.copytree("out", "stranger")
    (finished.folder / "stranger" / "evil.py").write_text(EVIL)
    evil = finished.folder / "stranger" / "evil.py"
    digest = hashlib.blake2b(evil.read_bytes(), digest_size=16).hexdigest()
    forge(finished.folder / "stranger", signature, model=f"{evil}:F", model_hash=digest)
    code, _, err = finished.fast(*command, "stranger")
    assert code == 2
    (line,) = err.splitlines()
    assert line.startswith(f"fast: error: {command[1]} stranger: was not started by you on this")
    assert f"name it: --model '{evil}:F'" in line
    assert not (finished.folder / "ran").exists()


def test_a_model_that_is_named_runs_in_place_of_the_recorded_one(finished):
    shutil.copytree("out", "stranger")
    forge(finished.folder / "stranger", model="evil.py:F")
    (finished.folder / "evil.py").write_text(EVIL)
    code, _, err = finished.fast("finetune", "--resume", "stranger", "--model", "nets.py:Net(3)")
    assert code == 0, err
    assert not (finished.folder / "ran").exists()
    code, _, err = finished.fast("finetune", "--resume", "out", "--model", "nets.py:Net(3, 4)")
    assert code == 2


def test_a_model_file_that_has_changed_is_to_be_named(finished):
    with (finished.folder / "nets.py").open("a") as file:
        file.write("# a remark\n")
    code, _, err = finished.fast("finetune", "--resume", "out")
    assert code == 2
    assert "--resume out: the file of its network has changed since; to run it as it is now" in err
    code, _, err = finished.fast("finetune", "--resume", "out", "--model", "nets.py:Net(3)")
    assert code == 0, err


def test_without_a_place_for_the_key_the_model_is_to_be_named(job, monkeypatch):
    (job.folder / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(job.folder / "file"))
    assert job.fast("finetune", *job.args, *RUN)[0] == 0
    code, _, err = job.fast("finetune", "--resume", "out")
    assert code == 2
    assert "name it: --model" in err
    assert job.fast("finetune", "--resume", "out", "--model", "nets.py:Net(3)")[0] == 0


@pytest.mark.parametrize(
    "text",
    ["[]", "null", "{}", "{", "[" * 100_000, '{"model": null}', '{"lr": {"a": 1}}', '{"run": 1}',
     '{"model": ["a"], "data": {}}', '{"steps": "many"}', '{"unset": {}}', '{"mean": [[]]}'],
)  # fmt: skip
@pytest.mark.parametrize("named", [(), ("--model", "nets.py:Net(3)")])
def test_a_damaged_job_file_is_one_line(finished, text, named):
    (finished.folder / "out" / JOB_FILE).write_text(text)
    for command in (("finetune", "--resume"), ("curvature", "--checkpoint")):
        code, _, err = finished.fast(*command, "out", *named)
        assert code == 2
        assert len(err.splitlines()) == 1, err
        assert "out" in err or "must be given" in err


def test_a_run_that_was_stopped_before_its_first_checkpoint(finished):
    """It starts from the beginning; the command that started it says so."""
    (checkpoint,) = (finished.folder / "out").glob("checkpoint-*")
    whole = (finished.folder / "out" / "model.safetensors").read_bytes()
    shutil.rmtree(checkpoint)
    for name in ("manifest.json", "model.safetensors", "result.json"):
        (finished.folder / "out" / name).unlink()
    code, _, err = finished.fast("finetune", *finished.args, *RUN)
    assert code == 2
    assert "out: its run was stopped before its first checkpoint; fast finetune --resume out" in err
    code, _, err = finished.fast("finetune", "--resume", "out")
    assert code == 0, err
    assert "fast: note: out has no checkpoint yet: the run starts from the beginning" in err
    assert (finished.folder / "out" / "model.safetensors").read_bytes() == whole


def test_what_is_switched_off_stays_off_on_resume(job):
    """Every option that has a --no- form is read back as it was given."""
    options = ("--no-max-entropy", "--no-progress", "--method", "vanilla")
    code, _, err = job.fast("finetune", *job.args, *RUN, *options)
    assert code == 0, err
    code, _, err = job.fast("finetune", "--resume", "out")
    assert code == 0, err


def test_a_model_file_that_is_gone_is_named(finished):
    (finished.folder / "nets.py").rename(finished.folder / "moved.py")
    code, _, err = finished.fast("finetune", "--resume", "out")
    assert code == 2
    assert "the file of its network is not there any more" in err


def test_a_run_of_an_earlier_version_goes_on(job):
    """Its file holds every option of the network and the data, also those that were not given."""
    code, _, err = job.fast("finetune", *job.args, *RUN, "--no-progress")
    assert code == 0, err
    file = job.folder / "out" / JOB_FILE
    record = json.loads(file.read_text())
    earlier = {
        "weights": None, "allow_missing": False, "source_inputs": None, "card": None,
        "val_fraction": 0.2, "input_size": None, "resize": None, "interpolation": None,
        "mean": None, "std": None, "skip_broken": False, "flip": False, "input_column": None,
        "label_column": None, "max_length": 128, "progress": False,
    }  # fmt: skip
    del record["signature"]
    record = earlier | record
    file.write_text(json.dumps(record | {"signature": _sign(record)}))
    for command in (("finetune", "--resume"), ("curvature", "--samples", 24, "--checkpoint")):
        code, _, err = job.fast(*command, "out")
        assert code == 0, err
