"""Build the network of a saved run again, without its weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from fast.errors import first_line, import_library, printable
from fast.files import JOB_FILE, read_json, read_json_if_there
from fast.heads import fold_head
from fast.models.libraries import quiet
from fast.models.load import LIBRARIES, load_model
from fast.models.loaded import LoadedModel
from fast.models.saved import CONFIG_FILE, is_library_config


def rebuilt(folder: Path, facts: dict[str, Any], model: nn.Module | str | None) -> LoadedModel:
    """The plain architecture of a run, with any weights.

    A network of timm, torchvision or transformers is built by its name, or by its `config.json`.
    The code of a Python file is only run when `model` names it.

    Args:
        folder: the folder of the run.
        facts: what result.json says of the network; it is empty where an older version wrote it.
        model: the network, or its name, as --model takes it.

    Raises:
        ValueError: nothing says how the network is built; the message says what to pass.
        ImportError: the library of the network is not installed.
    """
    if isinstance(model, nn.Module):
        return LoadedModel(model=fold_head(model))  # it may have been adapted, or loaded before
    if isinstance(model, str):
        return load_model(model, pretrained=False)
    if is_library_config(folder / CONFIG_FILE):
        return LoadedModel(model=_by_config(folder))
    name = facts.get("name") or _name_in_job(folder)
    if name is None:
        kind = printable(str(facts.get("class", "network")).rpartition(".")[2])
        raise ValueError(
            f"{folder}: its network, a {kind}, was given as an object: build it as for the run, "
            "with any weights, and pass it: fast.load(folder, model=...) (on the command line "
            "--model FILE.py:FACTORY)"
        )
    if name.partition(":")[0] not in LIBRARIES:
        raise ValueError(
            f"{folder}: its network is code: look at it, and name it: model='{printable(name)}' "
            f"(on the command line --model '{printable(name)}')"
        )
    with warnings.catch_warnings():  # about initial weights, which are replaced
        warnings.simplefilter("ignore", FutureWarning)
        return load_model(name, pretrained=False)


def _name_in_job(folder: Path) -> str | None:
    name = read_json_if_there(folder / JOB_FILE).get("model")
    return name if isinstance(name, str) else None


def _by_config(folder: Path) -> nn.Module:
    transformers = import_library("transformers", f"{folder} needs")
    names = read_json(folder / CONFIG_FILE).get("architectures") or [""]
    kind = getattr(transformers, str(names[0]), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(
            f"{folder / CONFIG_FILE}: transformers {transformers.__version__} has no "
            f"{printable(names[0])}: build the network, and pass model="
        )
    try:
        with quiet(transformers):
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
            return kind(config)
    except Exception as error:  # whatever a configuration that was changed leads to
        raise ValueError(f"{folder / CONFIG_FILE}: {printable(first_line(error))}") from error
