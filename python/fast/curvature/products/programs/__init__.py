"""Programs: the record of a network as code that runs on every batch."""
