"""A network that was loaded by its name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fast.data.images.format import BGR
from fast.data.images.preprocessing import Preprocessing


@dataclass(kw_only=True)
class LoadedModel:
    """A network with what is known about its inputs.

    Attributes:
        preprocessing: how the images that it was trained on were prepared, as far as it says so.
        tokenizer: the tokenizer of a transformers network for texts.
        extractor: the feature extractor of a transformers network for sounds.
        missing: names of the tensors that its checkpoint lacks, which are as they were built.
        notes: what a reader of the run should know, one line each.
    """

    model: nn.Module
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    tokenizer: Any = None
    extractor: Any = None
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def channels(self) -> int | str | None:
        """The number of input channels of the first convolution, if it is 1 or 3; "BGR" if the
        network takes blue first; None if neither is known.
        """
        if self.preprocessing.bgr:
            return BGR
        for module in self.model.modules():
            if isinstance(module, nn.Conv2d):
                return module.in_channels if module.in_channels in (1, 3) else None
        return None
