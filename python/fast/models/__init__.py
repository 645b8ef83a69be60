"""Networks by name, their weights, inputs and devices; `saved` has the networks of a run."""
