"""The callback in somebody's own Trainer, and the recipes of docs/transformers.md."""

from __future__ import annotations

import re
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import fast
from helpers import ROOT

transformers = pytest.importorskip("transformers", reason="the Trainer is its")
pytest.importorskip("datasets", reason="its tables are the Trainer's data")
pytest.importorskip("accelerate", reason="the Trainer needs it")
sys.path.insert(0, str(Path(__file__).parent))

from trainer_cases import (  # noqa: E402
    CLASSES,
    SOURCE_CLASSES,
    STEPS,
    accuracy,
    bert,
    evaluations,
    texts,
    weights,
)

from fast.integrations.transformers import FastCallback  # noqa: E402


class OwnTrainer(transformers.Trainer):
    """Somebody's own Trainer, with the three lines that docs/transformers.md gives."""

    loss_is_scaled_for_ga = False
    adaptation = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.adaptation is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.pop("labels")
        logits, penalty = self.adaptation.forward(inputs, model=model)
        return F.cross_entropy(logits, labels) + penalty


@pytest.mark.parametrize("with_penalty", [True, False])
def test_the_callback_in_a_trainer_of_ones_own(tmp_path, with_penalty):
    data, source = texts(72, CLASSES, 1), texts(40, SOURCE_CLASSES, 3)
    tensors = {k: torch.tensor(v) for k, v in data[:].items()}
    kept = {k: torch.tensor(v) for k, v in source[:].items() if k != "labels"}
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=STEPS, per_device_train_batch_size=16, use_cpu=True, report_to=[],
        disable_tqdm=True, eval_strategy="steps", eval_steps=5, save_steps=5,
    )  # fmt: skip

    def run(resume=None):
        model = bert(0.2)
        labels = tensors["labels"]
        inputs = {k: v for k, v in tensors.items() if k != "labels"}
        adaptation = fast.Adaptation(
            model, (inputs, labels), source_inputs=kept, steps=STEPS, batch_size=16, lr=1e-2
        )
        callback = FastCallback(adaptation, source_eval=lambda model: 0.25)
        own = OwnTrainer(
            model,
            args,
            train_dataset=data,
            eval_dataset=texts(40, CLASSES, 2),
            compute_metrics=accuracy,
            callbacks=[callback],
            optimizers=(adaptation.optimizer, adaptation.scheduler()),
        )
        own.adaptation = adaptation if with_penalty else None
        own.train(resume_from_checkpoint=resume)
        return own, callback

    unseen = pytest.warns(UserWarning, match="held by Rehearsal")
    with nullcontext() if with_penalty else unseen:
        whole, callback = run()
    assert callback.adaptation.done == STEPS
    assert callback.result.model is whole.model
    assert callback.adaptation.average.adopted
    assert [r["eval_source_accuracy"] for r in evaluations(whole)] == [0.25] * 3
    again, _ = run(str(tmp_path / "checkpoint-5"))
    assert torch.equal(weights(whole.model), weights(again.model))


@pytest.mark.parametrize("steps", [8, 6])
def test_the_best_model_is_the_average_that_was_evaluated(tmp_path, steps):
    """A run that ended with its plan kept the weights of the best step, and one that a callback
    stopped kept the average of its last ones."""
    data = texts(72, CLASSES, 1)
    tensors = {k: torch.tensor(v) for k, v in data[:].items()}
    model, labels = bert(), tensors.pop("labels")
    adaptation = fast.Adaptation(model, (tensors, labels), steps=8, batch_size=16, lr=1e-2)
    averages = {}

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop |= state.global_step == steps
            with adaptation.averaged():
                averages[state.global_step] = weights(model)

    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=8, per_device_train_batch_size=16, use_cpu=True, report_to=[],
        disable_tqdm=True, eval_strategy="steps", eval_steps=3, save_steps=3,
        load_best_model_at_end=True, metric_for_best_model="eval_source_accuracy",
    )  # fmt: skip
    scores = iter([0.9, 0.1, 0.1])
    callback = FastCallback(adaptation, source_eval=lambda model: next(scores))
    own = OwnTrainer(
        model,
        args,
        train_dataset=data,
        eval_dataset=texts(40, CLASSES, 2),
        callbacks=[callback, Watch()],
        optimizers=(adaptation.optimizer, adaptation.scheduler()),
    )
    own.adaptation = adaptation
    own.train()
    assert callback.result.final["step"] == 3
    assert torch.equal(weights(model), averages[3])


def test_a_checkpoint_of_another_folder_names_the_way_out(tmp_path):
    adaptation = SimpleNamespace(
        optimizer="ours", done=0, plan=SimpleNamespace(steps=8, check_length=lambda *_, **__: None)
    )
    state = SimpleNamespace(max_steps=8, global_step=5)
    with pytest.raises(ValueError, match=r"step 5, .* set output_dir .* that the checkpoint lies"):
        FastCallback(adaptation).on_train_begin(
            SimpleNamespace(output_dir=tmp_path), state, None, optimizer="ours"
        )


@pytest.mark.parametrize(
    ("steps", "optimizer", "message"),
    [
        (8, False, "is its own AdamW: pass"),
        (4, True, "takes 8 steps .* after 4"),
        (8, True, "eval_dataset of the Trainer has several data sets"),
    ],
)
def test_a_trainer_that_does_not_fit_is_refused(tmp_path, steps, optimizer, message):
    data = texts(72, CLASSES, 1)
    tensors = {k: torch.tensor(v) for k, v in data[:].items()}
    model, labels = bert(), tensors.pop("labels")
    adaptation = fast.Adaptation(model, (tensors, labels), steps=steps, batch_size=16)
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=8, use_cpu=True, report_to=[], eval_strategy="steps", eval_steps=1
    )
    own = OwnTrainer(
        model,
        args,
        train_dataset=data,
        eval_dataset={"one": data, "two": data},
        callbacks=[FastCallback(adaptation)],
        optimizers=(adaptation.optimizer, None) if optimizer else (None, None),
    )
    own.adaptation = adaptation
    with pytest.raises(ValueError, match=message):
        own.train()


class Tokenizer:
    """What the Trainer asks of one."""

    def save_pretrained(self, folder):
        (Path(folder) / "tokenizer.json").write_text("{}")


def test_the_recipes_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "transformers.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 3
    quiet = '"runs/intents", use_cpu=True, report_to=[], disable_tqdm=True,'
    short = {'"runs/intents",': quiet, "300": "12", "steps=100": "steps=6"}
    data = {k: torch.tensor(v) for k, v in texts(72, CLASSES, 1)[:].items()}
    names = {
        "model": bert(),
        "pretrained": bert(),
        "own_model": bert(),
        "train": texts(72, CLASSES, 1),
        "val": texts(40, CLASSES, 2),
        "kept": texts(40, SOURCE_CLASSES, 3),
        "old": texts(200, SOURCE_CLASSES, 4),
        "inputs": {k: v for k, v in data.items() if k != "labels"},
        "labels": data["labels"],
        "tokenizer": Tokenizer(),
    }
    for block in blocks:
        for old, new in short.items():
            block = block.replace(old, new)
        exec(block, names)
        shutil.rmtree("runs/intents/checkpoint-12", ignore_errors=True)  # so that there is a rest
    assert Path("adapted/tokenizer.json").is_file()
    for folder in ("adapted", "own"):
        transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.equal(weights(names["model"]), weights(names["pretrained"]))
