"""Would the norm for clipping be cheaper from a hook in the backward pass?

    python -m benchmarks.experiments.norm_hook

Clipping needs the norm of all gradients before the first weight moves, so the step reads them once
more. A hook could square each gradient right after the backward pass wrote it, while it is still in
cache. Whole iterations on 25M parameters are timed in turn, in CPU time of one thread: with
clipping in the step, and with the hook and a step that does not clip, which is the least that such
a design would cost.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

import fast

WIDTH, DEPTH, BATCH, ROUNDS = 1024, 24, 32, 41


def network() -> nn.Module:
    layers = [layer for _ in range(DEPTH) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*layers)


def iteration(clip: bool, hook: bool, step: bool) -> Callable[[], float]:
    """One iteration on a network of its own; returns its CPU seconds."""
    model, x = network(), torch.randn(BATCH, WIDTH)
    limit = 1.0 if clip else None
    optimizer = fast.AdamW(model.parameters(), lr=1e-5, anchor_decay=0.1, max_grad_norm=limit)
    norms: list[Tensor] = []
    for p in model.parameters() if hook else ():
        p.register_post_accumulate_grad_hook(
            lambda p: norms.append(torch.linalg.vector_norm(p.grad))
        )

    def run() -> float:
        model.zero_grad()
        norms.clear()
        begin = time.process_time()
        model(x).square().mean().backward()
        if hook:
            torch.stack(norms).norm()
        if step:
            optimizer.step()
        return time.process_time() - begin

    return run


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    runs = {
        "forward and backward": iteration(clip=False, hook=False, step=False),
        "+ step": iteration(clip=False, hook=False, step=True),
        "+ step that clips": iteration(clip=True, hook=False, step=True),
        "+ hook + step": iteration(clip=False, hook=True, step=True),
    }
    rounds = [{name: run() for name, run in runs.items()} for _ in range(ROUNDS + 2)][2:]
    base, *others = runs
    print(f"{base}: {1e3 * median(r[base] for r in rounds):.1f} ms")
    for name in others:
        print(f"{name}: {1e3 * median(r[name] - r[base] for r in rounds):.1f} ms more")


if __name__ == "__main__":
    main()
