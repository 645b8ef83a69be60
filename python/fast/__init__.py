"""FAST: fine-tune a pretrained classifier fast, and keep what it knew (arXiv 2007.01388)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fast.version import __version__ as __version__

if TYPE_CHECKING:
    from fast import curvature as curvature
    from fast import heads as heads
    from fast import optim as optim
    from fast.adapt.adaptation import Adaptation
    from fast.adapt.network.synthetic import synthetic_inputs
    from fast.adapt.result import Result
    from fast.analysis.landscape import PathRecorder, landscape
    from fast.curvature.card import SourceCard
    from fast.curvature.operators.hessian import GGN, Fisher, Hessian
    from fast.deploy.load import load
    from fast.heads import fold_head, replace_head, source_task
    from fast.merge.join import join
    from fast.optim import SGD, AdamW
    from fast.optim.param_groups import param_groups
    from fast.train.finetune import finetune
    from fast.train.rewind.between import rewind


__all__ = [
    "GGN",
    "SGD",
    "AdamW",
    "Adaptation",
    "Fisher",
    "Hessian",
    "PathRecorder",
    "Result",
    "SourceCard",
    "finetune",
    "fold_head",
    "join",
    "landscape",
    "load",
    "param_groups",
    "replace_head",
    "rewind",
    "source_task",
    "synthetic_inputs",
]

# Loaded on first use: `fast --help` answers in 0.1 s, importing torch takes 2.
_HOME = {
    "GGN": "fast.curvature",
    "SGD": "fast.optim",
    "AdamW": "fast.optim",
    "Adaptation": "fast.adapt.adaptation",
    "Fisher": "fast.curvature",
    "Hessian": "fast.curvature",
    "PathRecorder": "fast.analysis.landscape",
    "Result": "fast.adapt.result",
    "SourceCard": "fast.curvature.card",
    "finetune": "fast.train.finetune",
    "fold_head": "fast.heads",
    "join": "fast.merge.join",
    "landscape": "fast.analysis.landscape",
    "load": "fast.deploy.load",
    "param_groups": "fast.optim.param_groups",
    "replace_head": "fast.heads",
    "rewind": "fast.train.rewind",
    "source_task": "fast.heads",
    "synthetic_inputs": "fast.adapt.network.synthetic",
}
# `fast.curvature.audit` and the like need no import of their own.
_PACKAGES = ("curvature", "heads", "optim")


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"fast.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
