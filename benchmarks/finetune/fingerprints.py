"""Has a change to the code changed a number? Hashes of weights and history of small runs.

    python -m benchmarks.finetune.fingerprints before.json          # writes the hashes
    python -m benchmarks.finetune.fingerprints before.json --check  # compares, on the same machine

The runs have every method, with and without source inputs, a budget, a card and per-task norms,
under AdamW and SGD, on a network of pictures and one of texts. Hashes hold for one machine, one
version of torch and one thread.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fast


class Pictures(nn.Module):
    """Convolutions with batch norm for 8x8 pictures of one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()
        )
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.body(self.stem(x)).mean((2, 3))))


class Texts(nn.Module):
    """One transformer block over token ids and a mask, as keyword arguments."""

    def __init__(self, vocabulary: int = 40, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.block = nn.TransformerEncoderLayer(
            width, 2, 32, dropout=0.0, batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        x = self.norm(self.block(x, src_key_padding_mask=attention_mask == 0))
        kept = attention_mask.unsqueeze(-1).to(x.dtype)
        return self.classifier((x * kept).sum(1) / kept.sum(1))


def pretrained(model: nn.Module, inputs: Any, labels: Tensor, steps: int = 200) -> nn.Module:
    """The model after a few steps of plain training."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
    return model


Pair = tuple[nn.Module, Any, Any, Any]


def pictures() -> Pair:
    """Digits 0-4 learned; the target is 5-9: model, train, val, source."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    digits = load_digits()
    x = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    y = torch.from_numpy(digits.target).long()
    old, new = y < 5, y >= 5
    model = pretrained(Pictures(), x[old][:400], y[old][:400])
    a, b = x[new], y[new] - 5
    return model, (a[:300], b[:300]), (a[300:500], b[300:500]), (x[old][400:600], y[old][400:600])


def texts() -> Pair:
    """Which of four words is most frequent; the target asks for another four."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 40, (700, 12), generator=generator)
    lengths = torch.randint(6, 13, (700, 1), generator=generator)
    mask = (torch.arange(12) < lengths).long()
    inputs = {"input_ids": ids * mask, "attention_mask": mask}

    def labels(first: int) -> Tensor:
        counts = [(((ids * mask) - first) % 8 == k).sum(1) for k in range(4)]
        return torch.stack(counts, 1).argmax(1)

    def part(a: int, b: int) -> dict[str, Tensor]:
        return {k: v[a:b] for k, v in inputs.items()}

    torch.manual_seed(0)
    model = pretrained(Texts(), part(0, 200), labels(0)[:200])
    train, val = (part(200, 450), labels(4)[200:450]), (part(450, 550), labels(4)[450:550])
    return model, train, val, (part(550, 700), labels(0)[550:700])


PAIRS: dict[str, Callable[[], Pair]] = {"pictures": pictures, "texts": texts}
# The pair of a run, and the options of `fast.finetune`; `source_inputs` and `card` say whether the
# run gets them.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "fast": ("pictures", {}),
    "fast, source inputs": ("pictures", {"source_inputs": True}),
    "fast, source inputs, frozen norms": (
        "pictures",
        {"source_inputs": True, "batch_norm": "frozen", "grad_accum_steps": 2},
    ),
    "fast, budget": ("pictures", {"source_inputs": True, "forget_budget": 0.02}),
    "fast, card, SGD": (
        "pictures",
        {"card": True, "rehearse": 0.0, "optimizer": "sgd", "lr": 0.02},
    ),
    "fast, texts": ("texts", {}),
    "fast, texts, source inputs, budget in points": (
        "texts",
        {"source_inputs": True, "forget_budget": "3%"},
    ),
    "fast, distillation alone": ("texts", {"rehearse": 0.0, "distill": 0.2}),
    "vanilla": ("pictures", {"method": "vanilla", "label_smoothing": 0.1}),
    "lp-ft": ("texts", {"method": "lp-ft"}),
    "l2-sp, budget by a card": (
        "pictures",
        {"method": "l2-sp", "card": True, "forget_budget": 0.05},
    ),
    "ewc, SGD": ("pictures", {"method": "ewc", "source_inputs": True, "optimizer": "sgd"}),
    "replay": ("pictures", {"method": "replay", "source_inputs": True, "batch_norm": "per_task"}),
    "tracked norms, clipping": (
        "pictures",
        {"batch_norm": "track", "max_grad_norm": 1.0, "source_inputs": True, "forget_budget": 0.02},
    ),
}


def run(name: str) -> dict[str, str]:
    """Hashes of one run."""
    pair, options = RUNS[name]
    model, train, val, source = PAIRS[pair]()
    options = dict(options)
    if options.pop("source_inputs", False):
        options["source_inputs"] = source
    if options.pop("card", False):
        options["card"] = fast.SourceCard.estimate(model, source[0], num_samples=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = fast.finetune(
            model,
            train,
            val,
            source,
            **({"lr": 3e-3} | options),
            steps=60,
            batch_size=32,
            eval_every=20,
            progress=False,
        )
    weights = hashlib.blake2b(digest_size=8)
    for value in fast.fold_head(result.model).state_dict().values():
        weights.update(value.numpy().tobytes())
    history = [{k: v for k, v in r.items() if k != "seconds"} for r in result.history]
    # A learning rate is a product, and the order of its factors shows in the last of 16 digits.
    text = json.dumps([{k: _rounded(v) for k, v in sorted(r.items())} for r in history])
    return {
        "weights": weights.hexdigest(),
        "history": hashlib.blake2b(text.encode(), digest_size=8).hexdigest(),
        "accuracies": f"{result.target_accuracy:.3f} / {result.source_accuracy:.3f}",
    }


def _rounded(value: Any) -> Any:
    return float(f"{value:.12g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--check", action="store_true", help="compare with the file")
    args = parser.parse_args()

    torch.set_num_threads(1)
    after = {name: run(name) for name in RUNS}
    for name, hashes in after.items():
        print(f"{name:46} {'  '.join(hashes.values())}")
    if not args.check:
        args.file.write_text(json.dumps(after, indent=1) + "\n")
        return
    before = json.loads(args.file.read_text())
    other = [name for name in RUNS if before.get(name) != after[name]]
    print(f"other than before: {', '.join(other)}" if other else f"all {len(after)} as before")
    raise SystemExit(bool(other))


if __name__ == "__main__":
    main()
