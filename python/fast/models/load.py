"""Load a network by `timm:`, `torchvision:` or `transformers:NAME`, or `file.py:Factory(args)`."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import torch

from fast.data.images.preprocessing import declared
from fast.models.libraries import load_library
from fast.models.loaded import LoadedModel
from fast.models.model_file import network_from_file
from fast.models.weights import load_weights

LIBRARIES = ("timm", "torchvision", "transformers")
_LIBRARY_NETWORK = re.compile(r"([^()]+?)\s*(?:\((.*)\))?", re.DOTALL)
# Paths may have brackets, colons and spaces: `C:\\nets (1).py:Net(20)`.
_FILE_NETWORK = re.compile(r"(.+\.py):\s*(\w+)\s*(?:\((.*)\))?", re.DOTALL)


def load_model(
    spec: str,
    weights: str | Path | None = None,
    *,
    allow_missing: bool = False,
    pretrained: bool = True,
) -> LoadedModel:
    """Build the network that `spec` names, on the CPU, and load `weights` into it.

    Arguments in brackets are Python literals: `timm:resnet18(num_classes=10)`. Weights in half
    precision become float32, because they are to be trained. What is drawn at random, as a head
    that no checkpoint holds, is the same in each call, so that a resumed run begins with it again.

    Args:
        spec: the name of the network.
        weights: a file of weights. With None a library's network has its pretrained weights, and a
            factory's network stays as the factory returns it.
        allow_missing: let weights that the file lacks stay as they are.
        pretrained: with False a library's network has random weights.

    Raises:
        ValueError: the spec cannot be read, or the weights do not fit.
        FileNotFoundError: there is no such file.
        ImportError: the library is not installed, or the file cannot be imported.
    """
    where, name, args, kwargs = parse_spec(spec)
    pretrained = pretrained and weights is None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if where in LIBRARIES:
            result = load_library(where, name, pretrained, args, kwargs)
        else:
            model = network_from_file(Path(where).expanduser(), name, args, kwargs)
            result = LoadedModel(model=model, preprocessing=declared(model))
            if pretrained:
                result.notes.append(f"no --weights: the network is used as {name}() returns it")
    if weights is not None:
        result.notes += load_weights(
            result.model, weights, allow_missing=allow_missing, missing=result.missing
        )
    half = {p.dtype for p in result.model.parameters()} & {torch.float16, torch.bfloat16}
    if half:
        dtypes = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in half))
        result.notes.append(f"weights in {dtypes} are trained in float32")
        result.model.float()
    return result


def parse_spec(spec: str) -> tuple[str, str, list[Any], dict[str, Any]]:
    """Read `"where:name(1, k=2)"` as `(where, name, [1], {"k": 2})`; only literals are evaluated.

    `hf-hub:OWNER/NAME` is timm's name for a network on the hub, with or without `timm:` before it.

    Raises:
        ValueError: the spec names no network.
    """
    where, _, rest = spec.strip().partition(":")
    if where in ("hf-hub", "hf_hub"):
        where, rest = "timm", spec.strip()
    if where in LIBRARIES:
        if where == "transformers" and Path(rest).expanduser().is_dir():
            return where, rest, [], {}  # a folder's name may have brackets
        match = _LIBRARY_NETWORK.fullmatch(rest.strip())
        parts = (where, match[1], match[2]) if match else None
    else:
        match = _FILE_NETWORK.fullmatch(spec.strip())
        parts = (match[1], match[2], match[3]) if match else None
    if parts is None:
        raise ValueError(
            f"model {spec!r}: must be timm:NAME, torchvision:NAME, transformers:NAME or "
            f"path/file.py:Factory(args){_of_folder(spec)}"
        )
    where, name, arguments = parts
    return where, name, *_literals(spec, arguments or "")


def _of_folder(spec: str) -> str:
    """What to do with a folder that is given as a network; nothing for any other spec."""
    folder = Path(spec.strip()).expanduser()
    if not folder.is_dir():
        return ""
    if (folder / "config.json").is_file():
        return f". The folder of a network of transformers is transformers:{spec}"
    weights = folder / "model.safetensors"
    if not weights.is_file():
        return ". It is a folder"
    return (
        ". It is the folder of a run: name the network of the run, with its classes, as in "
        f"(num_classes=3), and --weights {weights}"
    )


def _literals(spec: str, arguments: str) -> tuple[list[Any], dict[str, Any]]:
    try:
        call = ast.parse(f"f({arguments})", mode="eval").body
        if not isinstance(call, ast.Call) or any(k.arg is None for k in call.keywords):
            raise ValueError("not a plain argument list")
        args = [ast.literal_eval(a) for a in call.args]
        return args, {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, RecursionError, MemoryError) as err:
        raise ValueError(
            f"model {spec!r}: arguments must be literals such as (20, width=0.5, name='a'); "
            f"got ({arguments})"
        ) from err
