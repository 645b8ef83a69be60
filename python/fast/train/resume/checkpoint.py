"""Checkpoints: safetensors for the tensors, JSON for the rest, complete or not there at all.

A checkpoint is a folder such as `checkpoint-00000150` with three files. It is written under another
name and renamed when it is complete, and only then is its predecessor removed: a run that is killed
in the middle of a save resumes from the checkpoint before. `state.json` ties the files together: it
holds their hashes and its own, the id of the run, its options, and whatever else a resumed run has
to agree with.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fast import dtensor
from fast.adapt.adaptation import Adaptation
from fast.adapt.state import check_state, joined_state, split_state
from fast.data.generators import process_generators, set_process_generators, set_state, state_of
from fast.data.reachable import Generator
from fast.errors import some, warn
from fast.files import atomic_folder, file_hash, read_sealed, reading, write_sealed
from fast.models.saved.files import STATE_FILE, checkpoint_name, list_checkpoints
from fast.tensor_files import load_into, load_tensors, save_tensors
from fast.train.early_stopping import BEST
from fast.train.resume.optimizer_state import flatten, unflatten

FORMAT = 3
ADAPTATION, OTHERS = "adaptation", "other ranks"
MODEL_FILE, TRAINING_FILE = "model.safetensors", "training.safetensors"
# A stranger's file may have this multiple of the model's bytes, and a header. Two fp32 moments of
# bf16 weights take 4 times the model's bytes; averages and the head start come on top.
MOST_COPIES, MOST_HEADER = 16, 64 << 20
HINTS = {
    "pretrained weights (hash)": ". The network does not begin with the weights that the run began "
    "with: where they are drawn at random, seed that, or give them as a file (--weights)",
}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a resumed run has to agree with.

    Attributes:
        run: id of the run.
        options: the options that decide what is computed.
        job: facts about network, data and code, by the names that messages use.
        environment: versions and hardware, which may change the last bits.
    """

    run: str
    options: dict[str, Any]
    job: dict[str, Any]
    environment: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class LiveRun:
    """The live parts of a run that are saved, and restored in place.

    Attributes:
        adaptation: the adaptation, with its model and optimizer.
        generators: random generators that data, transform and network hold, by path.
    """

    adaptation: Adaptation
    generators: dict[str, Generator]

    @property
    def model(self) -> nn.Module:
        return self.adaptation.model

    @property
    def optimizer(self) -> Optimizer:
        return self.adaptation.optimizer

    def randomness(self) -> dict[str, Any]:
        """The states of all random generators of this process."""
        return {
            "process generators": process_generators(),
            "generators": {path: state_of(g) for path, g in self.generators.items()},
        }

    def set_randomness(self, states: dict[str, Any]) -> None:
        """Restore what `randomness()` returned."""
        for name, generator in self.generators.items():
            set_state(generator, states["generators"][name])
        set_process_generators(states["process generators"])


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A training state as it is written: tensors by name, on the CPU if they were sharded.

    Attributes:
        step: steps done.
        model: tensors of the network.
        training: tensors of optimizer and adaptation, and the best weights.
        optimizer, adaptation: their plain values, as JSON holds them.
    """

    step: int
    model: dict[str, Tensor]
    training: dict[str, Tensor]
    optimizer: dict[str, Any]
    adaptation: dict[str, Any]

    @classmethod
    def of(cls, live: LiveRun, best: dict[str, Tensor], keep: bool = True) -> Snapshot:
        """Take a snapshot; sharded tensors are gathered one by one, so all ranks have to call it.

        Args:
            best: further tensors, whose names begin with `BEST`.
            keep: whether this rank will write the snapshot; the others get no tensors.
        """
        tensors, optimizer = flatten(live.optimizer)
        plain, more = split_state(live.adaptation.state_dict(), ADAPTATION)

        def gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            whole: dict[str, Tensor] = {}
            for name, x in tensors.items():
                value = dtensor.whole(x.detach())
                if keep:
                    whole[name] = value.cpu() if dtensor.is_sharded(x) else x
            return whole

        return cls(
            step=live.adaptation.done,
            model=gathered(dict(live.model.state_dict())),
            training=gathered(tensors | more | best),
            optimizer=optimizer,
            adaptation=plain,
        )


def save_checkpoint(
    folder: Path,
    snapshot: Snapshot,
    facts: Facts,
    record: dict[str, Any],
    *,
    randomness: list[dict[str, Any]],
) -> Path:
    """Save a snapshot, then remove the checkpoints before it.

    Args:
        folder: the run's folder.
        record: anything else that JSON can hold; `load_checkpoint` returns it.
        randomness: `LiveRun.randomness()` of each rank.

    Returns:
        the new checkpoint's folder.
    """
    target = folder / checkpoint_name(snapshot.step)
    if target.exists():
        shutil.rmtree(target)
    with atomic_folder(target) as temporary:
        save_tensors(snapshot.model, temporary / MODEL_FILE)
        save_tensors(snapshot.training, temporary / TRAINING_FILE)
        meta = {
            "format": FORMAT,
            "step": snapshot.step,
            "files": {name: file_hash(temporary / name) for name in (MODEL_FILE, TRAINING_FILE)},
            **vars(facts),
            "optimizer": snapshot.optimizer,
            ADAPTATION: snapshot.adaptation,
            **randomness[0],
            OTHERS: randomness[1:],
            "record": record,
        }
        write_sealed(temporary / STATE_FILE, meta)
    for old in list_checkpoints(folder):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)
    return target


def load_checkpoint(
    folder: Path, live: LiveRun, facts: Facts, *, rank: int = 0
) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """Restore the newest checkpoint of a run into `live` and the random generators.

    Args:
        rank: the rank whose generators are restored; a rank that the run did not have keeps its
            own.

    Returns:
        path of the `state.json`, and the record and the best weights saved with it.

    Raises:
        FileNotFoundError: there is no complete checkpoint.
        ValueError: files are damaged, or were not saved together; or the checkpoint belongs to
            another run, model, optimizer or job. Nothing is changed then.
    """
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        raise FileNotFoundError(f"no checkpoint to resume from in {folder}")
    path = checkpoints[-1]
    meta = _read_state(path, live.adaptation.plan.steps)
    _check_run(path, meta.facts, facts)
    _check_files(path, meta.hashes, live.model)
    weights, training = load_tensors(path / MODEL_FILE), load_tensors(path / TRAINING_FILE)
    best = {name: training.pop(name) for name in list(training) if name.startswith(BEST)}
    _check_same_model(live.model, weights, path)
    _check_same_optimizer(live.optimizer, meta.optimizer, path)
    _check_job(path, meta.facts, facts)
    adaptation = _take_adaptation(path, meta, training, live.adaptation.state_dict())
    if best:
        entries = {BEST + name: value for name, value in live.model.state_dict().items()}
        _check_tensors(path / TRAINING_FILE, best, entries)
        best = {name: best[name] for name in entries}
    _check_generators(path, meta.randomness_of(rank), live)
    with reading(path / STATE_FILE):
        unflatten(live.optimizer, training, meta.optimizer)
        live.adaptation.load_state_dict(adaptation)
        if rank < len(meta.randomness):
            live.set_randomness(meta.randomness[rank])
    own = live.model.state_dict()
    load_into(live.model, {name: dtensor.as_in(weights[name], own[name]) for name in own})
    return path / STATE_FILE, meta.record, best


@dataclass(frozen=True, kw_only=True)
class _Meta:
    """The contents of a `state.json`.

    Attributes:
        facts: what the run that saved it was.
        hashes: hashes of the files beside it.
        optimizer, adaptation: their plain values.
        record: what `save_checkpoint` was given.
        randomness: `LiveRun.randomness()` of each rank.
    """

    facts: Facts
    hashes: dict[str, str]
    optimizer: dict[str, Any]
    adaptation: dict[str, Any]
    record: dict[str, Any]
    randomness: list[dict[str, Any]]

    def randomness_of(self, rank: int) -> dict[str, Any]:
        """The randomness of a rank, or of the last one if the run had fewer."""
        return self.randomness[min(rank, len(self.randomness) - 1)]


def _read_state(path: Path, steps: int) -> _Meta:
    """Read the `state.json` of a checkpoint of a run of this many steps."""
    meta = read_sealed(path / STATE_FILE, FORMAT)
    with reading(path / STATE_FILE):
        step = meta["step"]
        if not (type(step) is int and 1 <= step <= steps and path.name == checkpoint_name(step)):
            raise ValueError(f"step {step!r} of {steps}, in {path.name}")
        return _Meta(
            facts=Facts(**{field.name: meta[field.name] for field in fields(Facts)}),
            hashes=dict(meta["files"]),
            optimizer=meta["optimizer"],
            adaptation=dict(meta[ADAPTATION]),
            record=meta["record"],
            randomness=[meta, *meta.get(OTHERS, ())],
        )


def _take_adaptation(
    path: Path, meta: _Meta, training: dict[str, Tensor], own: dict[str, Any]
) -> dict[str, Any]:
    """The state of the adaptation; its tensors are taken out of `training`."""
    _, tensors = split_state(own, ADAPTATION)
    _check_tensors(path / TRAINING_FILE, training, tensors)
    with reading(path / STATE_FILE):
        adaptation = joined_state(meta.adaptation, training, own, ADAPTATION)
        check_state(adaptation, own)
    for name in tensors:
        del training[name]
    return adaptation


def _check_run(path: Path, before: Facts, now: Facts) -> None:
    if before.run != now.run:
        raise ValueError(
            f"{path} is of another run ({before.run}) than the folder around it ({now.run})"
        )
    with reading(path / STATE_FILE):
        options = {k: v for k, v in before.options.items() if now.options.get(k, v) != v}
    if options:
        raise ValueError(f"{path} is of a run with other options: {options}")


def _check_generators(path: Path, randomness: dict[str, Any], live: LiveRun) -> None:
    with reading(path / STATE_FILE):
        names = sorted(randomness["generators"])
    own = sorted(live.generators)
    if names != own:
        raise ValueError(
            f"{path} is of another job: the data, transform and network held the generators "
            f"{some(names) or 'none'}, here {some(own) or 'none'}"
        )


def _check_job(path: Path, before: Facts, now: Facts) -> None:
    with reading(path / STATE_FILE):
        # Another version may have written names that are unknown here.
        jobs = [(k, v) for k, v in before.job.items() if now.job.get(k, v) != v]
        environment = [
            f"{name} {value}, here {now.environment[name]}"
            for name, value in before.environment.items()
            if now.environment.get(name, value) != value
        ]
    for name, value in jobs:
        hint = HINTS.get(name, "")
        own = now.job[name]
        raise ValueError(f"{path} is of another job: {name} {value!r}, here {own!r}{hint}")
    if environment:
        warn(
            f"resume: the run was saved with {'; '.join(environment)}: it may end in other weights "
            "than one that was not interrupted",
        )


def _check_files(path: Path, hashes: dict[str, str], model: nn.Module) -> None:
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    for name in (MODEL_FILE, TRAINING_FILE):
        if not (path / name).is_file():
            raise ValueError(f"{path / name} is missing")
        if (path / name).stat().st_size > MOST_COPIES * size + MOST_HEADER:
            raise ValueError(f"{path / name} is larger than a checkpoint of this model can be")
        if file_hash(path / name) != hashes.get(name):
            raise ValueError(
                f"{path / name} is damaged, or was not saved together with the {STATE_FILE} beside "
                f"it: its hash is another. Delete {path}, and the run starts from the beginning"
            )


def _check_tensors(file: Path, tensors: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Raise ValueError where `tensors` lacks a tensor of `own`, or has it in another form."""
    for name, value in own.items():
        if name not in tensors:
            raise ValueError(f"{file} lacks {name}")
        there = tensors[name]
        if (there.shape, there.dtype) != (value.shape, value.dtype):
            raise ValueError(
                f"{file}: {name} is {list(there.shape)} {there.dtype}, and must be "
                f"{list(value.shape)} {value.dtype}"
            )


def _check_same_optimizer(optimizer: Optimizer, record: dict[str, Any], path: Path) -> None:
    with reading(path / STATE_FILE):
        before = [len(group["params"]) for group in record["groups"]]
    sizes = [len(g["params"]) for g in optimizer.param_groups]
    if sizes != before:
        raise ValueError(
            f"{path} was saved with {before} trained parameters per group, the model has {sizes}: "
            "freeze the same layers"
        )


def _check_same_model(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    own = model.state_dict()
    wrong = [k for k in own if k not in weights] + [k for k in weights if k not in own]
    kinds = {k: (v.shape, v.dtype) for k, v in weights.items()}
    wrong += [k for k, v in own.items() if kinds.get(k, (v.shape, v.dtype)) != (v.shape, v.dtype)]
    if wrong:
        raise ValueError(
            f"{path} is a checkpoint of another model: {len(wrong)} entries differ, "
            f"first {', '.join(wrong[:3])}"
        )
