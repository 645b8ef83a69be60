"""Decode sounds, and prepare them as a network takes them."""
