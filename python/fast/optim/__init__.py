"""Optimizers whose step also pulls to the pretrained weights, clips and measures, in one pass."""

from .adamw import AdamW
from .sgd import SGD

__all__ = ["SGD", "AdamW"]
