"""Our loop over an adaptation: trainer, evaluation, log, checkpoints and resume."""
