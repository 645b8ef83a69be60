"""The method: what adapts a network and holds what it knew, and its result; the loop is a caller's."""
