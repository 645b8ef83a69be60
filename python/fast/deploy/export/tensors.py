"""Write the weights alone, for the plain architecture."""

from __future__ import annotations

from pathlib import Path

from fast.deploy.export.subject import Subject
from fast.tensor_files import load_tensors, save_tensors

FILE = "model.safetensors"


def write_tensors(subject: Subject, folder: Path) -> None:
    """Write `model.safetensors`, under the names of the plain architecture."""
    state = subject.network.state_dict()
    save_tensors(state, folder / FILE)
    subject.network.load_state_dict(load_tensors(folder / FILE))
    subject.notes += subject.odds
    subject.write_description(folder)
