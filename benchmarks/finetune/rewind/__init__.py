"""Is forgetting undone? See `__main__`."""
