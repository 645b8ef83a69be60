"""FAST: fine-tune a pretrained classifier fast, and keep what it knew (arXiv 2007.01388)."""

from fast.heads import fold_head, replace_head, source_task
from fast.optim import SGD, AdamW
from fast.optim.param_groups import param_groups
from fast.train.result import Result
from fast.train.trainer import finetune

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "AdamW",
    "Result",
    "finetune",
    "fold_head",
    "param_groups",
    "replace_head",
    "source_task",
]
