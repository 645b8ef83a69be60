"""The files in the folder of a run, and the manifest that ties those of its result together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fast.files import (
    JOB_FILE,
    atomic_file,
    file_hash,
    read_json_if_there,
    read_sealed,
    reading,
    write_sealed,
)

MODEL_FILE = "model.safetensors"
# The weights in a folder of a run, or of transformers.
WEIGHT_FILES = (MODEL_FILE, "pytorch_model.bin")
SOURCE_HEAD_FILE = "source_head.safetensors"
SOURCE_NORMS_FILE = "source_norms.safetensors"
ADAPTERS_FILE = "adapters.safetensors"
MANIFEST_FILE = "manifest.json"
JOIN_FILE = "join.json"  # what a joined network is beside its tensors
RESULT_FILE = "result.json"
HISTORY_FILE = "history.jsonl"
DATA_FILE = "data.json"  # what was read: classes, samples and how pictures were prepared
OPTIONS_FILE = "fast.json"
# transformers keeps the architecture of its networks in this file; older versions of FAST wrote the
# options to it.
CONFIG_FILE = "config.json"
# A folder of ours has one of these beside the weights, even where the result is not complete.
BESIDE_WEIGHTS = (SOURCE_HEAD_FILE, OPTIONS_FILE, RESULT_FILE, JOIN_FILE, JOB_FILE)
NO_RESULT = "not a folder of Result.save or fast finetune"
FORMAT = 1
# The files of a result, some of them optional. Checkpoints and pictures are not among them.
FILES = (
    MODEL_FILE, SOURCE_HEAD_FILE, SOURCE_NORMS_FILE, ADAPTERS_FILE, OPTIONS_FILE, CONFIG_FILE,
    JOIN_FILE, RESULT_FILE, HISTORY_FILE, JOB_FILE, DATA_FILE, "preprocessing.json",
    "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json",
)  # fmt: skip
CHECKPOINT = "checkpoint-"
STATE_FILE = "state.json"  # a checkpoint without it is not complete


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, the oldest first."""
    folders = folder.glob(f"{CHECKPOINT}*")
    return sorted(path for path in folders if (path / STATE_FILE).is_file())


def checkpoint_name(step: int) -> str:
    """The name of the folder of the checkpoint after this step, such as `checkpoint-00000150`."""
    return f"{CHECKPOINT}{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved."""
    return int(checkpoint.name.removeprefix(CHECKPOINT))


def options_file(folder: Path) -> Path:
    """The file with a run's options; older versions of FAST wrote them to `config.json`."""
    old = folder / CONFIG_FILE
    if not (folder / OPTIONS_FILE).is_file() and old.is_file() and not is_library_config(old):
        return old
    return folder / OPTIONS_FILE


def read_options(folder: Path) -> dict[str, Any]:
    """The options of a run; they are empty where there is no such file."""
    return read_json_if_there(options_file(folder))


def is_library_config(file: Path) -> bool:
    """Whether a `config.json` is a transformers configuration."""
    return "model_type" in read_json_if_there(file)


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
        raise FileNotFoundError(f"{folder} has no {MODEL_FILE}: {NO_RESULT}")
    if not any((folder / name).is_file() for name in (MANIFEST_FILE, *BESIDE_WEIGHTS)):
        raise FileNotFoundError(
            f"{folder} has weights alone: {NO_RESULT}. What fast export wrote, or transformers or "
            "timm (save_model), is read by the library that it is for"
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
