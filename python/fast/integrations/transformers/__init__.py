"""The whole method inside Hugging Face's Trainer: `FastTrainer`, and `FastCallback` for a part."""

from fast.integrations.transformers.callback import FastCallback
from fast.integrations.transformers.trainer import FastTrainer

__all__ = ["FastCallback", "FastTrainer"]
