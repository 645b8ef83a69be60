"""`torch.export`: the network as a program that torch runs without its Python code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.export import Dim

from fast.data.trees import leaves, mapped
from fast.deploy.export.subject import LogitsOnly, Subject
from fast.errors import first_line

FILE = "model.pt2"


def write_program(subject: Subject, folder: Path) -> None:
    """Write `model.pt2`, which `torch.export.load` reads."""
    program = exported(subject)
    torch.export.save(program, folder / FILE)
    answers = torch.export.load(folder / FILE).module()
    for inputs in trials(subject):
        subject.check(answers(*leaves(inputs)), inputs, FILE)
    subject.write_description(folder)


def exported(subject: Subject) -> Any:
    """The program, for batches of any size; of the sample's where the network is built for one.

    Raises:
        ValueError: torch cannot follow the network.
    """
    network = LogitsOnly(subject.network, subject.sample).eval()
    # Export marks the tensors that it is given, so that each attempt gets its own.
    first, second = (tuple(x.clone() for x in subject.tensors()) for _ in range(2))
    with torch.no_grad():
        try:
            return torch.export.export(network, first, dynamic_shapes=_open_shapes(first))
        except (RuntimeError, ValueError, torch._dynamo.exc.TorchDynamoException) as error:
            reason = first_line(error)
        try:
            program = torch.export.export(network, second)
        except Exception as error:
            raise ValueError(
                f"torch.export cannot follow {type(subject.network).__name__}: {first_line(error)}"
            ) from error
    subject.notes.append(
        f"The batch has exactly {len(second[0])} samples, because the network fixes it ({reason})."
    )
    return program


def is_fixed(subject: Subject) -> bool:
    """Whether the program takes batches of one size alone."""
    return any(note.startswith("The batch has exactly") for note in subject.notes)


def trials(subject: Subject) -> list[Any]:
    """Batches to compare answers on: the sample, and one of another size."""
    if is_fixed(subject):
        return [subject.sample]
    return [subject.sample, mapped(subject.sample, lambda x: torch.cat([x, x[:1]]))]


def _open_shapes(tensors: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
    """The dimensions that may vary: the batch, and the length of token sequences."""
    shapes = []
    for x in tensors:
        tokens = x.dim() == 2 and not x.is_floating_point()
        shapes.append({0: Dim.DYNAMIC, 1: Dim.DYNAMIC} if tokens else {0: Dim.DYNAMIC})
    return (tuple(shapes),)
