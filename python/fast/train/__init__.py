"""Runs: our loop over an adaptation, with evaluation, log and checkpoints; and rewinding."""
