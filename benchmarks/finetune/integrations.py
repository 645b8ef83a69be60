"""One real pair through every trainer: other people's loops against `fast.finetune`, as a table.

    python -m benchmarks.finetune.integrations --data FOLDER

MiniLM, as a class of transformers, learns TREC's six kinds of questions; banking77 measures what it
knew, by the class mean nearest to a text. Finished runs are kept in
`benchmarks/results/integrations.jsonl` and not run again. A trainer is added as a function to
`RUNNERS`, which trains the model of a `Task` in place.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, BertPreTrainedModel, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

import fast
from benchmarks.common import Record, arguments, commits, complete, machine, save, table
from benchmarks.real_pairs import Folder, NearestClassMean, Split
from fast.heads import evaluating, forward_logits

STEPS, TARGET_SIZE, SOURCE_SIZE = 60, 28, 4
# TREC's questions are short.
TOKENS = 24


@dataclass(frozen=True, kw_only=True)
class Task:
    """A pretrained network, target data `(inputs, labels)`, and what measures the source."""

    model: nn.Module
    train: Split
    val: Split
    source_inputs: Any
    skill: Callable[[nn.Module], float]


class MiniLM(BertPreTrainedModel):
    """A sentence vector, the mean of BERT's last hidden states, and a linear head."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids, attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        logits = self.classifier(self.encode(input_ids, attention_mask))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)  # type: ignore[arg-type]


def minilm(folder: Folder) -> MiniLM:
    """The published weights under the names that they have in transformers."""
    config = BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=1e-12,
    )
    names = {
        "tok": "embeddings.word_embeddings",
        "pos": "embeddings.position_embeddings",
        "typ": "embeddings.token_type_embeddings",
        "ln": "embeddings.LayerNorm",
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "o": "attention.output.dense",
        "ln1": "attention.output.LayerNorm",
        "fc1": "intermediate.dense",
        "fc2": "output.dense",
        "ln2": "output.LayerNorm",
    }
    state = {}
    for key, value in folder.weights("minilm_l6_fp16").items():
        *layer, part, kind = key.split(".")
        prefix = f"encoder.layer.{layer[1]}." if layer else ""
        state[f"{prefix}{names[part]}.{kind}"] = value
    model = MiniLM(config)
    model.bert.load_state_dict(state)
    return model.eval()


def task(seed: int, data: Path) -> Task:
    """The pair; the head that the network brings is one of MiniLM's class, and random."""
    torch.manual_seed(seed)
    folder = Folder(data)

    def named(split: Split) -> Split:
        x, y = split
        return {"input_ids": x["ids"][:, :TOKENS], "attention_mask": x["mask"][:, :TOKENS]}, y

    reference, test = (
        folder.texts("banking77", "train", 600),
        folder.texts("banking77", "test", 500),
    )
    return Task(
        model=minilm(folder),
        train=named(folder.texts("trec6", "train")),
        val=named(folder.texts("trec6", "test")),
        source_inputs={k: v[:500] for k, v in named(reference)[0].items()},
        skill=NearestClassMean(reference, test),
    )


def with_finetune(given: Task, seed: int, **options: Any) -> None:
    fast.finetune(
        given.model,
        given.train,
        source_inputs=given.source_inputs,
        steps=STEPS,
        batch_size=TARGET_SIZE + SOURCE_SIZE,
        seed=seed,
        progress=False,
        **options,
    )


def with_transformers(given: Task, seed: int) -> None:
    from fast.integrations.transformers import FastTrainer

    inputs, labels = given.train
    rows = [
        {k: v[i] for k, v in inputs.items()} | {"labels": y} for i, y in enumerate(labels.tolist())
    ]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=TARGET_SIZE,
            seed=seed,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        classes = int(labels.max()) + 1
        FastTrainer(
            given.model,
            args,
            train_dataset=rows,
            num_classes=classes,
            source_inputs=given.source_inputs,
        ).train()


Runner = Callable[[Task, int], None]
RUNNERS: dict[str, Runner] = {
    "fast.finetune": with_finetune,
    "AdamW in fast.finetune": lambda given, seed: with_finetune(
        given, seed, method="vanilla", lr=3e-4
    ),
    "transformers.FastTrainer": with_transformers,
}


def run(*, trainer: str, seed: int, data: Path) -> Record:
    given = task(seed, data)
    before = given.skill(given.model)
    start = time.perf_counter()
    RUNNERS[trainer](given, seed)
    seconds = time.perf_counter() - start
    inputs, labels = given.val
    with evaluating(given.model):
        logits = [
            forward_logits(given.model, {k: v[rows] for k, v in inputs.items()})
            for rows in torch.arange(len(labels)).split(100)
        ]
        after = given.skill(given.model)
    return {
        "target": (torch.cat(logits).argmax(1) == labels).float().mean().item(),
        "source_before": before,
        "source_after": after,
        "seconds": round(seconds, 1),
        "machine": machine(),
    }


def report(records: list[Record]) -> list[str]:
    rows = []
    for name in RUNNERS:
        runs = [r for r in records if r["trainer"] == name]
        if not runs:
            continue
        rows.append(
            {
                "trainer": name,
                "seeds": len(runs),
                "target accuracy, %": ", ".join(f"{100 * r['target']:.1f}" for r in runs),
                "mean": f"{100 * mean(r['target'] for r in runs):.1f}",
                "source points lost": ", ".join(
                    f"{100 * (r['source_before'] - r['source_after']):.1f}" for r in runs
                ),
            }
        )
    return [
        *table(rows),
        "",
        f"MiniLM -> TREC-6, {STEPS} steps of {TARGET_SIZE} target and {SOURCE_SIZE} source inputs; "
        "the source skill is banking77 by nearest class mean. Each trainer draws its batches in an "
        "order of its own.",
        "",
        f"Commit {commits(records)}; {', '.join(sorted({r['machine'] for r in records}))}.",
    ]


def main() -> None:
    parser = arguments(__doc__, "")
    parser.add_argument("--trainers", default=",".join(RUNNERS))
    parser.add_argument("--seeds", default="0,1,2")
    args = parser.parse_args()
    settings = [
        {"trainer": trainer, "seed": int(seed)}
        for seed, trainer in itertools.product(args.seeds.split(","), args.trainers.split(","))
    ]
    records = complete("integrations", run, settings, data=args.data.resolve())
    save("integrations", report(records))


if __name__ == "__main__":
    main()
