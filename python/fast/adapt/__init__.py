"""The method: what adapts a network and holds what it knew, and the result; no loop is here."""
