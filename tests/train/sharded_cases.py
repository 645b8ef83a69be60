"""What a sharded network and its files are, on every rank: `python -m sharded_cases FOLDER`."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from rank_runs import network, samples
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

import fast
from fast.ranks import Ranks, joined, tensors_of
from helpers import ROOT
from networks import ConvNet, images
from torch_checkpoints import load, states

TRAIN, KEPT = samples(128, 1, 3), samples(96, 2, 3)


def adaptation(model=None, **options):
    return fast.Adaptation(
        network("fast") if model is None else model,
        options.pop("train", TRAIN),
        **{"source_inputs": KEPT, "steps": 6, "batch_size": 32, "lr": 3e-2, "seed": 0, **options},
    )


def train(given, steps=6):
    scheduler = given.scheduler()
    given.model.train()
    for inputs, labels, rows in given.batches():
        if given.done == steps:
            break
        logits, penalty = given.forward(inputs, rows)
        (F.cross_entropy(logits, labels) + penalty).backward()
        given.optimizer.step(), scheduler.step(), given.optimizer.zero_grad()
    return given


def close(a, b, most=1e-8):
    assert list(a) == list(b)
    assert max(float((a[k].double() - b[k].double()).abs().max()) for k in a) <= most


def everything_is_sharded_and_then_whole(folder, ranks):
    """Weights, moments, anchors and averages are DTensors; afterwards nothing of FSDP2 is left."""
    model = network("fast")
    names = {module: set(vars(module)) for module in model.modules()}
    given = adaptation(model, shard=True)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert isinstance(model, FSDPModule)
    units = [m for m in model.modules() if isinstance(m, FSDPModule)]
    assert len(units) > 3  # a block at a time, not all at once
    train(given)
    states = given.optimizer.state.values()
    assert all(isinstance(s["exp_avg"], DTensor) for s in states)
    assert sum(isinstance(s.get("anchor"), DTensor) for s in states) > 3
    assert all(isinstance(x, DTensor) for x in given.average.values)
    numbers = sum(p.to_local().numel() for p in given.params)
    assert numbers < 0.7 * sum(p.numel() for p in given.params)
    result = given.finish()
    assert not any(isinstance(x, DTensor) for x in tensors_of(model))
    for module in model.modules():
        assert not isinstance(module, FSDPModule)
        assert vars(module).keys() <= names.get(module, set(vars(module)))
        for name, hooks in vars(module).items():
            assert not (name.endswith("_hooks") and hooks), name
    copied = copy.deepcopy(model)
    close(copied.state_dict(), model.state_dict(), 0)
    with ranks.together():
        if ranks.first:
            result.save(folder / "saved")
    again = fast.fold_head(copied)
    assert again(TRAIN[0]).isfinite().all()
    # A network that was whole again can be sharded once more.
    train(adaptation(again, shard=True)).finish()


def alone_and_sharded(folder, ranks, **options):
    """The same run by this process alone, and sharded."""
    one = train(adaptation(process_group=None, **copy.deepcopy(options))).finish().model
    all_ = train(adaptation(shard=True, **copy.deepcopy(options))).finish().model
    close(all_.state_dict(), one.state_dict())


def a_card_of_the_user(folder, ranks):
    model = network("fast")
    card = fast.SourceCard.estimate(model, KEPT, num_samples=64, calibration_samples=8)
    assert any(c.codes.numel() > 1 for c in card.entries.values())
    alone_and_sharded(folder, ranks, card=card, method="ewc", forget_budget=0.002)


def any_optimizer(folder, ranks):
    alone_and_sharded(
        folder, ranks, optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2, foreach=True)
    )


def blocks_in_lists(folder, ranks):
    """A convolutional network with batch norm, in a list that its forward goes through."""

    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = ConvNet()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in "abc")
            self.fc = nn.Linear(5, 4)

        def forward(self, x):
            x = self.stem(x)
            for layer in self.layers:
                x = x + layer(x)
            return self.fc(x)

    x, y = images(64, 3, seed=1)
    torch.manual_seed(0)
    options = {"train": (x.double(), y), "batch_norm": "frozen", "source_inputs": x[:40].double()}
    alone_and_sharded(folder, ranks, model=Listed().double(), **options)


def states_through_torch(folder, ranks):
    """The states of a loop of one's own, with a card, through torch's checkpoints."""
    options = {"method": "ewc", "shard": True}
    whole = train(adaptation(**options)).finish().model.state_dict()
    first = train(adaptation(**options), steps=3)

    dcp.save(states(first), checkpoint_id=folder / "dcp")
    second = adaptation(resuming=True, **options)
    load(second, folder / "dcp")
    assert second.done == 3
    close(train(second).finish().model.state_dict(), whole, 0)


def folding_a_network_of_the_user(folder, ranks):
    """One that was sharded without an adaptation."""
    torch.manual_seed(0)
    plain = fast.replace_head(network("fast"), 3, sample=TRAIN[0])
    nn.init.normal_(plain[-1].linear.weight)
    given = copy.deepcopy(plain)
    ranks.copy_from_first(tensors_of(given))
    for layer in given:
        if list(layer.parameters()):
            fully_shard(layer)
    fully_shard(given)
    fast.fold_head(given)
    whole = {
        k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in given.state_dict().items()
    }
    close(whole, fast.fold_head(plain).state_dict())


def the_page(folder, ranks):
    """docs/distributed.md."""
    page = (ROOT / "docs" / "distributed.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 2
    names = {
        "fast": fast,
        "F": F,
        "DistributedDataParallel": nn.parallel.DistributedDataParallel,
        "model": network("fast"),
        "sharded": network("fast"),
        "x": TRAIN[0],
        "y": TRAIN[1],
        "kept": KEPT,
    }
    for block in blocks:
        exec(block.replace("steps=1000", "steps=6"), names)
    names["adaptation"].finish()
    assert names["result"].model is names["sharded"]


def what_is_refused(folder, ranks):
    class Scaled(nn.Sequential):
        def __init__(self, *layers):
            super().__init__(*layers)
            self.scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

        def forward(self, x):
            return super().forward(x) * self.scale

    model = Scaled(*network("fast"))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="shard: scale is a single number, which FSDP2 does not"):
        adaptation(model, shard=True, method="vanilla", max_entropy=False)
    close(model.state_dict(), before, 0)
    with pytest.raises(ValueError, match="sharded already"):
        adaptation(fully_shard(network("fast")))
    with pytest.raises(ValueError, match="shard: a step has 1 source samples for 2 processes"):
        adaptation(batch_size=8, source_inputs=None, shard=True)
    with pytest.raises(ValueError, match="shard: 2 processes have to take as many micro-batches"):
        adaptation(batch_size=33, grad_accum_steps=3, rehearse=0.0, shard=True)
    given = adaptation(distill=0.2, rehearse=0.0, shard=True)
    with pytest.raises(
        ValueError, match=r"pass augmented=True to fast\.Adaptation, or set distill"
    ):
        given.forward(TRAIN[0][:16])
    with pytest.raises(ValueError, match="8-bit codes cannot be resharded"):
        fast.AdamW(fully_shard(network("fast")).parameters(), state_dtype=torch.uint8)


CASES = (
    everything_is_sharded_and_then_whole,
    a_card_of_the_user,
    any_optimizer,
    blocks_in_lists,
    states_through_torch,
    folding_a_network_of_the_user,
    the_page,
    what_is_refused,
)


def main(folder: str, *names: str) -> None:
    torch.set_num_threads(1)
    with joined() as ranks:
        assert isinstance(ranks, Ranks)
        assert ranks.size > 1
        for case in CASES:
            if not names or case.__name__ in names:
                case(Path(folder), ranks)
                sys.stdout.write(f"{case.__name__}\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
