"""Fine-tuned networks that have forgotten: the material of this benchmark.

They are kept in a folder, with what making them took, and are not made again.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fast
from benchmarks.finetune.runs import baseline_rate
from benchmarks.real_pairs import RealPair, real_pair
from fast.data.trees import pick
from fast.heads import find_head, fold_head
from fast.heads.find import layer_like
from fast.heads.forward import forward_logits
from fast.heads.replace import announce_classes
from fast.tensor_files import load_tensors, save_tensors

BATCH = 64
PLAIN = "plain script"
METHODS = ("vanilla", "lp-ft", PLAIN)


def checkpoint(
    pair: str, method: str, seed: int, data: Path, folder: Path
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict of a fine-tuned network, and what is known of its run.

    Args:
        method: one of `fast.finetune`, or "plain script", which uses nothing of this library.
        folder: where the checkpoints are.
    """
    name = f"{pair}-{method}-{seed}".replace(" ", "_").replace(">", "")
    file, facts = folder / f"{name}.safetensors", folder / f"{name}.json"
    if not facts.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(seed)
        real = real_pair(pair, data)
        lr = baseline_rate(pair)
        start = time.process_time()
        if method == PLAIN:
            model = plain_script(real, lr, seed)
        else:
            model = fast.finetune(
                real.model, real.train, method=method, steps=real.steps, batch_size=BATCH, lr=lr,
                seed=seed, progress=False,
            ).model  # fmt: skip
        seconds = time.process_time() - start
        save_tensors(fold_head(model).state_dict(), file)
        facts.write_text(json.dumps({"seconds": seconds, "steps": real.steps, "lr": lr}))
    return load_tensors(file), json.loads(facts.read_text())


def plain_script(real: RealPair, lr: float, seed: int) -> nn.Module:
    """What people write: a new last layer, AdamW, batch norm in training mode, a cosine."""
    model = real.model
    x, y = real.train
    head = find_head(model, pick(x, slice(2)))
    head.put(layer_like(head.module, real.num_classes, bias=True))
    announce_classes(model, real.num_classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, real.steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(real.steps):
        rows = torch.randint(len(y), (BATCH,), generator=generator)
        loss = F.cross_entropy(forward_logits(model, pick(x, rows)), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return model.eval()
