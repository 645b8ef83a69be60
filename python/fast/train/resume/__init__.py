"""What a run writes to go on after it was interrupted."""
