"""A network with the head that learns, and the features that this head sees."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fast.adapt.guards.base import SourceBatch
from fast.adapt.network.drift import Drift
from fast.adapt.network.noise import Shares, dropout_shares, set_dropout
from fast.adapt.network.sharding import Sharding
from fast.adapt.network.shared_forward import HeadInput
from fast.data.trees import move
from fast.heads import find_head, forward_logits, task_head
from fast.heads.feature_norm import FeatureNorm
from fast.heads.replace import put_head
from fast.ranks import Ranks


class AdaptedNetwork:
    """The network of an adaptation, with a new head or the one that it keeps.

    Args:
        model: pretrained; it gets the new head.
        num_outputs: outputs of the new head; None keeps the old one.
        sample: a batch of inputs, on the model's device.
        max_entropy: see `fast.replace_head`.
        head_name: name of the layer that makes the logits, where the user gave it.

    Attributes:
        head: the module whose input the features are.
        learns: the layer that makes the target's logits.
        source: the layer that makes the source's logits from the same features.
        norm: the feature normaliser, or None.
        drift: knows the pretrained weights once there is an optimizer, which moves them; until
            then None.
        sharding: how the weights are sharded over several processes, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        num_outputs: int | None,
        *,
        sample: Any,
        max_entropy: bool,
        head_name: str | None,
    ) -> None:
        self.model = model
        self.head: nn.Module
        self.norm: FeatureNorm | None = None
        if num_outputs is None:
            self.head = self.learns = self.source = find_head(model, sample, head_name).module
        else:
            put_head(model, num_outputs, sample=sample, max_entropy=max_entropy, head=head_name)
            head = task_head(model)
            assert head is not None
            self.head, self.learns, self.source = head, head.linear, head.source
            self.norm = head.norm
        self._input: HeadInput | None = None
        self._apart = False
        self.drift: Drift | None = None
        self.sharding: Sharding | None = None
        self._copies: list[tuple[nn.Module, nn.Module]] = []  # with their source layers
        self._dropout: Shares = []  # what is switched off

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def switch_dropout_off(self) -> None:
        """Drop nothing until `close`."""
        self._dropout = dropout_shares(self.model)
        set_dropout(self._dropout, 0.0)

    def watch(self, apart: bool) -> None:
        """Record the head's input in every forward pass from now on.

        Args:
            apart: run source inputs in a pass of their own, in evaluation mode and for the source
                task.
        """
        self._input, self._apart = HeadInput(self.head), apart

    def forward(
        self, wrapped: nn.Module | None, inputs: Any, source: SourceBatch | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Run target inputs, and source inputs beside them.

        Args:
            wrapped: `DistributedDataParallel` or another wrapper of the network; None: the bare
                network.
            inputs: target inputs, on the model's device.
            source: source inputs, or None.

        Returns:
            target logits; features of target and of source inputs, or None where nobody watches.
        """
        network = self.model if wrapped is None else wrapped
        if self._input is None:
            return forward_logits(network, inputs), None, None
        beside = None if source is None else move(source.inputs, self.device)
        return self._input.forward(network, inputs, beside, self._apart)

    def pretrained_copy(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """A frozen copy at the pretrained weights, its head, and its source layer.

        The copy shares frozen weights with the network, so a network with adapters costs little
        memory to copy.

        Raises:
            ValueError: the weights have been sharded, and cannot be copied.
        """
        if self.sharding is not None:
            raise ValueError(
                "shard: source answers are needed of inputs that are not remembered, and a sharded "
                "network cannot be copied: pass augmented=True to fast.Adaptation, or set distill=0"
            )
        names = {module: name for name, module in self.model.named_modules()}
        shared = {id(p): p for p in self.model.parameters() if not p.requires_grad}
        copied = copy.deepcopy(self.model, shared).requires_grad_(False)
        if self.drift is not None:
            anchors = dict(zip(map(id, self.drift.params), self.drift.anchors, strict=True))
            for p, q in zip(self.model.parameters(), copied.parameters(), strict=True):
                if id(p) in anchors:
                    q.copy_(anchors[id(p)])
        head, source = (copied.get_submodule(names[m]) for m in (self.head, self.source))
        self._copies.append((copied, source))
        return copied, head, source

    def shard(self, sample: Any, ranks: Ranks) -> None:
        """Shard the weights, and those of copies, over the ranks, until `gather`."""
        self.sharding = Sharding(self.model, [self.learns, self.source], sample, ranks)
        for model, source in self._copies:
            Sharding(model, [source], sample, ranks)

    def gather(self) -> None:
        """Give every rank the whole network again."""
        if self.sharding is not None:
            self.sharding.undo()
            self.sharding = None

    def close(self) -> None:
        """Stop watching; the normaliser is updated by every batch again, and dropout is back."""
        set_dropout(self._dropout, 1.0)
        if self._input is not None:
            self._input.close()
        if self.norm is not None:
            self.norm.track()
