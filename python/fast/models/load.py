"""Networks by name: `timm:`, `torchvision:`, `transformers:NAME`, or `file.py:Factory(args)`."""

from __future__ import annotations

from pathlib import Path

import torch

from fast.data.images.preprocessing import declared
from fast.models.libraries import load_library
from fast.models.loaded import LoadedModel
from fast.models.model_file import network_from_file
from fast.models.spec import LIBRARIES, parse_spec
from fast.models.weights import load_weights


def load_model(
    spec: str,
    weights: str | Path | None = None,
    *,
    allow_missing: bool = False,
    pretrained: bool = True,
) -> LoadedModel:
    """Build the network that `spec` names, on the CPU, and load `weights` into it.

    Without `weights` a library's network has its pretrained ones (`pretrained=False`: random ones),
    and a factory's network stays as the factory returns it. Arguments in brackets are Python
    literals: `timm:resnet18(num_classes=10)`. Weights in half precision become float32, to be
    trained.

    Raises:
        ValueError: the spec cannot be read, or the weights do not fit.
        FileNotFoundError: there is no such file.
        ImportError: the library is not installed, or the file cannot be imported.
    """
    where, name, args, kwargs = parse_spec(spec)
    pretrained = pretrained and weights is None
    if where in LIBRARIES:
        loaded = load_library(where, name, pretrained, args, kwargs)
    else:
        model = network_from_file(Path(where).expanduser(), name, args, kwargs)
        loaded = LoadedModel(model=model, preprocessing=declared(model))
        if pretrained:
            loaded.notes.append(f"no --weights: the network is used as {name}() returns it")
    if weights is not None:
        loaded.notes += load_weights(loaded.model, weights, allow_missing=allow_missing)
    half = {p.dtype for p in loaded.model.parameters()} & {torch.float16, torch.bfloat16}
    if half:
        stored = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in half))
        loaded.notes.append(f"weights in {stored} are trained in float32")
        loaded.model.float()
    return loaded
