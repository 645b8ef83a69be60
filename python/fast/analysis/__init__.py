"""Figures of runs, and the landscape of losses that an adaptation moves through."""
