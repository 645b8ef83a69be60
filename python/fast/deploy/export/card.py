"""The README of an export says what it is, how it was trained and how it is used."""

from __future__ import annotations

from pathlib import Path

from fast.deploy.export.subject import Subject
from fast.errors import printable, some
from fast.files import atomic_file
from fast.models.saved.description import is_timm

CARD_FILE = "README.md"
USE = {
    "onnx": """import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
(logits,) = session.run(["logits"], {inputs})""",
    "torch.export": """import torch

network = torch.export.load("model.pt2").module()
logits = network({names})""",
    "safetensors": """from safetensors.torch import load_file

network.load_state_dict(load_file("model.safetensors"))   # {kind}, {count} classes""",
    "hf": """from transformers import pipeline

classify = pipeline("{task}", model="."{truncation})""",
    "timm": """import timm

network = timm.create_model("local-dir:.", pretrained=True)""",
}


def write_card(subject: Subject, folder: Path, format: str) -> None:
    """Write README.md; for Hugging Face it is the model card."""
    lines = _front(subject) if format in ("hf", "timm") else []
    lines += [f"# {type(subject.network).__name__} of {len(subject.classes)} classes", ""]
    classes = [f"`{name}`" for name in subject.classes]  # a name may contain a comma
    lines += [f"Classes: {some(classes, 20)}.", "", *_training(subject), "## Inputs", ""]
    lines += [f"{i}. {step}" for i, step in enumerate(subject.preparation.words, 1)]
    lines += ["", "The softmax of the logits gives the probabilities of the classes.", ""]
    lines += ["## Use", "", "```python", *_use(subject, format).splitlines(), "```"]
    if subject.notes:
        lines += ["", *[f"* {printable(note)}" for note in subject.notes]]
    with atomic_file(folder / CARD_FILE) as path:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _front(subject: Subject) -> list[str]:
    library = "timm" if is_timm(subject.network) else "transformers"
    return ["---", f"library_name: {library}", "tags:", "- fast", f"- {_task(subject)}", "---", ""]


def _task(subject: Subject) -> str:
    if subject.preparation.kind == "sounds":
        return "audio-classification"
    texts = subject.preparation.kind == "texts" or "input_ids" in subject.input_names
    return "text-classification" if texts else "image-classification"


def _training(subject: Subject) -> list[str]:
    facts = subject.facts
    method = f", method `{facts['method']}`" if facts.get("method") else ""
    lines = [
        f"Fine-tuned by FAST ([arXiv 2007.01388](https://arxiv.org/abs/2007.01388)){method}.",
        "",
    ]
    shown = {
        "accuracy on held-out samples": facts.get("target_accuracy"),
        "accuracy on the source task, before": facts.get("source_accuracy_before"),
        "accuracy on the source task, after": facts.get("source_accuracy"),
    }
    rows = [f"| {name} | {100 * x:.1f} % |" for name, x in shown.items() if x is not None]
    return [*lines, "| | |", "| --- | --- |", *rows, ""] if rows else lines


def _use(subject: Subject, format: str) -> str:
    names = subject.input_names
    values = {
        "{inputs}": "{" + ", ".join(f'"{name}": {name}' for name in names) + "}",
        "{names}": ", ".join(names),
        "{kind}": type(subject.network).__name__,
        "{count}": str(len(subject.classes)),
        "{task}": _task(subject),
        "{truncation}": ", truncation=True" if _task(subject).startswith("text") else "",
    }
    text = USE[format]
    for name, value in values.items():
        text = text.replace(name, value)
    return text
