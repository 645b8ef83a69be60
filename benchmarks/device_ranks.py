"""A run on the processes that `torchrun` started, whole or sharded, against one process alone.

    torchrun --nproc-per-node 1 -m benchmarks.device_ranks [--shard]

One process is a group too: with a GPU its messages go by nccl, and `shard=True` wraps the network
by FSDP2. It prints the largest difference of a weight from what the same run gives without a group.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fast

LIMIT = 1e-4  # float32, sixteen steps


def data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, :2] > 0).sum(1)


def run(shard: bool) -> dict[str, Tensor]:
    """The weights after a short run."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, 10))
    result = fast.finetune(
        model, data(256, 1), val=data(64, 2), source_inputs=data(64, 3), steps=16, batch_size=32,
        seed=0, shard=shard, progress=False,
    )  # fmt: skip
    return {name: x.detach().cpu() for name, x in result.model.state_dict().items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shard", action="store_true")
    args = parser.parse_args()
    alone = run(shard=False)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")
    together = run(shard=args.shard)
    worst = max(float((together[name] - x).abs().max()) for name, x in alone.items())
    group = f"{dist.get_backend()}, {dist.get_world_size()} processes"
    print(f"{group}, shard={args.shard}: {worst:.1e}")
    dist.destroy_process_group()
    if not worst <= LIMIT:
        raise SystemExit(f"the weights differ from those of one process by {worst:.1e}")


if __name__ == "__main__":
    main()
