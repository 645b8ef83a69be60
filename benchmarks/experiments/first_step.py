"""What the first backbone step of Adam does, by learning rate: why `fast` stalls and ramps.

    python -m benchmarks.experiments.first_step --data FOLDER

After ten head-only steps, every backbone weight takes one step of size lr against the sign of its
gradient, which is what Adam's first step is. Printed: the change of the normalised features,
relative to their norm, and the change of the loss on other target inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import Record, arguments, shown, table
from benchmarks.real_pairs import PAIRS, real_pair
from fast.data.trees import pick
from fast.heads import forward_logits, replace_head, set_batch_norm, task_head

LEARNING_RATES = (1e-4, 3e-4, 1e-3)
HEAD_STEPS, BATCH = 10, 64


def features(model: nn.Module, inputs: object) -> tuple[Tensor, Tensor]:
    """What the head sees, `[B, D]`, and the logits."""
    seen: list[Tensor] = []
    hook = task_head(model).linear.register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    logits = forward_logits(model, inputs)
    hook.remove()
    return seen[0], logits


def measure(pair: str, data: Path) -> Iterator[Record]:
    """Rows of the table, one per learning rate."""
    real = real_pair(pair, data)
    x, y = real.train
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    batches = [order[i * BATCH : (i + 1) * BATCH] for i in range(HEAD_STEPS + 2)]
    model = replace_head(real.model, real.num_classes, sample=pick(x, order[:512])).eval()
    set_batch_norm(model, "frozen")
    head = task_head(model).linear
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for index in batches[:HEAD_STEPS]:
        optimizer.zero_grad()
        F.cross_entropy(forward_logits(model, pick(x, index)), y[index]).backward()
        optimizer.step()

    of_head = {id(p) for p in head.parameters()}
    body: list[Tensor] = [p for p in model.parameters() if p.requires_grad and id(p) not in of_head]
    index, other = batches[HEAD_STEPS:]
    loss = F.cross_entropy(forward_logits(model, pick(x, index)), y[index])
    signs = [g.sign() for g in torch.autograd.grad(loss, body)]
    with torch.no_grad():
        before, logits = features(model, pick(x, other))
        loss_before = F.cross_entropy(logits, y[other])
        for lr in LEARNING_RATES:
            torch._foreach_sub_(body, signs, alpha=lr)
            after, logits = features(model, pick(x, other))
            torch._foreach_add_(body, signs, alpha=lr)
            change = (after - before).norm() / before.norm()
            rise = F.cross_entropy(logits, y[other]) - loss_before
            yield {
                "pair": pair,
                "lr": f"{lr:g}",
                "feature change": f"{change:.2f}",
                "loss rise, nats": f"{rise:+.2f}",
            }


def main() -> None:
    args = arguments(__doc__, ",".join(PAIRS)).parse_args()
    rows = (row for pair in args.pairs.split(",") for row in measure(pair, args.data.resolve()))
    print("\n" + "\n".join(table(shown(rows))))


if __name__ == "__main__":
    main()
