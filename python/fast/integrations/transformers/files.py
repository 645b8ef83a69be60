"""The files that a run adds to the Trainer's: its state, and a section in the model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fast.adapt.adaptation import Adaptation

STATE_FILE = "adaptation.pt"
PAPER = "[FAST](https://arxiv.org/abs/2007.01388) (arXiv:2007.01388)"
FRONT = "---\nlibrary_name: transformers\ntags:\n- fast\n---\n\n"
HEADING = "## What the model still knows"


def save_state(folder: str | Path, adaptation: Adaptation) -> None:
    """Write weights and state of a run beside the Trainer's `optimizer.pt`."""
    state = {"model": adaptation.model.state_dict(), "adaptation": adaptation.state_dict()}
    torch.save(state, Path(folder) / STATE_FILE)


def load_state(folder: str | Path) -> dict[str, Any]:
    """What `save_state` wrote: the states of `model` and `adaptation`.

    Raises:
        ValueError: the folder has none.
    """
    file = Path(folder) / STATE_FILE
    if not file.exists():
        raise ValueError(
            f"{folder} has no {STATE_FILE}: another Trainer wrote it, or save_only_model was set. "
            "Start anew from the pretrained model"
        )
    return torch.load(file, map_location="cpu", weights_only=True)


def card_section(adaptation: Adaptation, before: float | None, after: float | None) -> str:
    """The section about an adaptation in a model card, in Markdown.

    Args:
        before, after: accuracy on the source task, in 0..1; None where it was not measured.
    """
    lines = [HEADING, "", f"Fine-tuned with {PAPER}: {adaptation.plan}."]
    if adaptation.config.budget is not None:
        lines.append(f"The source task was allowed to lose {adaptation.config.budget}.")
    if before is None or after is None:
        lines.append("The accuracy on the source task was not measured.")
    else:
        lines += [
            "",
            "| accuracy on the source task | |",
            "| --- | --- |",
            f"| before | {100 * before:.1f} % |",
            f"| after | {100 * after:.1f} % |",
        ]
    return "\n".join(lines) + "\n"


def write_card(folder: str | Path, section: str) -> None:
    """Write a model card that has only this section; a card that somebody else wrote stays."""
    readme = Path(folder) / "README.md"
    if not readme.exists() or readme.read_text(encoding="utf-8").startswith(FRONT + HEADING):
        readme.write_text(FRONT + section, encoding="utf-8")


def append_to_card(folder: str | Path, section: str) -> None:
    """Add the section to the card that the Trainer wrote."""
    readme = Path(folder) / "README.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(f"{text}\n{section}", encoding="utf-8")
