"""Files of a checkpoint that are damaged, mixed or made up are refused; the model stays."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import fast
from fast.files import file_hash, read_sealed, write_sealed
from fast.models.saved import list_checkpoints
from fast.tensor_files import save_tensors
from fast.train.measure import Measure
from fast.train.resume.checkpoint import FORMAT
from helpers import same_state
from networks import ConvNet, images

TRAIN, VAL = images(64, 4, seed=1), images(30, 4, seed=2)
OPTIONS = {"steps": 6, "eval_every": 2, "batch_size": 16, "patience": 9}


def start():
    torch.manual_seed(0)
    return ConvNet()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two runs of the same options but the seed, and one of another rate."""
    folder = tmp_path_factory.mktemp("runs")
    for name, more in {"a": {}, "b": {"seed": 1}, "c": {"lr": 1e-2}}.items():
        fast.finetune(start(), TRAIN, VAL, output=folder / name, **OPTIONS, **more)
    return folder


@pytest.fixture
def runs(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "runs")
    return tmp_path / "runs"


def resume(folder):
    model = start()
    before = copy.deepcopy(model.state_dict())
    generator = torch.get_rng_state()
    try:
        return fast.finetune(model, TRAIN, VAL, resume=folder, **OPTIONS)
    finally:
        assert torch.equal(torch.get_rng_state(), generator)
        # The run is finished, so no step is taken: what is left is the checkpoint's or the start's.
        if "decide.weight" in model.state_dict():
            assert same_state(model, before)


def only(folder):
    (newest,) = list_checkpoints(folder)
    return newest


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "state.json"])
@pytest.mark.parametrize("other", ["b", "c"])
def test_a_file_of_another_run_is_refused(runs, name, other):
    shutil.copy(only(runs / other) / name, only(runs / "a") / name)
    with pytest.raises(ValueError, match=f"{name} is damaged, or was not saved|of another run"):
        resume(runs / "a")


@pytest.mark.parametrize("other", ["b", "c"])
def test_a_checkpoint_of_another_run_is_refused(runs, other):
    shutil.rmtree(only(runs / "a"))
    shutil.copytree(only(runs / other), runs / "a" / only(runs / other).name)
    with pytest.raises(ValueError, match="of another run"):
        resume(runs / "a")
    shutil.copy(runs / other / "run.json", runs / "a")
    with pytest.raises(ValueError, match=r"with other options: \{'(seed|lr)'"):
        resume(runs / "a")


def test_a_history_of_another_run_is_refused(runs):
    shutil.copy(runs / "c" / "history.jsonl", runs / "a")
    with pytest.raises(ValueError, match=r"history.jsonl is damaged, or is not of the run"):
        resume(runs / "a")
    (runs / "a" / "history.jsonl").unlink()
    with pytest.raises(ValueError, match=r"history.jsonl is missing"):
        resume(runs / "a")


def forge(folder, change=lambda meta: None, tensors=None):
    """A checkpoint whose hashes are right, and which no run has written."""
    path = only(folder)
    if tensors:
        weights = load_file(path / "training.safetensors")
        tensors(weights)
        save_file(weights, path / "training.safetensors")
    meta = read_sealed(path / "state.json", FORMAT)
    meta["files"]["training.safetensors"] = file_hash(path / "training.safetensors")
    change(meta)
    (path / "state.json").unlink()
    write_sealed(path / "state.json", meta)


def put(*keys, value):
    def change(meta):
        for key in keys[:-1]:
            meta = meta[key]
        meta[keys[-1]] = value

    return change


def position(meta):
    meta["process generators"]["numpy"]["state"]["pos"] = 10**9


def words(meta):
    meta["process generators"]["numpy"]["state"]["key"]["array"] = "00" * 8


FORGED = {
    "format": (put("format", value=99), "is of format 99; this version of fast reads"),
    "step beyond": (put("step", value=10**9), "state.json is damaged .* step 1000000000 of 6"),
    "step of no number": (put("step", value=True), "state.json is damaged"),
    "position of numpy": (position, "state.json is damaged .* position 1000000000"),
    "words of numpy": (words, "state.json is damaged .* words"),
    "python": (put("process generators", "python", value=[1]), "state.json is damaged"),
    "no optimizer": (lambda meta: meta.pop("optimizer"), "state.json is damaged .*optimizer"),
    "groups": (put("optimizer", "groups", value=None), "state.json is damaged"),
    "record": (put("record", value=[]), "state.json is damaged"),
    "losses": (put("record", "losses", value=["x"]), "state.json is damaged"),
    "job": (put("job", value=3), "state.json is damaged"),
    "generators": (put("generators", value={"train.g": 1}), "of another job: the data, transform"),
}


@pytest.mark.parametrize("kind", FORGED)
def test_values_that_no_run_has_written_are_refused(runs, kind):
    change, message = FORGED[kind]
    forge(runs / "a", change)
    with pytest.raises(ValueError, match=message):
        resume(runs / "a")


AVERAGE = "adaptation.guards.WeightAverage.0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(AVERAGE), f"lacks {AVERAGE}"),
        (lambda t: t.update({AVERAGE: torch.ones(1)}), rf"{AVERAGE} is \[1\] torch.float32, and"),
        (lambda t: t.update({AVERAGE: t[AVERAGE].double()}), "float64, and must be"),
        (lambda t: t.pop("best.project.weight"), "lacks best.project.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(runs, change, message):
    forge(runs / "a", tensors=change)
    with pytest.raises(ValueError, match=message):
        resume(runs / "a")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[]", "null", "{", "\xff\xfe", '{"a": 1}', "9" * 5000]
)
@pytest.mark.parametrize("name", ["state.json", "fast.json", "run.json"])
def test_json_that_is_none_of_ours_names_the_file(runs, name, text):
    file = only(runs / "a") / name if name == "state.json" else runs / "a" / name
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"{name} is |cannot resume|of another run"):
        resume(runs / "a")


def test_a_missing_file_is_named(runs):
    (only(runs / "a") / "training.safetensors").unlink()
    with pytest.raises(ValueError, match=r"training.safetensors is missing"):
        resume(runs / "a")


def test_a_file_larger_than_any_checkpoint_of_the_model_is_not_read(runs):
    with (only(runs / "a") / "training.safetensors").open("r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(ValueError, match=r"training\.safetensors is larger than a checkpoint of"):
        resume(runs / "a")


def test_the_history_is_appended_and_not_part_of_the_state(runs):
    state = json.loads((only(runs / "a") / "state.json").read_text())
    lines = (runs / "a" / "history.jsonl").read_bytes()
    assert state["record"]["history"]["bytes"] == len(lines)
    assert "target_loss" not in json.dumps(state["record"]["history"])


def test_a_history_that_is_not_finite_comes_back(tmp_path, monkeypatch):
    record = Measure.record

    def odd(self, *args):
        return record(self, *args) | {"target_loss": float("inf")}

    monkeypatch.setattr(Measure, "record", odd)
    whole = fast.finetune(start(), TRAIN, VAL, output=tmp_path, **OPTIONS)
    again = fast.finetune(start(), TRAIN, VAL, resume=tmp_path, **OPTIONS)
    assert again.history == whole.history
    assert again.history[0]["target_loss"] == float("inf")


def test_a_full_disk_is_told_with_the_file(tmp_path):
    with pytest.raises(OSError, match=r"nowhere/model.safetensors cannot be written"):
        save_tensors({"a": torch.ones(1)}, tmp_path / "nowhere" / "model.safetensors")
