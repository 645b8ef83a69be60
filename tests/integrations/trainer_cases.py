"""Tiny networks made from configurations, their data, and their trainers; not collected itself."""

from __future__ import annotations

import datasets
import torch
import transformers

from fast.integrations.transformers import FastTrainer

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
            "dropout": dropout > 0,
        }
        | sources
        | options,
    )


KEPT = {name: texts(72, SOURCE_CLASSES, 1) for name in ("train_dataset", "eval_dataset")}


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def evaluations(run):
    return [r for r in run.state.log_history if "eval_accuracy" in r]
