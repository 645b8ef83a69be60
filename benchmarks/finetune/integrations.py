"""One real pair through every trainer: other people's loops against `fast.finetune`, as a table.

    python -m benchmarks.finetune.integrations --data FOLDER

Two pairs: MiniLM, as a class of transformers, learns TREC's six kinds of questions, and banking77
measures what it knew, by the class mean nearest to a text; ResNet-20 of CIFAR-10 learns the digits
of a sign language. Finished runs are kept in `benchmarks/results/integrations.jsonl` and not run
again. The trainers are in `trainers.py`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

import fast
from benchmarks.common import Record, arguments, commits, complete, machine, save, table
from benchmarks.finetune.trainers import RUNNERS, SOURCE_SIZE, STEPS, TARGET_SIZE, Task
from benchmarks.real_pairs import Folder, NearestClassMean, Split, real_pair
from fast.data.trees import pick
from fast.heads import evaluating, forward_logits

# TREC's questions are short.
TOKENS = 24


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


def minilm_to_trec(data: Path) -> Task:
    """The head that the network brings is one of MiniLM's class, and random."""
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


def resnet_to_digits(data: Path) -> Task:
    pair = real_pair("resnet20 -> sign_digits", data)
    assert isinstance(pair.source, tuple)
    return Task(
        model=pair.model,
        train=pair.train,
        val=pair.val,
        source_inputs=pair.source_inputs,
        skill=SourceHead(*pair.source),
    )


PAIRS: dict[str, Callable[[Path], Task]] = {
    "minilm -> trec6": minilm_to_trec,
    "resnet20 -> sign_digits": resnet_to_digits,
}


def run(*, pair: str, trainer: str, seed: int, data: Path) -> Record:
    torch.manual_seed(seed)
    task = PAIRS[pair](data)
    before = task.skill(task.model)
    start = time.perf_counter()
    RUNNERS[trainer](task, seed)
    seconds = time.perf_counter() - start
    with evaluating(task.model):
        target, after = accuracy(task.model, *task.val), task.skill(task.model)
    return {
        "target": target,
        "source_before": before,
        "source_after": after,
        "seconds": round(seconds, 1),
        "machine": machine(),
    }


def report(records: list[Record]) -> list[str]:
    rows = []
    for pair, name in itertools.product(PAIRS, RUNNERS):
        runs = [r for r in records if r["trainer"] == name and r["pair"] == pair]
        if not runs:
            continue
        rows.append(
            {
                "pair": pair,
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
        f"{STEPS} steps of {TARGET_SIZE} target and {SOURCE_SIZE} source inputs. The source skill "
        "of MiniLM is banking77 by nearest class mean. Each trainer draws its batches in an order "
        "of its own; PEFT trains LoRA factors of rank 8 and the head.",
        "",
        f"Commit {commits(records)}; {', '.join(sorted({r['machine'] for r in records}))}.",
    ]


def accuracy(model: nn.Module, inputs: Any, labels: Tensor) -> float:
    """The share of right answers of the head that answers now."""
    logits = [
        forward_logits(model, pick(inputs, rows)) for rows in torch.arange(len(labels)).split(100)
    ]
    return (torch.cat(logits).argmax(1) == labels).float().mean().item()


class SourceHead:
    """The source skill of a network that has its source head: accuracy on held-out data."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def __call__(self, model: nn.Module) -> float:
        with evaluating(model), fast.source_task(model):
            return accuracy(model, self.inputs, self.labels)


def main() -> None:
    parser = arguments(__doc__, ",".join(PAIRS))
    parser.add_argument("--trainers", default=",".join(RUNNERS))
    parser.add_argument("--seeds", default="0,1,2")
    args = parser.parse_args()
    settings = [
        {"pair": pair, "trainer": trainer, "seed": int(seed)}
        for seed, pair, trainer in itertools.product(
            args.seeds.split(","), args.pairs.split(","), args.trainers.split(",")
        )
    ]
    records = complete("integrations", run, settings, data=args.data.resolve())
    save("integrations", report(records))


if __name__ == "__main__":
    main()
