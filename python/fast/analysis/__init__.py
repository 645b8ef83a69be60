"""Figures, and the geometry of an adaptation."""
