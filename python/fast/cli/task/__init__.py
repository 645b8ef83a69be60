"""From the names of a network and its data to tensors."""
