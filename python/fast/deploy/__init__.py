"""Use what was saved: load it, predict, evaluate, and export it for use without this library."""
