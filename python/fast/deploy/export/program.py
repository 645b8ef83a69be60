"""Write the network as a program, which torch runs without the network's Python code."""

from __future__ import annotations

import io
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
    whole = io.BytesIO()  # torch ends the process when it writes to a disk that is full
    torch.export.save(program, whole)
    (folder / FILE).write_bytes(whole.getbuffer())
    answers = torch.export.load(folder / FILE).module()
    for inputs in trials(subject):
        subject.check(answers(*leaves(inputs)), inputs, FILE)
    subject.write_description(folder)


def exported(subject: Subject) -> Any:
    """The program of `torch.export`, for batches of any size if the network takes them.

    Where torch finds the length of sequences or the size of the batch fixed, the program takes
    those of the sample, and a note says so.

    Raises:
        ValueError: torch cannot follow the network.
    """
    while True:
        open_shapes = _open_shapes(subject)
        try:
            return _program(subject, open_shapes)
        except (
            RuntimeError,
            ValueError,
            AssertionError,  # of torch itself, where sizes depend on the inputs
            torch._dynamo.exc.TorchDynamoException,
        ) as error:
            if open_shapes is None:
                raise
            _close(subject, first_line(error))


def _program(subject: Subject, open_shapes: tuple[Any, ...] | None) -> Any:
    network = LogitsOnly(subject.network, subject.sample).eval()
    # Export marks the tensors that it is given, so that each attempt gets its own.
    tensors = tuple(x.clone() for x in subject.tensors())
    with torch.no_grad():
        if open_shapes is not None:
            return torch.export.export(network, tensors, dynamic_shapes=open_shapes)
        try:
            return torch.export.export(network, tensors)
        except Exception as error:
            raise ValueError(
                f"torch.export cannot follow {type(subject.network).__name__}: {first_line(error)}"
            ) from error


def _close(subject: Subject, reason: str) -> None:
    """Fix the length of sequences, or the size of the batch where the length is fixed already."""
    lengths = [x.shape[1] for x in subject.tensors() if subject.has_length(x)]
    if lengths:
        subject.any_length = False
        fixed = f"A sequence has exactly {lengths[0]} values"
    else:
        subject.any_batch = False
        fixed = f"The batch has exactly {len(subject.tensors()[0])} samples"
    subject.notes.append(f"{fixed}, because the network fixes it ({reason}).")


def trials(subject: Subject) -> list[Any]:
    """Batches to compare answers on: the sample, and if possible one of other size and length."""
    sample = subject.sample
    if not subject.any_batch:
        return [sample]

    def other(x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([x, x[:1]])
        return x[:, : max(1, 3 * x.shape[1] // 4)] if subject.has_length(x) else x

    return [sample, mapped(sample, other)]


def _open_shapes(subject: Subject) -> tuple[Any, ...] | None:
    """For each input the dimensions that may vary; None where every size is fixed."""
    if not subject.any_batch:
        return None
    batch, both = {0: Dim.DYNAMIC}, {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    return (tuple(both if subject.has_length(x) else batch for x in subject.tensors()),)
