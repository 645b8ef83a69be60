"""The commands that work with finished runs and checkpoints."""
