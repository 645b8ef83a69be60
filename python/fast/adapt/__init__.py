"""The method: what adapts a network and holds what it knew; no loop and no files."""
