"""The method inside Hugging Face's Trainer, on tiny networks made from configurations."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fast
from fast.heads import task_head
from helpers import ROOT

transformers = pytest.importorskip("transformers", reason="the Trainer is its")
datasets = pytest.importorskip("datasets", reason="its tables are the Trainer's data")
pytest.importorskip("accelerate", reason="the Trainer needs it")

from fast.integrations.transformers import FastCallback, FastTrainer  # noqa: E402

STEPS = 12
SOURCE_CLASSES, CLASSES = 3, 5


def bert(dropout=0.0):
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            num_labels=SOURCE_CLASSES,
        )
    )


def vit(dropout=0.0):
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=8,
            patch_size=4,
            hidden_dropout_prob=dropout,
            num_labels=SOURCE_CLASSES,
        )
    )


def texts(count, classes, seed):
    """Each class has words of its own."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % classes
    x = 10 + 6 * y[:, None] + torch.randint(0, 6, (count, 9), generator=generator)
    features = datasets.Features(
        input_ids=datasets.List(datasets.Value("int64")),
        attention_mask=datasets.List(datasets.Value("int64")),
        labels=datasets.ClassLabel(names=[f"class {i}" for i in range(classes)]),
    )
    columns = {"input_ids": x.tolist(), "attention_mask": torch.ones_like(x).tolist()}
    return datasets.Dataset.from_dict(columns | {"labels": y.tolist()}, features)


def pictures(count, classes, seed):
    """The class is the bright row; a plain list of samples."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 8, 8, generator=generator)
    y = torch.arange(count) % classes
    x[torch.arange(count), :, y] += 3
    return [{"pixel_values": a, "labels": int(b)} for a, b in zip(x, y, strict=True)]


CASES = {"bert": (bert, texts), "vit": (vit, pictures)}


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def trainer(folder, name="bert", *, dropout=0.0, model=None, args=None, **options):
    make, data = CASES[name]
    arguments = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 16,
        "save_steps": 5,
        "eval_strategy": "steps",
        "eval_steps": 5,
    }
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 100}
    sources = {"source_inputs": data(40, SOURCE_CLASSES, 3), "source_eval": data(64, 3, 4)}
    return FastTrainer(
        model or make(dropout),
        transformers.TrainingArguments(str(folder), **quiet | arguments | (args or {})),
        compute_metrics=accuracy,
        **{
            "train_dataset": data(72, CLASSES, 1),
            "eval_dataset": data(40, CLASSES, 2),
            "num_classes": CLASSES,
            "head_steps": 10,
        }
        | sources
        | options,
    )


KEPT = {name: texts(72, SOURCE_CLASSES, 1) for name in ("train_dataset", "eval_dataset")}


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def evaluations(run):
    return [r for r in run.state.log_history if "eval_accuracy" in r]


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


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path, name, smoothing):
    """72 samples: the last step of an epoch has fewer, and accumulates fewer micro-batches."""
    finals = []
    for size, parts in ((16, 1), (8, 2)):
        args = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
        args |= {"save_strategy": "no", "eval_strategy": "no", "label_smoothing_factor": smoothing}
        make = CASES[name][0]
        run = trainer(tmp_path, name, model=make().double(), args=args, source_eval=None)
        run.train()
        assert run.adaptation.done == STEPS
        finals.append(weights(run.model))
    # The statistics of the normaliser are kept in float32.
    torch.testing.assert_close(*finals, rtol=1e-5, atol=3e-7)


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
    run = trainer(tmp_path, "vit", id2label={i: f"row {i}" for i in range(CLASSES)})
    run.train()
    processor = transformers.ViTImageProcessor(size={"height": 8, "width": 8})
    run.save_model(str(tmp_path / "saved"))
    processor.save_pretrained(tmp_path / "saved")
    pipeline = transformers.pipeline("image-classification", str(tmp_path / "saved"))
    image = pytest.importorskip("PIL.Image", reason="the pipeline reads images")
    answers = pipeline(image.new("RGB", (8, 8)))
    assert {a["label"] for a in answers} <= {f"row {i}" for i in range(CLASSES)}


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


def test_the_arguments_rule_the_optimizer(tmp_path):
    run = trainer(tmp_path)
    assert run.adaptation.plan.lr == pytest.approx(1.5e-3 * (STEPS / 60) ** 2)
    run.create_optimizer_and_scheduler(STEPS)
    assert isinstance(run.optimizer, fast.AdamW)
    assert run.lr_scheduler.get_last_lr() != [0.0]
    args = {
        "learning_rate": 3e-4,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 4,
        "weight_decay": 0.1,
        "adam_beta1": 0.8,
        "adam_epsilon": 1e-6,
    }
    run = trainer(tmp_path, args=args)
    plan = run.adaptation.plan
    assert (plan.lr, plan.schedule, plan.warmup) == (3e-4, "constant", 4)
    run.create_optimizer_and_scheduler(STEPS)
    assert run.lr_scheduler.get_last_lr()[0] == 0  # the Trainer's warm-up starts there
    assert {(g["betas"], g["eps"]) for g in run.optimizer.param_groups} == {((0.8, 0.999), 1e-6)}
    assert {g["weight_decay"] for g in run.optimizer.param_groups} == {0.0, 0.1}  # none of biases
    run.train()
    assert run.adaptation.done == STEPS


def test_epochs_are_counted_as_the_trainer_counts_them(tmp_path):
    args = {"max_steps": -1, "num_train_epochs": 1.5, "per_device_train_batch_size": 8}
    run = trainer(tmp_path, args=args | {"gradient_accumulation_steps": 4, "eval_strategy": "no"})
    assert run.adaptation.plan.target_size == 32
    run.train()
    assert run.state.max_steps == run.adaptation.plan.steps == run.adaptation.done == 5


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
def test_any_optimizer_of_the_trainer_gets_the_pull(tmp_path):
    run = trainer(tmp_path, args={"optim": "rmsprop", "learning_rate": 1e-3})
    run.train()
    assert isinstance(run.adaptation.optimizer, torch.optim.RMSprop)
    assert run.result.final["drift"] > 0
    again = trainer(tmp_path, args={"optim": "rmsprop", "learning_rate": 1e-3})
    again.train(resume_from_checkpoint=True)
    assert torch.equal(weights(run.model), weights(again.model))


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


@pytest.mark.slow
def test_under_bf16(tmp_path):
    run = trainer(tmp_path, "vit", args={"bf16": True, "save_steps": 10})
    run.train()
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    again = trainer(tmp_path, "vit", args={"bf16": True})
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert torch.equal(weights(run.model), weights(again.model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 3}, "steps: set max_steps of TrainingArguments"),
        ({"args": {"bf16_full_eval": True}}, "bf16_full_eval of TrainingArguments"),
        ({"args": {"auto_find_batch_size": True}}, "auto_find_batch_size of TrainingArguments"),
        ({"id2label": {0: "a", 7: "b"}}, "id2label must name the classes 0 to 4"),
        ({"forget_budget": 1, "source_inputs": None}, "forget_budget needs source_inputs"),
    ],
)
def test_bad_input_is_refused_and_the_model_is_as_it_was(tmp_path, options, message):
    model = bert()
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, model=model, **options)
    assert model.num_labels == model.config.num_labels == SOURCE_CLASSES
    assert list(model.state_dict()) == list(bert().state_dict())
    assert torch.equal(weights(model), weights(bert()))


def test_a_head_without_bias_is_refused(tmp_path):
    model = bert()
    model.classifier = torch.nn.Linear(16, SOURCE_CLASSES, bias=False)
    with pytest.raises(ValueError, match="give the head a bias, or set max_entropy=False"):
        trainer(tmp_path, model=model)
    assert task_head(model) is None


def test_data_without_row_numbers_are_refused(tmp_path):
    stream = texts(72, CLASSES, 1).to_iterable_dataset()
    with pytest.raises(ValueError, match="train_dataset is iterable only"):
        trainer(tmp_path, train_dataset=stream)


def test_a_checkpoint_of_another_trainer_is_refused(tmp_path):
    run = trainer(tmp_path, args={"save_only_model": True})
    run.train()
    with pytest.raises(ValueError, match=r"has no adaptation\.pt"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


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

    whole, callback = run()
    assert callback.adaptation.done == STEPS
    assert callback.result.model is whole.model
    assert callback.adaptation.average.adopted
    assert [r["eval_source_accuracy"] for r in evaluations(whole)] == [0.25] * 3
    again, _ = run(str(tmp_path / "checkpoint-5"))
    assert torch.equal(weights(whole.model), weights(again.model))


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
    }
    for block in blocks:
        for old, new in short.items():
            block = block.replace(old, new)
        exec(block, names)
        shutil.rmtree("runs/intents/checkpoint-12", ignore_errors=True)  # so that there is a rest
    for folder in ("adapted", "own"):
        transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.equal(weights(names["model"]), weights(names["pretrained"]))
