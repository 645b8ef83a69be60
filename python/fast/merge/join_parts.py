"""Take an adapted network apart into the plain networks of its tasks."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fast.data.trees import move
from fast.heads import (
    drop_adapters,
    evaluating,
    features_of,
    fold_head,
    forward_logits,
    places_of,
    plain_batch_norm,
    task_head,
)
from fast.heads.find import HeadLayer, find_head, layer_like, put_at
from fast.heads.forward import input_errors
from fast.heads.replace import announce_classes
from fast.heads.rows import mean_over_positions
from fast.heads.task import two_task_modules
from fast.merge.joined import own_state
from fast.models.saved import load_saved

Rows = tuple[Tensor, Tensor]
# The attribute that holds the source's part of a head or a norm for both tasks.
SOURCE_MODULES = ("source", "source_norm")


@dataclass(kw_only=True)
class Part:
    """A plain network with its head.

    Attributes:
        name: name of the head in the network.
        layer: the head.
    """

    network: nn.Module
    name: str
    layer: HeadLayer

    def put(self, rows: Rows) -> None:
        """Replace the head by one with this weight `[C, D]` and bias `[C]`."""
        weight, bias = rows
        layer = layer_like(self.layer, len(weight), bias=True)
        with torch.no_grad():
            layer.weight.copy_(weight.view_as(layer.weight))
            layer.bias.copy_(bias)  # type: ignore[union-attr]
        put_at(places_of(self.network, self.layer), layer)
        announce_classes(self.network, layer, len(weight))
        self.layer = layer

    def features(self, batches: Iterable[Any], name: str) -> Tensor:
        """The features that the head sees, averaged over positions: `[N, D]` in float64.

        Args:
            name: name of the data, for messages.

        Raises:
            ValueError: the network does not take the inputs, or its logits are not what the head
                makes of these features.
        """
        parts: list[Tensor] = []
        for inputs in batches:
            inputs = move(inputs, self.layer.weight.device)
            with input_errors(name, inputs, self.network):
                head_inputs = features_of(self.network, self.layer, inputs)
            rows = mean_over_positions(head_inputs.double(), self.layer)
            if not parts:
                self._check_linear(inputs, rows)
            parts.append(rows)
        return torch.cat(parts)

    def _check_linear(self, inputs: Any, features: Tensor) -> None:
        """Raise ValueError unless the logits are a linear function of the features."""
        with evaluating(self.network):
            logits = forward_logits(self.network, inputs).double()
        from_head = logits_from(features, rows_of(self.layer))
        # A log-softmax behind the head takes a constant away.
        alike = from_head.shape == logits.shape and torch.allclose(
            from_head.log_softmax(1), logits.log_softmax(1), rtol=1e-3, atol=1e-3
        )
        if not alike:
            raise ValueError(
                f"join needs logits [B, C] that {self.name} makes of one row of features per "
                f"sample; {type(self.network).__name__} answers {list(logits.shape)}, and the head "
                f"makes {list(from_head.shape)} of its features: something follows it"
            )


def rows_of(layer: HeadLayer) -> Rows:
    """The weight `[C, D]` and the bias `[C]` of a head, in float64."""
    weight = layer.weight.detach().double().flatten(1)
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().double()
    return weight, bias


def logits_from(features: Tensor, rows: Rows) -> Tensor:
    """The logits `[N, C]` that a head makes of features `[N, D]`."""
    return features @ rows[0].T + rows[1]


@dataclass(frozen=True, kw_only=True)
class TwoHeads:
    """Plain networks for two tasks, and the rows of both heads.

    Attributes:
        parts: the source's network and the target's, which share the parameters that both tasks
            have in common; or one network, where the tasks differ by their heads alone.
        source, target: the rows of the heads.
    """

    parts: tuple[Part, ...]
    source: Rows
    target: Rows


def two_heads(model: nn.Module) -> TwoHeads:
    """The plain networks of an adapted network, which stays as it is.

    Raises:
        ValueError: a module other than a head, a batch norm or an adapter answers both tasks.
    """
    head = task_head(model)
    assert head is not None
    name = places_of(model, head)[0][2]
    target = fold_head(copy.deepcopy(model))
    networks = [target]
    if len(two_task_modules(model)) > 1:
        networks.insert(0, _source_network(model, target))
    parts = tuple(_part(network, name) for network in networks)
    return TwoHeads(parts=parts, source=rows_of(head.source), target=rows_of(parts[-1].layer))


def saved_heads(folder: str | Path, model: nn.Module, sample: Any) -> TwoHeads:
    """The plain networks in a folder that `Result.save` wrote.

    Args:
        model: the plain architecture, with a head for any number of classes.
        sample: a batch of inputs, to find the head by.

    Raises:
        FileNotFoundError, ValueError: see `fast.models.saved.load_saved`; or the folder lacks what
            the source task needs.
    """
    networks = load_saved(folder, model, sample)
    if networks.source is None:
        raise ValueError(f"{networks.note}: join needs the head of both tasks")
    name = find_head(networks.target, sample).name
    source, target = _part(networks.source, name), _part(networks.target, name)
    parts = (source, target) if own_state(networks.source, networks.target, name) else (target,)
    return TwoHeads(parts=parts, source=rows_of(source.layer), target=rows_of(target.layer))


def _part(network: nn.Module, name: str) -> Part:
    layer: Any = network.get_submodule(name)
    return Part(network=network.eval(), name=name, layer=layer)


def _source_network(model: nn.Module, target: nn.Module) -> nn.Module:
    """The plain network that answers the source task.

    It shares the parameters that both tasks have in common with `target`.
    """
    theirs = dict(target.named_parameters())
    own = {id(p) for m in two_task_modules(model) for p in m.parameters()}
    common = {
        id(p): theirs[name]
        for name, p in model.named_parameters()
        if name in theirs and id(p) not in own
    }
    network = drop_adapters(copy.deepcopy(model, common))
    for module in two_task_modules(network):
        plain = next((getattr(module, n) for n in SOURCE_MODULES if hasattr(module, n)), None)
        if plain is None:
            raise ValueError(
                f"join cannot take the two tasks apart: {type(module).__name__} answers both, and "
                "is neither a head nor a batch norm"
            )
        put_at(places_of(network, module), plain)
    head = task_head(model)
    assert head is not None
    layer = network.get_submodule(places_of(model, head)[0][2])
    announce_classes(network, layer, len(head.source.weight))
    return plain_batch_norm(network)
