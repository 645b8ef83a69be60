"""Undo forgetting: the best network between two checkpoints that keeps a budget."""

from fast.train.rewind.between import rewind

__all__ = ["rewind"]
