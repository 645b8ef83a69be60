"""The commands of `fast`, a module for each."""
