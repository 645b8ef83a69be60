"""PEFT: make a source card for LoRA factors from the card of the weights they are added to."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fast.curvature.card import SourceCard
from fast.curvature.card.codes import Codes
from fast.curvature.card.file import fingerprint


def adapter_card(card: SourceCard, model: nn.Module) -> SourceCard:
    """The card of a network with fresh LoRA adapters, from that of the network without.

    A layer with adapters has the weight `W + s B A`, with `B = 0` at first. A step `dB` moves the
    weight by `s dB A`, so the diagonal for B is `s^2 F_W (A * A)^T`, where `F_W` is the diagonal
    for W. The diagonal for A is zero while B is zero, so A stays free: A affects the source only
    through B. The forecast takes A as it is now.

        card = fast.SourceCard.load("model.card.safetensors")
        model = peft.get_peft_model(pretrained, config)
        fast.Adaptation(model, train, method="ewc", card=adapter_card(card, model))

    Args:
        card: the card of the network before `get_peft_model`, unbound or bound to that network.
        model: what `get_peft_model` returned, before its first step.

    Returns:
        a card that is bound to `model`, for its trainable parameters only.

    Raises:
        ValueError: the card covers none of the layers with LoRA factors, the weights are not those
            of the card, or the adapters have learned already.
    """
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    diagonals: dict[Tensor, Tensor] = {}
    for weight, a, b, scale, transposed in _factors(model):
        name = names[weight]
        plain = _plain_name(name)
        if plain not in card.entries or card.fingerprints[plain] != fingerprint(weight):
            raise ValueError(
                f"card: it does not cover {plain!r} with these weights; estimate the card of the "
                "network that get_peft_model is given"
            )
        if b.any():
            raise ValueError(
                f"model: the adapters of {plain!r} have learned already, and the card is of the "
                "weights without them; fast.SourceCard.estimate(model, ...) makes one as it is now"
            )
        diagonal = card.entries[plain].decode()
        if transposed:
            diagonal = diagonal.T
        squares = a.detach().float().cpu().square()
        diagonals[b] = scale**2 * diagonal @ squares.T
        diagonals[a] = squares.new_zeros(squares.shape)
    if not diagonals:
        raise ValueError(f"model: a {type(model).__name__} without LoRA factors of linear layers")
    entries = {names[p]: Codes.of(diagonal) for p, diagonal in diagonals.items()}
    for p, name in names.items():  # biases, say, that are trained beside the adapters
        if p.requires_grad and p not in diagonals and _plain_name(name) in card.entries:
            entries[name] = card.entries[_plain_name(name)]
    params = dict(model.named_parameters())
    fingerprints = {name: fingerprint(params[name]) for name in entries}
    mapped = dataclasses.replace(
        card, entries=entries, fingerprints=fingerprints, _names={}, _anchors={}
    )
    return mapped.bind(model)


def _factors(model: nn.Module) -> Iterator[tuple[Tensor, Tensor, Tensor, float, bool]]:
    """For each active adapter of a linear layer, yield W, A `[r, in]`, B `[out, r]`, s, and whether
    W is stored as `[in, out]`."""
    layers: Any = (m for m in model.modules() if isinstance(m, LoraLayer))
    for layer in layers:
        for name in layer.active_adapters:
            if name not in layer.lora_A:
                continue
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            if a.dim() != 2 or layer.use_dora.get(name):
                kind = "DoRA" if layer.use_dora.get(name) else type(layer.base_layer).__name__
                raise ValueError(f"model: no card is known for the adapters of a {kind}")
            transposed = bool(getattr(layer, "fan_in_fan_out", False))
            yield layer.base_layer.weight, a, b, float(layer.scaling[name]), transposed


def _plain_name(name: str) -> str:
    """The name of a parameter before `get_peft_model`."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")
