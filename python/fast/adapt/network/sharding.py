"""Shard a network's weights over the processes that train it (FSDP2), and make them whole again.

FSDP2 changes a network in place and has no way back. So we note what it adds to the modules, and
take it away at the end of a run. The network is then as plain as before, and can be folded, copied,
exported or sharded again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fast import dtensor
from fast.data.trees import pick
from fast.heads import forward_logits, own_parameters
from fast.heads.forward import hooked
from fast.optim.param_groups import blocks_of
from fast.ranks import Ranks

_FSDP = "torch.distributed.fsdp"


def check_shardable(model: nn.Module) -> None:
    """Raise ValueError where a parameter cannot be sharded; the message names it."""
    for name, p in model.named_parameters():
        if not p.dim() or not p.is_contiguous():
            form = "is a single number" if not p.dim() else "is not contiguous in memory"
            way = "give it a dimension" if not p.dim() else "call model.to(torch.contiguous_format)"
            raise ValueError(f"shard: {name} {form}, which FSDP2 does not take: {way}")


class Sharding:
    """Shards a network in place, until `undo`.

    Each block of the network (a layer of its lists and sequences) is gathered for its own passes,
    and everything outside of the blocks is gathered together.

    Args:
        model: the whole network, the same on every rank, on its device.
        alone: layers that are also called by themselves, outside of the network's forward.
        sample: a batch of inputs; two of them are used.
        ranks: the processes, more than one.

    Raises:
        ValueError: a layer of `alone` shares its weights with another one, or a parameter cannot be
            sharded; nothing is changed then.
    """

    def __init__(
        self, model: nn.Module, alone: Sequence[nn.Module], sample: Any, ranks: Ranks
    ) -> None:
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        check_shardable(model)
        for layer in alone:
            if not _owns(model, layer):
                raise ValueError(
                    "shard: the head shares its weights with another layer, and is called apart "
                    "from it: train with DistributedDataParallel (without shard)"
                )
        blocks = [block for block in _blocks(model, sample) if block not in alone]
        before = [(module, type(module), set(vars(module))) for module in model.modules()]
        mesh = DeviceMesh.from_group(ranks.group, next(model.parameters()).device.type)
        for module in dict.fromkeys([*alone, *blocks, model]):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
        self._before = [(m, kind, set(vars(m)) - names) for m, kind, names in before]

    @torch.no_grad()
    def undo(self) -> None:
        """Put the whole weights in the place of the shards; all ranks have to call it."""
        from torch.distributed._composable_state import _module_state_mapping

        whole: dict[Tensor, nn.Parameter] = {}
        for module, kind, added in self._before:
            for name, p in module._parameters.items():
                if p is not None and dtensor.is_sharded(p):
                    if p not in whole:
                        whole[p] = nn.Parameter(dtensor.whole(p.detach()), p.requires_grad)
                    module._parameters[name] = whole[p]
            module.__class__ = kind
            for name in added:
                delattr(module, name)
            for hooks in [x for name, x in vars(module).items() if name.endswith("_hooks")]:
                for key in [k for k, hook in hooks.items() if _is_of_fsdp(hook)]:
                    del hooks[key]
            _module_state_mapping.pop(module, None)
        self._before = []


def _is_of_fsdp(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(_FSDP)


def _owns(model: nn.Module, module: nn.Module) -> bool:
    return len(own_parameters(model, module)) == len(list(module.parameters()))


def _blocks(model: nn.Module, sample: Any) -> list[nn.Module]:
    """The blocks that are called as modules, and share no weights with anything outside of them."""
    ran: list[nn.Module] = []
    blocks = [m for m in blocks_of(model, set(model.parameters())) if m is not model]
    hooks = [m.register_forward_hook(lambda m, *_: ran.append(m)) for m in blocks]
    with hooked(model, *hooks):
        forward_logits(model, pick(sample, slice(2)))
    return [m for m in blocks if m in ran and _owns(model, m)]
