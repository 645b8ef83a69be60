"""What FastTrainer saves: runs that go on to the bit, and models that load without this library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fast
from fast.heads import task_head
from helpers import ROOT

transformers = pytest.importorskip("transformers", reason="the Trainer is its")
pytest.importorskip("datasets", reason="its tables are the Trainer's data")
pytest.importorskip("accelerate", reason="the Trainer needs it")
sys.path.insert(0, str(Path(__file__).parent))

from trainer_cases import (  # noqa: E402
    CASES,
    CLASSES,
    STEPS,
    bert,
    evaluations,
    texts,
    trainer,
    weights,
)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_run_resumes_to_the_bit(tmp_path, name, dropout):
    whole = trainer(tmp_path, name, dropout=dropout)
    whole.train()
    again = trainer(tmp_path, name, dropout=dropout)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert torch.equal(weights(whole.model), weights(again.model))
    a, b = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert evaluations(whole)[-1]["eval_loss"] == evaluations(again)[-1]["eval_loss"]


def test_a_saved_model_needs_nothing_of_this_library(tmp_path):
    run = trainer(tmp_path / "run", num_classes=None)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    inputs = {k: torch.tensor(v) for k, v in run.eval_dataset[:6].items() if k != "labels"}
    with torch.no_grad():
        torch.save((inputs, run.model(**inputs).logits), tmp_path / "expected.pt")
    code = f"""
import sys, torch
sys.path.insert(0, {str(ROOT / "tests")!r})
import torchvision_ops
torchvision_ops.declare()
import transformers
inputs, expected = torch.load({str(tmp_path / "expected.pt")!r})
for folder in ({str(tmp_path / "saved")!r}, {str(tmp_path / "run" / f"checkpoint-{STEPS}")!r}):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        assert torch.allclose(model(**inputs).logits, expected, atol=1e-5)
    assert model.config.id2label == {{i: f"class {{i}}" for i in range({CLASSES})}}
    assert model.config.label2id["class 2"] == 2
assert "fast" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "arXiv:2007.01388" in card
    assert f"| before | {100 * run.source_accuracy_before:.1f} % |" in card
    assert f"| after | {100 * run.source_accuracy:.1f} % |" in card
    assert task_head(run.model) is not None, "the trainer's own model goes on answering both tasks"


def test_a_pipeline_loads_it(tmp_path):
    processor = transformers.ViTImageProcessor(size={"height": 8, "width": 8})
    names = {i: f"row {i}" for i in range(CLASSES)}
    run = trainer(tmp_path, "vit", id2label=names, processing_class=processor)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    pipeline = transformers.pipeline("image-classification", str(tmp_path / "saved"))
    image = pytest.importorskip("PIL.Image", reason="the pipeline reads images")
    answers = pipeline(image.new("RGB", (8, 8)))
    assert {a["label"] for a in answers} <= {f"row {i}" for i in range(CLASSES)}


def test_the_model_at_hand_has_the_names_of_the_target(tmp_path):
    """With as many classes as before, answers had the names of the source's classes, and the loss
    of an evaluation was the source's."""
    model = bert()
    names = {0: "rude", 1: "neutral", 2: "kind"}
    model.config.id2label, model.config.label2id = names, {v: k for k, v in names.items()}
    model.config.problem_type = "multi_label_classification"
    data = {k: [dict(x) for x in texts(24, 3, 1)] for k in ("train_dataset", "eval_dataset")}
    args = {"max_steps": 1, "eval_steps": 1, "save_steps": 100}
    run = trainer(tmp_path, model=model, num_classes=3, args=args, **data)
    assert model.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    run.train()
    with fast.source_task(model):
        assert model.config.id2label == names
    run.save_model(str(tmp_path / "saved"))
    config = transformers.AutoConfig.from_pretrained(tmp_path / "saved")
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert config.problem_type == "single_label_classification"


def test_the_hub_gets_the_plain_model_and_its_card(tmp_path, monkeypatch):
    run = trainer(tmp_path, args={"hub_model_id": "someone/adapted"})
    run.train()
    run.hub_model_id = "someone/adapted"
    uploaded = {}

    class Hub:
        def upload_folder(self, **options):
            uploaded.update(options)

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    run.push_to_hub()
    folder = Path(uploaded["folder_path"])
    card = (folder / "README.md").read_text()
    assert card.count("What the model still knows") == 1
    assert "arXiv:2007.01388" in card
    transformers.AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.mark.slow
def test_the_best_checkpoint_is_what_was_evaluated(tmp_path):
    args = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_source_accuracy",
        "save_steps": 5,
        "max_steps": 20,
    }
    run = trainer(tmp_path, lr=5e-2, rehearse=0.0, distill=0.0, anchor_decay=0.0, args=args)
    run.train()
    records = {r["step"]: r for r in evaluations(run)}
    best = max(r["eval_source_accuracy"] for r in records.values())
    assert run.source_accuracy == best
    step = int(run.state.best_model_checkpoint.rpartition("-")[2])
    assert run.evaluate()["eval_loss"] == pytest.approx(records[step]["eval_loss"], rel=1e-5)


@pytest.mark.slow
def test_under_bf16(tmp_path):
    run = trainer(tmp_path, "vit", args={"bf16": True, "save_steps": 10})
    run.train()
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    again = trainer(tmp_path, "vit", args={"bf16": True})
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert torch.equal(weights(run.model), weights(again.model))


def test_a_checkpoint_of_another_trainer_is_refused(tmp_path):
    run = trainer(tmp_path, args={"save_only_model": True})
    run.train()
    with pytest.raises(ValueError, match=r"has no adaptation\.pt"):
        trainer(tmp_path).train(resume_from_checkpoint=True)
