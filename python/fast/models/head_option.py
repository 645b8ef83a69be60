"""What the option `head` says: the name of a layer, or one of two words.

This module loads no torch, because the command line reads it for its help.
"""

from __future__ import annotations

# A new head replaces the network's own, or the network goes on with its own head and task.
NEW, KEEP = "new", "keep"


def head_name(option: str | None) -> str | None:
    """The name of the layer that makes the logits, where the option gives one."""
    return None if option in (NEW, KEEP) else option
