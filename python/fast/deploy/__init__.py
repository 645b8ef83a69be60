"""Networks that are used: load them, predict, evaluate, and export them to do without FAST."""
