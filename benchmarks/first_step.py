"""What the first backbone step of Adam does, by learning rate: why `fast` stalls and ramps.

    python benchmarks/first_step.py --data FOLDER

After ten head-only steps, every backbone weight takes one step of size lr against the sign of its
gradient, which is what Adam's first step is. Printed: the change of the normalised features,
relative to their norm, and the change of the loss on other target inputs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast.data.trees import pick
from fast.heads import forward_logits, replace_head, set_batch_norm, task_head
from pairs import PAIRS, Folder

LEARNING_RATES = (1e-4, 3e-4, 1e-3)
HEAD_STEPS, BATCH = 10, 64


def features(model: nn.Module, inputs: object) -> tuple[Tensor, Tensor]:
    """What the head sees, `[B, D]`, and the logits."""
    seen: list[Tensor] = []
    hook = task_head(model).linear.register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    logits = forward_logits(model, inputs)
    hook.remove()
    return seen[0], logits


def measure(pair: str, folder: Folder) -> list[str]:
    job = PAIRS[pair].make(folder)
    x, y = job.train
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    batches = [order[i * BATCH : (i + 1) * BATCH] for i in range(HEAD_STEPS + 2)]
    model = replace_head(job.model, int(y.max()) + 1, sample=pick(x, order[:512])).eval()
    set_batch_norm(model, "frozen")
    head = task_head(model).linear
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for index in batches[:HEAD_STEPS]:
        optimizer.zero_grad()
        F.cross_entropy(forward_logits(model, pick(x, index)), y[index]).backward()
        optimizer.step()

    own = {id(p) for p in head.parameters()}
    body = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    index, other = batches[HEAD_STEPS:]
    loss = F.cross_entropy(forward_logits(model, pick(x, index)), y[index])
    signs = [g.sign() for g in torch.autograd.grad(loss, body)]
    rows = []
    with torch.no_grad():
        before, logits = features(model, pick(x, other))
        loss_before = F.cross_entropy(logits, y[other])
        for lr in LEARNING_RATES:
            torch._foreach_sub_(body, signs, alpha=lr)
            after, logits = features(model, pick(x, other))
            torch._foreach_add_(body, signs, alpha=lr)
            change = (after - before).norm() / before.norm()
            rise = F.cross_entropy(logits, y[other]) - loss_before
            rows.append(f"| {pair} | {lr:g} | {change:.2f} | {rise:+.2f} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the data folder")
    folder = Folder(parser.parse_args().data.resolve())
    print("| pair | lr | feature change | loss rise, nats |\n| --- | --- | --- | --- |")
    for pair in PAIRS:
        print("\n".join(measure(pair, folder)), flush=True)


if __name__ == "__main__":
    main()
