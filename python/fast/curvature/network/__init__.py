"""A network as a pure function of its parameters."""
