"""FAST: fine-tune a pretrained classifier fast, and keep what it knew."""

__version__ = "0.1.0"
