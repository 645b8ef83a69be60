"""Fine-tuning: the trainer, its methods, its data and its checkpoints."""
