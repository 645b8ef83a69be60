"""Networks by name, and networks that were saved."""
