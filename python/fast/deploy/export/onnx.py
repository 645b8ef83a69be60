"""Write ONNX by the exporter of torch, and compare its answers in onnxruntime."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fast.data.trees import leaves
from fast.deploy.export.program import exported, trials
from fast.deploy.export.subject import Subject
from fast.errors import first_line

FILE = "model.onnx"
NEEDED = ("onnx", "onnxscript")


def write_onnx(subject: Subject, folder: Path) -> None:
    """Write `model.onnx`; its inputs are named as in `preprocessing.json`, its output `logits`.

    Raises:
        ImportError: the exporter of torch needs libraries that are not installed.
        ValueError: the exporter cannot write the network, or the file has other answers.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"format 'onnx' needs {' and '.join(missing)}: "
            "pip install 'fast-task-adaptation[export]'"
        )
    program = exported(subject)
    try:
        with _quiet():
            torch.onnx.export(
                program,
                f=str(folder / FILE),
                dynamo=True,
                input_names=subject.input_names,
                dynamic_shapes=_open_sizes(subject),
                output_names=["logits"],
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter raises errors of many kinds
        raise ValueError(
            f"torch.onnx cannot write {type(subject.network).__name__}: {first_line(error)}"
        ) from error
    if importlib.util.find_spec("onnxruntime") is None:
        subject.notes.append("onnxruntime is not installed: the answers were not compared.")
    else:
        _compare(subject, folder / FILE)
    subject.write_description(folder)


def _open_sizes(subject: Subject) -> tuple[dict[int, str], ...]:
    """The names, for each input, of the dimensions that may vary."""
    shapes = [subject.shape_of(x) for x in subject.tensors()]
    return tuple({i: n for i, n in enumerate(shape) if isinstance(n, str)} for shape in shapes)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings and logs of the exporter, which are about itself."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _compare(subject: Subject, file: Path) -> None:
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = {entry.name for entry in session.get_inputs()}  # what the network ignores is left out
    for inputs in trials(subject):
        given = zip(subject.input_names, leaves(inputs), strict=True)
        feeds = {name: x.numpy() for name, x in given if name in names}
        try:
            (answers,) = session.run(["logits"], feeds)
        except Exception as error:  # onnxruntime has errors of its own
            raise ValueError(
                f"onnxruntime cannot run {FILE} ({first_line(error)}); nothing was written"
            ) from error
        subject.check(torch.from_numpy(answers), inputs, FILE)
