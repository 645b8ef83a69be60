"""What FastTrainer does in a run, on tiny networks made from configurations."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fast

transformers = pytest.importorskip("transformers", reason="the Trainer is its")
pytest.importorskip("datasets", reason="its tables are the Trainer's data")
pytest.importorskip("accelerate", reason="the Trainer needs it")
sys.path.insert(0, str(Path(__file__).parent))

from trainer_cases import (  # noqa: E402
    CASES,
    KEPT,
    SOURCE_CLASSES,
    bert,
    evaluations,
    texts,
    trainer,
    weights,
)

from fast.heads import evaluating  # noqa: E402
from fast.integrations.transformers import FastTrainer  # noqa: E402
from networks import ConvNet, images  # noqa: E402


@pytest.mark.parametrize("name", CASES)
def test_a_network_learns_and_the_source_is_measured(tmp_path, name):
    args = {"max_steps": 60, "eval_steps": 20, "save_strategy": "no"}
    run = trainer(tmp_path, name, args=args, head_steps=None)
    before = run.source_accuracy_before
    run.train()
    records = evaluations(run)
    assert [r["step"] for r in records] == [20, 40, 60]
    assert records[-1]["eval_accuracy"] > 0.6
    assert all(0 <= r["eval_source_accuracy"] <= 1 for r in records)
    assert records[-1]["eval_source_accuracy"] == run.source_accuracy == run.measure_source()
    assert run.source_accuracy >= before - 0.25
    assert run.adaptation.done == 60
    assert run.result.model is run.model


def test_a_network_whose_forward_takes_no_labels(tmp_path):
    """The Trainer alone would drop the labels of such a network, and evaluate none."""

    def rows(count, classes, seed):
        x, y = images(count, classes, seed=seed)
        return [{"x": a, "labels": int(b)} for a, b in zip(x, y, strict=True)]

    run = trainer(
        tmp_path,
        model=ConvNet(),
        train_dataset=rows(72, 3, 1),
        eval_dataset=rows(40, 3, 2),
        num_classes=3,
        source_inputs=images(40, 5, seed=3)[0],
        source_eval=rows(40, 5, 4),
        args={"save_strategy": "no"},
    )
    run.train()
    last = evaluations(run)[-1]
    with evaluating(run.model), torch.no_grad():
        x, y = images(40, 3, seed=2)
        logits = run.model(x)
    assert last["eval_accuracy"] == pytest.approx(float((logits.argmax(1) == y).float().mean()))
    assert last["eval_loss"] == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-4)


def decided():
    """A source head that is sure of its answers, so that there is something to lose."""
    model = bert()
    model.classifier.weight.data *= 100
    return model.eval()


def source_loss(run):
    """How far the source head's answers are from those of the pretrained network, in nats."""
    data = texts(200, SOURCE_CLASSES, 7)[:]
    inputs = {k: torch.tensor(v) for k, v in data.items() if k != "labels"}
    with torch.no_grad(), fast.source_task(run.model):
        now = run.model(**inputs).logits.log_softmax(1)
        before = decided()(**inputs).logits.log_softmax(1)
    return F.kl_div(now, before, log_target=True, reduction="batchmean").item()


@pytest.mark.slow
def test_a_budget_is_kept(tmp_path):
    options = {"lr": 1e-2, "rehearse": 0.0, "distill": 0.0, "anchor_decay": 0.1}
    args = {"max_steps": 40, "save_strategy": "no", "eval_strategy": "no"}
    free = trainer(tmp_path, model=decided(), args=args, **options)
    free.train()
    allowed = source_loss(free) / 5
    assert allowed > 0.005
    kept = trainer(tmp_path, model=decided(), args=args, forget_budget=allowed, **options)
    kept.train()
    assert 0 < kept.result.final["forecast"] <= allowed
    assert source_loss(kept) < 2 * allowed  # on other inputs than those that it was kept on
    assert "was allowed to lose" in kept.card_section()


def test_evaluation_and_checkpoints_are_of_the_averaged_weights(tmp_path):
    run = trainer(tmp_path, average=5, lr=1e-2, args={"max_steps": 10})
    seen = []

    class Look(transformers.TrainerCallback):
        def on_prediction_step(self, *_, model, **__):
            seen.append(weights(model).clone())

        def on_step_end(self, _, state, *__, model, **___):
            if state.global_step == 5:
                self.raw = weights(model).clone()

        def on_save(self, _, state, *__, model, **___):
            if state.global_step == 5:
                assert torch.equal(self.raw, weights(model)), (
                    "training goes on from its own weights"
                )

    run.add_callback(Look())
    run.train()
    assert not torch.equal(seen[0], seen[-1])
    look = next(c for c in run.callback_handler.callbacks if isinstance(c, Look))
    assert not torch.equal(seen[0], look.raw)
    assert torch.equal(seen[-1], weights(run.model))
    folder = tmp_path / "checkpoint-5"
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    first = next(p for p in plain.parameters())
    assert torch.equal(first.flatten(), seen[0][: first.numel()])


def test_a_run_that_a_callback_stops_early_is_finished(tmp_path):
    class Stop(transformers.TrainerCallback):
        def on_step_end(self, _, state, control, **__):
            control.should_training_stop = state.global_step == 7

    run = trainer(tmp_path, callbacks=[Stop()], lr=1e-2)
    run.train()
    assert run.adaptation.done == 7
    assert run.adaptation.average.adopted
    with pytest.raises(RuntimeError, match="has trained already"):
        run.train()


def test_a_head_that_is_kept_goes_on_with_its_own_task(tmp_path):
    model = bert()
    args = {"max_steps": 40, "save_strategy": "no", "eval_strategy": "no"}
    options = {"head": "keep", "num_classes": None, "head_steps": None, "source_inputs": None}
    run = trainer(tmp_path, model=model, args=args, lr=1e-2, ramp=0, **options, **KEPT)
    run.train()
    assert run.source_accuracy > run.source_accuracy_before + 0.3
    run.save_model(str(tmp_path / "saved"))
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert torch.equal(weights(plain), weights(model))


@pytest.mark.slow
def test_texts_of_many_lengths(tmp_path):
    """The collator pads each batch to its longest text."""

    def collate(samples):
        pad = torch.nn.utils.rnn.pad_sequence
        batch = {
            k: pad([torch.tensor(s[k]) for s in samples], batch_first=True)
            for k in ("input_ids", "attention_mask")
        }
        return batch | {"labels": torch.tensor([s["labels"] for s in samples])}

    def cut(data):
        rows = [data[i] for i in range(len(data))]
        return [
            {k: v[: 3 + i % 7] if isinstance(v, list) else v for k, v in row.items()}
            for i, row in enumerate(rows)
        ]

    model, sizes = bert(), (1, 3, 4)
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=30, per_device_train_batch_size=16, use_cpu=True, report_to=[],
        disable_tqdm=True, save_steps=10,
    )  # fmt: skip
    train, source, old = (cut(texts(72, c, s)) for s, c in zip(sizes, (5, 3, 3), strict=True))

    def make():
        return FastTrainer(
            bert(), args, collate, train, num_classes=5, source_inputs=source, source_eval=old
        )

    run = make()
    run.train()
    again = make()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    assert torch.equal(weights(run.model), weights(again.model))
    assert not torch.equal(weights(run.model), weights(model))


@pytest.mark.slow
def test_a_loss_of_the_users_own(tmp_path):
    """Several labels per text; the head is taught by the same loss, and smoothing is the loss's."""

    def loss(outputs, labels, num_items_in_batch):
        sums = F.binary_cross_entropy_with_logits(outputs.logits, labels.float(), reduction="none")
        return sums.mean(1).sum() / num_items_in_batch

    rows = [
        dict(row, labels=torch.nn.functional.one_hot(torch.tensor(row["labels"]), 5))
        for row in texts(72, 5, 1)
    ]
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=30, per_device_train_batch_size=16, use_cpu=True, report_to=[],
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    run = FastTrainer(bert(), args, train_dataset=rows, compute_loss_func=loss, num_classes=5)
    run.train()
    inputs = {k: torch.tensor([r[k] for r in rows]) for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        answers = run.model(**inputs).logits.argmax(1)
    assert (answers == torch.stack([r["labels"] for r in rows]).argmax(1)).float().mean() > 0.8
