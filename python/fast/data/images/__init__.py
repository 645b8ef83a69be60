"""Decode images, and prepare them as a network takes them."""
