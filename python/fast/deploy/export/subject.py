"""What every format of an export needs: a plain network, and what is said beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fast.data.trees import leaves
from fast.files import write_json
from fast.heads.forward import call, forward_logits, logits_of
from fast.merge.joined import Joined
from fast.models.preparation import PREPARATION_FILE, Preparation
from fast.models.saved.description import is_timm, is_transformers

# Logits may differ from the network's by this share of the largest, because other programs sum in
# another order.
TOLERANCE = 1e-3
# Formats that belong to a library.
LIBRARIES = {"hf": "transformers", "timm": "timm"}


@dataclass(kw_only=True)
class Subject:
    """A network that is exported, with all that a format says of it.

    Attributes:
        network: the plain network, in evaluation mode, on the CPU.
        classes: names of its classes.
        preparation: what pictures, sounds and texts go through on their way to it.
        sample: a batch of inputs in the form that it takes.
        head: name of the layer that makes the logits, or None.
        spec: the name that the network was loaded by, or None.
        facts: accuracies and the method of the run.
        odds: how the weights differ from the plain architecture.
        notes: what a reader should know; the writers of formats add to it.
        any_batch: whether the exported program takes batches of any size.
        any_length: whether it takes sequences of any length.
    """

    network: nn.Module
    classes: list[str]
    preparation: Preparation
    sample: Any
    head: str | None = None
    spec: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    odds: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    any_batch: bool = True
    any_length: bool = True

    def logits(self, inputs: Any) -> Tensor:
        """The network's own logits `[B, C]`, in float32."""
        with torch.no_grad():
            return forward_logits(self.network, inputs).float()

    def check_library(self, format: str) -> None:
        """Raise ValueError where the format is that of a library that lacks the network; the
        message names the formats that fit."""
        network = self.network
        if format == _own_format(network):
            return
        fitting = ["onnx", "torch.export"]
        if not isinstance(network, Joined):
            fitting += filter(None, ["safetensors", _own_format(network)])
        raise ValueError(
            f"format {format!r} is for networks of {LIBRARIES[format]}, and this is a "
            f"{type(network).__name__}: use {', '.join(fitting[:-1])} or {fitting[-1]}"
        )

    def write_description(self, folder: Path) -> None:
        """Write `preprocessing.json`, which says what the inputs go through and what the outputs
        are, and the tokenizer or feature extractor beside it."""
        self.preparation.save_parts(folder)
        inputs = {
            name: {"shape": self.shape_of(x), "dtype": str(x.dtype).removeprefix("torch.")}
            for name, x in zip(self.input_names, self.tensors(), strict=True)
        }
        count = self.shape_of(self.tensors()[0])[0]
        outputs = {"logits": {"shape": [count, len(self.classes)], "classes": self.classes}}
        write_json(
            folder / PREPARATION_FILE,
            {
                **self.preparation.facts(),
                "inputs": inputs,
                "outputs": outputs,
                "after": "The softmax of the logits gives the probabilities of the classes.",
                "notes": self.notes,
            },
        )

    def tensors(self) -> list[Tensor]:
        """The sample as one tensor for each input."""
        return leaves(self.sample)

    def has_length(self, x: Tensor) -> bool:
        """Whether an input is `[batch, length]` with a length that varies: tokens, or sounds that a
        feature extractor has prepared."""
        sounds = self.preparation.sounds
        heard = sounds is not None and sounds.extractor is not None
        return self.any_length and x.dim() == 2 and (heard or not x.is_floating_point())

    def shape_of(self, x: Tensor) -> list[int | str]:
        """The shape of an input, with `"batch"` and `"length"` where these may vary."""
        sizes: list[int | str] = list(x.shape)
        if self.any_batch:
            sizes[0] = "batch"
        if self.has_length(x):
            sizes[1] = "length"
        return sizes

    @property
    def input_names(self) -> list[str]:
        """The name of each input."""
        if isinstance(self.sample, Mapping):
            return [str(name) for name in self.sample]
        count = len(self.tensors())
        return ["input"] if count == 1 else [f"input_{i}" for i in range(count)]

    def check(self, answers: Tensor, inputs: Any, what: str) -> None:
        """Compare the answers of what was written with the network's own.

        Args:
            what: the file or folder that was written, for the message.

        Raises:
            ValueError: the answers differ by more than rounding.
        """
        own = self.logits(inputs)
        apart = float((answers.detach().float() - own).abs().max())
        if not apart <= TOLERANCE * max(1.0, float(own.abs().max())):
            raise ValueError(
                f"{what} answers otherwise than the network (logits differ by {apart:.2g}); "
                "nothing was written"
            )


class LogitsOnly(nn.Module):
    """A network that takes each input as an argument of its own and returns the logits alone."""

    def __init__(self, network: nn.Module, sample: Any) -> None:
        super().__init__()
        self.network = network
        self.names = list(sample) if isinstance(sample, Mapping) else None
        self.several = isinstance(sample, (tuple, list))

    def forward(self, *inputs: Tensor) -> Tensor:
        if self.names is not None:
            return logits_of(call(self.network, dict(zip(self.names, inputs, strict=True))))
        return logits_of(call(self.network, inputs if self.several else inputs[0]))


def _own_format(network: nn.Module) -> str | None:
    """The format of the library that the network is of."""
    if is_transformers(network):
        return "hf"
    built_again = is_timm(network) and getattr(network, "pretrained_cfg", None) is not None
    return "timm" if built_again else None
