"""The source card: which weights the source task needs."""

from fast.curvature.card.card import SourceCard

__all__ = ["SourceCard"]
