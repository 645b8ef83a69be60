"""Optimizers whose step also pulls to the pretrained weights, clips and measures, in one pass."""

from fast.optim.adamw import AdamW
from fast.optim.sgd import SGD
from fast.optim.unfused import UnfusedPull

__all__ = ["SGD", "AdamW", "UnfusedPull"]
