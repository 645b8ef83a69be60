"""Write the weights alone, for the plain architecture."""

from __future__ import annotations

from pathlib import Path

from fast.deploy.export.subject import Subject
from fast.merge.joined import Joined
from fast.tensor_files import load_into, load_tensors, save_tensors

FILE = "model.safetensors"


def write_tensors(subject: Subject, folder: Path) -> None:
    """Write `model.safetensors`, under the names of the plain architecture.

    Raises:
        ValueError: the network is a joined one that no plain architecture answers like.
    """
    if isinstance(subject.network, Joined):
        why = "takes two passes" if subject.network.passes > 1 else "has classes of both tasks"
        raise ValueError(
            f"format 'safetensors' is for plain architectures, and a joined network that {why} is "
            "none: use 'onnx' or 'torch.export'"
        )
    state = subject.network.state_dict()
    save_tensors(state, folder / FILE)
    load_into(subject.network, load_tensors(folder / FILE))
    subject.notes += subject.odds
    subject.write_description(folder)
