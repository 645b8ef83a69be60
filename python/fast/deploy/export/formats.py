"""The formats of an export by their names, and the folder that each of them fills."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fast.deploy.export.card import write_card
from fast.deploy.export.hugging_face import write_hugging_face
from fast.deploy.export.onnx import write_onnx
from fast.deploy.export.program import write_program
from fast.deploy.export.subject import Subject
from fast.deploy.export.tensors import write_tensors
from fast.deploy.export.timm import write_timm
from fast.deploy.words import ExportFormat
from fast.files import atomic_folder, check_writable

FORMATS: dict[ExportFormat, Callable[[Subject, Path], None]] = {
    "onnx": write_onnx,
    "torch.export": write_program,
    "safetensors": write_tensors,
    "hf": write_hugging_face,
    "timm": write_timm,
}


def export(subject: Subject, folder: Path, format: ExportFormat) -> Path:
    """Write a network and its card into a folder, whole or not at all; see `Predictor.export`."""
    check_writable(folder, "folder")
    if folder.is_dir():
        if any(folder.iterdir()):
            raise ValueError(f"{folder}: is not empty; name another folder")
        folder.rmdir()
    with atomic_folder(folder) as temporary:
        FORMATS[format](subject, temporary)
        write_card(subject, temporary, format)
    return folder
