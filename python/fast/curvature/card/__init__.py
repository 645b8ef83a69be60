"""The source card: which weights the source task needs."""

from fast.curvature.card.card import SourceCard
from fast.curvature.card.codes import Codes

__all__ = ["Codes", "SourceCard"]
