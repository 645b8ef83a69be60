"""Networks by name: `timm:`, `torchvision:`, `transformers:NAME`, or `file.py:Factory(args)`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fast.data.images.pixels import BGR
from fast.data.images.preprocessing import Preprocessing, declared
from fast.models.libraries import load_library
from fast.models.model_file import network_from_file
from fast.models.spec import LIBRARIES, parse_spec
from fast.models.weights import load_weights


@dataclass
class LoadedModel:
    """A network with what is known about its input.

    says: how the images were prepared that it was trained on, as far as the network says.
    tokenizer: of a text network from transformers.
    notes: what a reader of the run should know, one line each.
    """

    model: nn.Module
    says: Preprocessing = field(default_factory=Preprocessing)
    tokenizer: Any = None
    notes: list[str] = field(default_factory=list)

    @property
    def size(self) -> int | None:
        return self.says.size

    @property
    def mean(self) -> tuple[float, ...] | None:
        return self.says.mean

    @property
    def std(self) -> tuple[float, ...] | None:
        return self.says.std

    @property
    def channels(self) -> int | str | None:
        """Image channels: those of the first convolution; None without one, or not 1 or 3.

        "BGR" where the network takes blue first.
        """
        if self.says.bgr:
            return BGR
        for module in self.model.modules():
            if isinstance(module, nn.Conv2d):
                return module.in_channels if module.in_channels in (1, 3) else None
        return None


def load_model(
    spec: str,
    weights: str | Path | None = None,
    *,
    allow_missing: bool = False,
    pretrained: bool = True,
) -> LoadedModel:
    """Build the network that `spec` names, on the CPU, and load `weights` into it.

    Without `weights` a library's network comes with its pretrained ones (`pretrained=False`: with
    none), and a factory's as the factory returns it. Arguments in brackets are Python literals:
    `timm:resnet18(num_classes=10)`. Weights in half precision become float32, to be trained.

    Raises:
        ValueError: the spec cannot be read, or the weights do not fit.
        FileNotFoundError: no such file.
        ImportError: the library is not installed, or the file cannot be imported.
    """
    where, name, args, kwargs = parse_spec(spec)
    pretrained = pretrained and weights is None
    if where in LIBRARIES:
        model, says, tokenizer, notes = load_library(where, name, pretrained, args, kwargs)
        loaded = LoadedModel(model, says, tokenizer, notes)
    else:
        model = network_from_file(Path(where).expanduser(), name, args, kwargs)
        loaded = LoadedModel(model, declared(model))
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
