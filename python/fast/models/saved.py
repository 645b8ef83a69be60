"""Read the networks in a folder that `Result.save` (or `fast finetune --output`) wrote."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fast.files import (
    atomic_file,
    file_hash,
    read_json,
    read_sealed,
    reading,
    write_sealed,
)
from fast.heads.find import Head, HeadLayer, classes_of, find_head, layer_like
from fast.heads.replace import announce_classes
from fast.tensor_files import load_tensors

MODEL_FILE = "model.safetensors"
SOURCE_HEAD_FILE = "source_head.safetensors"
SOURCE_NORMS_FILE = "source_norms.safetensors"
ADAPTERS_FILE = "adapters.safetensors"
MANIFEST_FILE = "manifest.json"
JOIN_FILE = "join.json"  # what `fast.merge.joined` knows beside the tensors
OPTIONS_FILE = "fast.json"
# transformers keeps the architecture of its networks in this file; older versions of FAST wrote the
# options to it.
CONFIG_FILE = "config.json"
FORMAT = 1
# The files of a result, some of them optional. Checkpoints and pictures are not among them.
FILES = (
    MODEL_FILE, SOURCE_HEAD_FILE, SOURCE_NORMS_FILE, ADAPTERS_FILE, OPTIONS_FILE, CONFIG_FILE,
    JOIN_FILE, "result.json", "history.jsonl", "job.json", "data.json", "preprocessing.json",
    "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json",
)  # fmt: skip


@dataclass(kw_only=True)
class SavedNetworks:
    """Plain networks with the adapted weights.

    Attributes:
        target: answers the new task.
        source: has the old head, and answers the old task; None if the folder lacks what it needs.
        note: says what the folder lacks.
    """

    target: nn.Module
    source: nn.Module | None
    note: str = ""


def load_saved(
    folder: str | Path, model: nn.Module, sample: Any = None, *, head: str | None = None
) -> SavedNetworks:
    """Read the networks of a saved run.

    Args:
        folder: has `model.safetensors`; for the source network also `source_head.safetensors`, and
            `source_norms.safetensors` if each task had its own batch norms, and
            `adapters.safetensors` if adapters learned the target.
        model: the plain architecture, with a head for any number of classes; it becomes the target
            network.
        sample: a batch of inputs, by which the head is found.
        head: name of the head; None to find it.

    Raises:
        FileNotFoundError: the folder has no `model.safetensors`.
        ValueError: a file is damaged or belongs to another result; or the weights are those of
            another network, and the message names the first that differ.
    """
    folder = Path(folder)
    check_manifest(folder)
    layer = find_head(model, sample, head)
    load_target(folder, model, layer)
    note = lacks_source(folder)
    if note:
        return SavedNetworks(target=model, source=None, note=note)
    source = copy.deepcopy(model)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    for own in (folder / SOURCE_NORMS_FILE, folder / ADAPTERS_FILE):
        if own.is_file():
            tensors = {n: t for n, t in load_tensors(own).items() if not n.endswith((".A", ".B"))}
            odd = [n for n, t in tensors.items() if shapes.get(n) != t.shape]
            if odd:
                raise ValueError(f"{own} is of another network: it has {odd[0]}")
            source.load_state_dict(tensors, strict=False)
    old = find_head(source, name=layer.name)
    own_layer = source_layer_in(folder, old)
    old.put(own_layer)
    announce_classes(source, classes_of(own_layer))
    return SavedNetworks(target=model, source=source)


def load_target(folder: Path, model: nn.Module, head: Head) -> HeadLayer:
    """Make `model` the plain target network; returns its head, which replaces `head`.

    Raises:
        ValueError: the weights are those of another network.
    """
    file = folder / MODEL_FILE
    state = load_tensors(file)
    _take_dtypes(model, state)
    layer = _layer_of(head, state, f"{head.name}.", file)
    head.put(layer)
    announce_classes(model, classes_of(layer))
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    wrong = [n for n in shapes if n not in state and not n.endswith("num_batches_tracked")]
    wrong += [n for n in state if shapes.get(n) != state[n].shape]
    if wrong:
        raise ValueError(
            f"{file} is of another network: {len(wrong)} tensors differ, first "
            f"{', '.join(wrong[:3])}"
        )
    model.load_state_dict(state, strict=False)
    return layer


def lacks_source(folder: Path) -> str:
    """What the folder lacks for the source task; empty if it has everything."""
    if not (folder / SOURCE_HEAD_FILE).is_file():
        return f"{folder} has no {SOURCE_HEAD_FILE}"
    record = folder / "result.json"
    plan = (read_json(record).get("plan") if record.is_file() else None) or {}
    if plan.get("adapter_rank") and not (folder / ADAPTERS_FILE).is_file():
        return f"{folder}: the source's weights are below the adapters, which are not in the folder"
    per_task = read_options(folder).get("batch_norm") == "per_task"
    if per_task and not (folder / SOURCE_NORMS_FILE).is_file():
        why = "the source's batch norm statistics were kept per task, and are not in the folder"
        return f"{folder}: {why}"
    return ""


def source_norms_in(folder: Path) -> dict[str, Tensor]:
    """The state of the source's batch norms; empty if both tasks share their batch norms."""
    file = folder / SOURCE_NORMS_FILE
    return load_tensors(file) if file.is_file() else {}


def source_layer_in(folder: Path, head: Head) -> HeadLayer:
    """The source's head, made like `head`."""
    file = folder / SOURCE_HEAD_FILE
    weights = load_tensors(file)
    layer = _layer_of(head, weights, "", file)
    layer.load_state_dict(weights)
    return layer


def _take_dtypes(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Give the tensors of `model` the dtypes they were saved in, so that loading rounds nothing."""
    for module_name, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for name, value in tensors.items():
                saved = state.get(f"{module_name}.{name}" if module_name else name)
                if value is None or saved is None or not value.is_floating_point():
                    continue
                if saved.is_floating_point() and saved.dtype != value.dtype:
                    value.data = value.data.to(saved.dtype)


def _layer_of(head: Head, state: dict[str, Tensor], prefix: str, file: Path) -> HeadLayer:
    """A layer like `head`, of the shape that `state` has."""
    weight = state.get(f"{prefix}weight")
    shape = head.module.weight.shape
    if weight is None or weight.shape[1:] != shape[1:]:
        there = "nothing" if weight is None else list(weight.shape)
        raise ValueError(
            f"{file} does not fit the head {head.name} {list(shape)}: it has {there} there"
        )
    return layer_like(head.module, weight.shape[0], bias=f"{prefix}bias" in state)


def options_file(folder: Path) -> Path:
    """The file with a run's options; older versions of FAST wrote them to `config.json`."""
    old = folder / CONFIG_FILE
    if not (folder / OPTIONS_FILE).is_file() and old.is_file() and not is_library_config(old):
        return old
    return folder / OPTIONS_FILE


def read_options(folder: Path) -> dict[str, Any]:
    """The options of a run; empty where there are none."""
    file = options_file(folder)
    return read_json(file) if file.is_file() else {}


def is_library_config(file: Path) -> bool:
    """Whether a `config.json` is a transformers configuration."""
    return file.is_file() and "model_type" in read_json(file)


def write_manifest(folder: Path, run: str | None, options: dict[str, Any]) -> None:
    """Tie the files of a result together: write their hashes into a file with its own checksum.

    Args:
        run: id of the run that wrote them.
        options: the options that decided what was computed.
    """
    files = {name: file_hash(folder / name) for name in FILES if (folder / name).is_file()}
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    facts = {"format": FORMAT, "run": run, "options": options, "files": files}
    with atomic_file(folder / MANIFEST_FILE) as path:
        write_sealed(path, facts)


def check_manifest(folder: Path) -> None:
    """Compare the files of a result with the hashes in its manifest; files may have been removed.

    Raises:
        FileNotFoundError: the folder holds no result.
        ValueError: a file is damaged, or was not saved together with the others.
    """
    if not folder.is_dir():
        what = "is a file, and a run is a folder" if folder.exists() else "no such folder"
        raise FileNotFoundError(f"{folder}: {what}")
    if not (folder / MODEL_FILE).is_file():
        raise FileNotFoundError(
            f"{folder} has no {MODEL_FILE}: not a folder of Result.save or fast finetune"
        )
    if not (folder / MANIFEST_FILE).is_file():
        raise FileNotFoundError(
            f"{folder} has no {MANIFEST_FILE}: its result was not written to the end; save it "
            f"again (fast finetune --resume {folder}, where that made it)"
        )
    path = folder / MANIFEST_FILE
    manifest = read_sealed(path, FORMAT)
    with reading(path):
        hashes = dict(manifest["files"])
    for name in FILES:
        if (folder / name).is_file() and file_hash(folder / name) != hashes.get(name):
            raise ValueError(
                f"{folder / name} is damaged, or was not saved together with {MANIFEST_FILE}: its "
                "hash is another"
            )
