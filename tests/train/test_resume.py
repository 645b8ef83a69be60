"""Interrupted runs: the same weights bit for bit, and never half a checkpoint."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, TensorDataset

import fast
from fast.files import read_sealed, write_sealed
from fast.models.saved import list_checkpoints
from fast.train.log.history import RunLog
from fast.train.resume import checkpoint
from helpers import same_state
from interruption import Stopped, dying_at
from networks import ConvNet, images

TRAIN, VAL = images(200, 4, seed=1), images(60, 4, seed=2)


def network():
    torch.manual_seed(0)
    return nn.Sequential(ConvNet(), nn.Dropout(0.3), nn.ReLU(), nn.Linear(5, 5))


def interrupted(model, at, *args, **options):
    """Run until step `at` has been taken, then die."""
    with dying_at(at), pytest.raises(Stopped):
        fast.finetune(model, *args, **options)


@pytest.mark.parametrize("method", ["fast", "vanilla", "lp-ft", "replay", "rehearsing", "adapter"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("kind", ["tensors", "loader"])
def test_a_resumed_run_ends_in_the_same_weights(tmp_path, method, optimizer, kind):
    train = TRAIN
    if kind == "loader":
        train = DataLoader(TensorDataset(*TRAIN), batch_size=64, shuffle=True)
    options = {
        "num_classes": 4,
        "method": "fast" if method == "rehearsing" else method,
        "source_inputs": images(40, 5, seed=3)[0] if method[:2] == "re" else None,
        # So high that the rehearsal lowers it.
        "lr": 1.0 if method == "rehearsing" else None,
        "rehearse": 1.0 if method == "rehearsing" else None,
        "optimizer": optimizer,
        "dropout": True,
        "steps": 14,
        "eval_every": 4,
        "save_every": 3,
        "transform": lambda x: x + 0.1 * torch.randn_like(x),
    }
    whole = fast.finetune(network(), train, VAL, output=str(tmp_path / "whole"), **options)
    interrupted(network(), 11, train, VAL, output=str(tmp_path / "cut"), **options)
    again = fast.finetune(network(), train, VAL, resume=str(tmp_path / "cut"), **options)
    assert same_state(again.model, whole.model)

    def facts(history):
        return [{k: v for k, v in r.items() if k != "seconds"} for r in history]

    assert facts(again.history) == facts(whole.history)


@pytest.mark.filterwarnings("ignore:no parameter of the backbone is trainable")
def test_a_run_of_the_head_alone_resumes(tmp_path):
    """A backbone without trained weights has not moved, which looked like a state that lacks."""
    runs = {"whole": network(), "cut": network(), "again": network()}
    for model in runs.values():
        model[0].requires_grad_(False)
    options = {"num_classes": 4, "steps": 14, "eval_every": 3}
    whole = fast.finetune(runs["whole"], TRAIN, VAL, **options)
    interrupted(runs["cut"], 11, TRAIN, VAL, output=str(tmp_path), **options)
    again = fast.finetune(runs["again"], TRAIN, VAL, resume=str(tmp_path), **options)
    assert same_state(again.model, whole.model)


def test_early_stopping_goes_on_where_it_was(tmp_path):
    options = {"steps": 60, "eval_every": 2, "patience": 3, "lr": 3e-2, "method": "vanilla"}
    whole = fast.finetune(network(), TRAIN, VAL, output=str(tmp_path / "whole"), **options)
    last = whole.history[-1]["step"]
    assert last < 60
    interrupted(network(), last - 1, TRAIN, VAL, output=str(tmp_path / "cut"), **options)
    again = fast.finetune(network(), TRAIN, VAL, resume=str(tmp_path / "cut"), **options)
    assert same_state(again.model, whole.model)
    assert again.target_accuracy == whole.target_accuracy


def test_a_loader_with_its_own_generator_and_numpy_augmentation(tmp_path):
    class Augmented(TensorDataset):
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return x + float(np.random.standard_normal()) + random.random(), y

    def loader():
        generator = torch.Generator().manual_seed(5)
        return DataLoader(Augmented(*TRAIN), batch_size=64, shuffle=True, generator=generator)

    options = {"num_classes": 4, "steps": 8, "eval_every": 4, "save_every": 3}
    state = np.random.get_state()[1].copy(), random.getstate()
    whole = fast.finetune(network(), loader(), output=str(tmp_path / "whole"), **options)
    interrupted(network(), 5, loader(), output=str(tmp_path / "cut"), **options)
    again = fast.finetune(network(), loader(), resume=str(tmp_path / "cut"), **options)
    assert same_state(again.model, whole.model)
    assert (np.random.get_state()[1] == state[0]).all()
    assert random.getstate() == state[1]


def test_a_folder_with_checkpoints_is_not_written_over(tmp_path):
    fast.finetune(ConvNet(), TRAIN, steps=4, output=str(tmp_path))
    with pytest.raises(ValueError, match="holds checkpoints of another run"):
        fast.finetune(ConvNet(), TRAIN, steps=4, lr=1e-2, output=str(tmp_path))


def test_a_resumed_run_may_go_on_in_another_folder(tmp_path):
    options = {"steps": 8, "eval_every": 2, "patience": 50}
    a, b, c = (str(tmp_path / name) for name in "abc")
    whole = fast.finetune(network(), TRAIN, VAL, output=a, **options)
    interrupted(network(), 5, TRAIN, VAL, output=b, **options)
    for folder in (a, b):  # of a run that came to its end, and of one that did not
        again = fast.finetune(network(), TRAIN, VAL, resume=folder, output=c, **options)
        assert (tmp_path / "c" / "fast.json").is_file()
        assert same_state(again.model, whole.model)
        shutil.rmtree(c)


def test_other_data_and_other_weights_are_refused(tmp_path):
    torch.manual_seed(0)
    start = ConvNet()
    fast.finetune(copy.deepcopy(start), TRAIN, steps=4, output=str(tmp_path))
    half = (TRAIN[0][:150], TRAIN[1][:150])
    with pytest.raises(ValueError, match="training samples 200, here 150"):
        fast.finetune(copy.deepcopy(start), half, num_classes=4, steps=4, resume=str(tmp_path))
    with pytest.raises(ValueError, match="of another job: pretrained weights"):
        fast.finetune(ConvNet(), TRAIN, steps=4, resume=str(tmp_path))


def test_one_changed_sample_is_other_data(tmp_path):
    torch.manual_seed(0)
    start = ConvNet()
    fast.finetune(copy.deepcopy(start), TRAIN, steps=4, output=str(tmp_path))
    x = TRAIN[0].clone()
    x[77, 0, 2, 3] += 0.25
    with pytest.raises(ValueError, match="of another job: training data"):
        fast.finetune(copy.deepcopy(start), (x, TRAIN[1]), steps=4, resume=str(tmp_path))


def test_other_frozen_layers_are_refused(tmp_path):
    torch.manual_seed(0)
    fast.finetune(ConvNet(), TRAIN, steps=4, output=str(tmp_path))
    torch.manual_seed(0)
    model = ConvNet()
    model.features.requires_grad_(False)
    with pytest.raises(ValueError, match="freeze the same layers"):
        fast.finetune(model, TRAIN, steps=4, resume=str(tmp_path))


def test_other_options_are_refused(tmp_path):
    fast.finetune(ConvNet(), TRAIN, steps=4, output=str(tmp_path))
    with pytest.raises(ValueError, match=r"lr was the default, is 0\.01"):
        fast.finetune(ConvNet(), TRAIN, steps=4, lr=1e-2, resume=str(tmp_path))


def test_nothing_to_resume_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        fast.finetune(ConvNet(), TRAIN, steps=4, resume=str(tmp_path))


def test_another_model_is_refused_and_left_as_it_is(tmp_path):
    fast.finetune(ConvNet(), TRAIN, steps=4, output=str(tmp_path))
    with pytest.raises(ValueError, match="another model"):
        fast.finetune(network(), TRAIN, steps=4, resume=str(tmp_path))


@pytest.mark.parametrize("file", ["model.safetensors", "training.safetensors", "state.json"])
def test_a_truncated_checkpoint_names_the_file(tmp_path, file):
    fast.finetune(ConvNet(), TRAIN, steps=4, output=str(tmp_path))
    path = list_checkpoints(tmp_path)[-1] / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=file):
        fast.finetune(ConvNet(), TRAIN, steps=4, resume=str(tmp_path))


def test_a_failing_save_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    model, options = ConvNet(), {"steps": 9, "eval_every": 3}
    save = checkpoint.save_tensors
    calls = []

    def failing(tensors, path):
        calls.append(path)
        if len(calls) > 2:
            Path(path).write_bytes(b"half")
            raise OSError("disk full")
        save(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_tensors", failing)
        with pytest.raises(OSError, match="disk full"):
            fast.finetune(copy.deepcopy(model), TRAIN, output=str(tmp_path), **options)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-00000003"]
    assert not list(tmp_path.glob(".checkpoint*"))
    again = fast.finetune(copy.deepcopy(model), TRAIN, resume=str(tmp_path), **options)
    assert again.history[-1]["step"] == 9


KILLED = """
import os, signal, sys
from pathlib import Path
import fast
from fast.train.resume import checkpoint
from interruption import Stopped, dying_at
from networks import ConvNet, images
import torch
torch.manual_seed(0)
save, calls = checkpoint.save_tensors, []
def dying(tensors, path):
    calls.append(path)
    if len(calls) == 3:
        Path(path).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    save(tensors, path)
checkpoint.save_tensors = dying
fast.finetune(ConvNet(), images(200, 4, seed=1), steps=9, eval_every=3, output=sys.argv[1])
"""


def test_killed_in_the_middle_of_a_save(tmp_path):
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], env=environment, check=False
    )
    assert process.returncode == -signal.SIGKILL
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-00000003"]
    torch.manual_seed(0)
    options = {"steps": 9, "eval_every": 3}
    again = fast.finetune(ConvNet(), TRAIN, resume=str(tmp_path), **options)
    torch.manual_seed(0)
    whole = fast.finetune(ConvNet(), TRAIN, **options)
    assert same_state(again.model, whole.model)


def test_what_else_makes_another_job_is_refused(tmp_path):
    """As many samples of as many classes, but others; labels exchanged; other known inputs."""
    old = images(40, 5, seed=3)
    torch.manual_seed(0)
    start, options = ConvNet(), {"num_classes": 4, "steps": 4}

    def run(train=TRAIN, val=VAL, source=VAL, source_inputs=old, **more):
        model = copy.deepcopy(start)
        return fast.finetune(
            model, train, val, source, source_inputs=source_inputs, **options, **more
        )

    run(output=str(tmp_path))
    others = {
        "training data": {"train": images(200, 4, seed=7)},
        "training data ": {"train": (TRAIN[0], TRAIN[1].flip(0))},
        "training data  ": {"train": TensorDataset(*TRAIN)},
        "validation data": {"val": images(60, 4, seed=7)},
        "source data": {"source": None},
        "source inputs": {"source_inputs": images(40, 5, seed=4)},
        "card": {"card": fast.SourceCard.estimate(start, old[0])},
    }
    for name, other in others.items():
        with pytest.raises(ValueError, match=f"of another job: {name.strip()} "):
            run(resume=str(tmp_path), **other)
    run(resume=tmp_path)


def test_an_option_that_a_run_did_not_know_must_be_at_its_default(tmp_path):
    fast.finetune(ConvNet(), TRAIN, steps=4, output=str(tmp_path), average=3)
    record = json.loads((tmp_path / "fast.json").read_text())
    del record["average"]
    (tmp_path / "fast.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="average was the default, is 3"):
        fast.finetune(ConvNet(), TRAIN, steps=4, resume=str(tmp_path), average=3)
    (tmp_path / "fast.json").write_text("{")
    with pytest.raises(ValueError, match=r"fast.json is damaged or was changed"):
        fast.finetune(ConvNet(), TRAIN, steps=4, resume=str(tmp_path))


def test_options_of_any_type_are_saved_and_compared(tmp_path):
    weights = torch.tensor([1.0, 2.0, 1.0, 0.5])
    options = {"steps": np.int64(4), "device": torch.device("cpu"), "lr": np.float32(0.5)}
    torch.manual_seed(0)
    start = ConvNet()
    run = options | {"class_weights": weights}
    fast.finetune(copy.deepcopy(start), TRAIN, output=tmp_path / "a", **run)
    as_list = options | {"class_weights": weights.tolist()}
    again = fast.finetune(copy.deepcopy(start), TRAIN, resume=tmp_path / "a", **as_list)
    assert again.config.class_weights == (1.0, 2.0, 1.0, 0.5)
    with pytest.raises(ValueError, match=r"class_weights was \[1.0, 2.0"):
        fast.finetune(copy.deepcopy(start), TRAIN, resume=tmp_path / "a", **options)


class Shuffled(Sampler):
    """Batches drawn by a generator of its own."""

    def __init__(self, generator):
        self.own = generator

    def __iter__(self):
        own = self.own
        if isinstance(own, torch.Generator):
            order = torch.randperm(200, generator=own).tolist()
        elif isinstance(own, random.Random):
            order = own.sample(range(200), 200)
        else:
            order = own.permutation(200).tolist()
        return (order[i : i + 64] for i in range(0, 192, 64))

    def __len__(self):
        return 3


GENERATORS = {
    "torch": lambda: torch.Generator().manual_seed(5),
    "numpy": lambda: np.random.default_rng(5),
    "numpy, old": lambda: np.random.RandomState(5),
    "random": lambda: random.Random(5),
    "nested": lambda: BatchSampler(
        RandomSampler(range(200), generator=torch.Generator().manual_seed(5)), 64, True
    ),
}


@pytest.mark.parametrize("kind", GENERATORS)
def test_a_batch_sampler_with_a_generator_of_its_own(tmp_path, kind):
    def loader():
        generator = GENERATORS[kind]()
        sampler = generator if kind == "nested" else Shuffled(generator)
        return DataLoader(TensorDataset(*TRAIN), batch_sampler=sampler)

    options = {"num_classes": 4, "steps": 8, "eval_every": 4, "save_every": 3, "dropout": True}
    whole = fast.finetune(network(), loader(), output=str(tmp_path / "whole"), **options)
    interrupted(network(), 5, loader(), output=str(tmp_path / "cut"), **options)
    again = fast.finetune(network(), loader(), resume=str(tmp_path / "cut"), **options)
    assert same_state(again.model, whole.model)


def test_the_best_weights_follow_into_another_folder(tmp_path):
    """From there the run can be gone on with once more, without the folder that it began in."""
    options = {"steps": 60, "eval_every": 2, "patience": 3, "lr": 3e-2, "method": "vanilla"}
    whole = fast.finetune(network(), TRAIN, VAL, output=str(tmp_path / "whole"), **options)
    last = whole.history[-1]["step"]
    a, b = tmp_path / "a", tmp_path / "b"
    interrupted(network(), last - 3, TRAIN, VAL, output=a, **options)
    interrupted(network(), last - 1, TRAIN, VAL, resume=a, output=b, **options)
    shutil.rmtree(a)
    again = fast.finetune(network(), TRAIN, VAL, resume=b, **options)
    assert same_state(again.model, whole.model)
    with pytest.raises(ValueError, match="whole holds checkpoints already; pass resume="):
        fast.finetune(network(), TRAIN, VAL, resume=b, output=tmp_path / "whole", **options)


def test_the_clock_goes_on_and_what_a_killed_save_left_is_removed(tmp_path):
    options = {"steps": 8, "eval_every": 2}
    interrupted(network(), 5, TRAIN, VAL, output=tmp_path, **options)
    (tmp_path / ".checkpoint-00000006-x.unfinished").mkdir()
    (tmp_path / ".checkpoint-00000006-x.unfinished" / "model.safetensors").write_text("half")
    state = list_checkpoints(tmp_path)[-1] / "state.json"
    record = read_sealed(state, checkpoint.FORMAT)
    record["record"]["measure"]["seconds"] += 1000
    state.unlink()
    write_sealed(state, record)
    again = fast.finetune(network(), TRAIN, VAL, resume=tmp_path, **options)
    seconds = [r["seconds"] for r in again.history]
    assert seconds == sorted(seconds)
    assert seconds[2] < 1000 < seconds[3]
    assert not list(tmp_path.glob(".*"))


def test_files_have_null_for_what_is_not_finite(tmp_path):
    (tmp_path / "history").mkdir()
    log = RunLog(tmp_path / "history")
    log.add({"step": 0, "loss": None, "target_loss": math.nan})
    log.add({"step": 1, "loss": 0.5, "target_loss": math.inf, "points": [(1.0, math.nan)]})
    log.close()
    lines = (tmp_path / "history" / "history.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert records[0] == {"step": 0, "loss": None, "target_loss": None}
    assert records[1] == {"step": 1, "loss": 0.5, "target_loss": None, "points": [[1.0, None]]}
    assert math.isinf(log.history[1]["target_loss"])
