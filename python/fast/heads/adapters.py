"""Low-rank adapters (LoRA: Hu et al. 2022, arXiv 2106.09685) of the target, beside frozen weights.

The layers are PEFT's, one beside each linear layer and convolution of the backbone. Where a weight
is read by others than its layer, as in attention, or its layer does more than PEFT's knows of, the
adapter is added to what is read. Inside `fast.source_task` they are off: no weight that the source
task uses has changed then, and it is answered as it was, to the bit.
"""

from __future__ import annotations

import importlib.util
import math
import re
import sys
import warnings
from collections import Counter
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from fast.data.trees import pick
from fast.errors import import_library
from fast.heads.batch_norm import per_task_parameters
from fast.heads.find import places_of, put_at
from fast.heads.forward import forward_logits, hooked
from fast.heads.task import Overlay, TwoTask, put_over, take_off

NAME = "target"
# A rank that costs little even where no layer of a very small network can have it.
CHEAP = 32
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
# The largest weight of a convolution to which `B A` is added. The sum costs the weight's gradient,
# and saves the passes of `A` and `B` over the maps: a step of a convolution of 16, 64, 128, 256 and
# 512 channels then takes 0.5, 0.8, 1.0, 1.3 and 1.8 of the time (one thread of a CPU, rank 8, 3x3;
# 1x1 of 64, 128, 256 and 1024 channels 0.6, 0.7, 0.9 and 1.2).
SUMMED = 2**17


class _Adapter(Overlay, TwoTask):
    """A module with adapters, which gives the source task its plain weights."""

    def tensors(self) -> dict[str, Tensor]:
        """For each adapter: the source's weight, `A` and `B`, see `adapter_state`."""
        raise NotImplementedError

    def plain(self, *, merged: bool) -> nn.Module:
        """The module without adapters.

        Args:
            merged: they are added to its weights first.
        """
        raise NotImplementedError


class _Beside(_Adapter):
    """One of PEFT's layers, around a layer that is called.

    In small convolutions, `B A` is added to the weight in each pass, and does not run beside it.
    """

    base_layer: Any

    def __getattr__(self, name: str) -> Any:
        # Code that pads for a convolution reads its stride, which PEFT's layer does not have.
        try:
            return cast(Any, super()).__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # the layer is being copied or unpickled
                raise
            return getattr(self.base_layer, name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        base = self.base_layer
        if self.answers_source:
            return base(*args, **kwargs)
        is_summed = isinstance(base, CONVOLUTIONS) and base.weight.numel() <= SUMMED
        if not is_summed:
            return cast(Any, super()).forward(*args, **kwargs)
        weight = (base.weight + self._difference()).to(base.weight.dtype)
        return base._conv_forward(*args, **kwargs, weight=weight, bias=base.bias)

    def _difference(self) -> Tensor:
        """What the adapter adds to the weight of its convolution, in that weight's shape."""
        parts = self.tensors()
        # PEFT's factor on it is 1, see `_put_beside`.
        return (parts["B"].flatten(1) @ parts["A"].flatten(1)).view_as(parts["weight"])

    def tensors(self) -> dict[str, Tensor]:
        layer: Any = self
        a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
        return {"weight": self.base_layer.weight, "A": a, "B": b}

    def plain(self, *, merged: bool) -> nn.Module:
        layer: Any = self
        take_off(layer)
        if merged:
            layer.merge()
        return layer.base_layer


class _Read(_Adapter):
    """A module whose weights others read, and get with the adapters added.

    Attributes:
        lora_A, lora_B: the factors, by the names of the weights.
    """

    lora_A: nn.ParameterDict
    lora_B: nn.ParameterDict

    def read(self, name: str) -> Tensor | None:
        """A weight, as the task needs it that is answered."""
        weight = self._parameters[name]  # type: ignore[attr-defined]
        if self.answers_source or weight is None or name not in self.lora_A:
            return weight
        return (weight + self.difference(name)).to(weight.dtype)

    def difference(self, name: str) -> Tensor:
        weight = self._parameters[name]  # type: ignore[attr-defined]
        return (self.lora_B[name] @ self.lora_A[name]).view_as(weight)

    def tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, a in self.lora_A.items():
            weight = self._parameters[name]  # type: ignore[attr-defined]
            tensors |= {name: weight, f"{name}.A": a, f"{name}.B": self.lora_B[name]}
        return tensors

    @torch.no_grad()
    def plain(self, *, merged: bool) -> nn.Module:
        module: Any = self
        if merged:
            for name in self.lora_A:
                module._parameters[name].add_(self.difference(name))
        del module.lora_A, module.lora_B
        vars(module).pop("answers_source", None)
        take_off(module)
        return module


def _sum(name: str) -> Any:
    return property(lambda module: module.read(name))


class _ReadLayer(_Read):
    weight = _sum("weight")


class _ReadAttention(_Read):
    in_proj_weight, q_proj_weight, k_proj_weight, v_proj_weight = map(_sum, ATTENTION)


def adapters(model: nn.Module) -> dict[str, Any]:
    """The modules with our adapters, by their names in the plain network."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _Adapter)}


def add_adapters(model: nn.Module, head: nn.Module, rank: int, sample: Any) -> nn.Module:
    """Give the backbone adapters that learn the target, in place, and freeze all that both tasks
    use.

    An adapter adds `B A x` to what its layer makes of `x`. `B` is zero at first, so the network
    answers as before. Linear layers, convolutions without groups and `nn.MultiheadAttention` get
    one each, except for the head, and for layers that cannot learn (`requires_grad`) or share their
    weight with another layer. What is the target's own goes on learning: its head, and batch norms
    that are kept per task.

    Args:
        model: a network after `fast.replace_head`.
        head: its new head.
        rank: r, the rows of `A` `[r, in]` and the columns of `B` `[out, r]`.
        sample: a batch of inputs, as `model` takes them.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: there is no layer to adapt, the rank is more than any can have, or there are
            adapters already.
    """
    beside, read = _adaptable(model, head, sample)
    if not beside and not read:
        raise ValueError(
            f"method='adapter': {type(model).__name__} has no layer to adapt: its backbone needs "
            "an nn.Linear, an nn.MultiheadAttention or a convolution without groups, which can "
            "learn (requires_grad); use method='fast' with tasks='together'"
        )
    weights = [model.get_parameter(name) for name in (*(f"{n}.weight" for n in beside), *read)]
    most = max(min(weight.flatten(1).shape) for weight in weights)
    if rank > max(most, CHEAP):
        raise ValueError(
            f"adapter_rank={rank} is more than the rank {most} that the widest layer of "
            f"{type(model).__name__} can have: give at most that"
        )
    _inject(model, beside, read, rank, head)
    return model


def attach_adapters(
    model: nn.Module, state: dict[str, Tensor], head: nn.Module | None = None
) -> nn.Module:
    """Give a network the adapters of a file, in place, with the source's weights below them.

    Args:
        model: a network of the target, of `fast.replace_head` or plain.
        state: what `adapter_state` gave.
        head: the network's head, which goes on learning.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: the adapters are of another network; the message names the first layer.
    """
    factors = {key.removesuffix(".A"): a for key, a in state.items() if key.endswith(".A")}
    # An adapter beside a layer has the layer's name, one of a weight that is read the weight's.
    beside = [name for name in factors if f"{name}.weight" in state]
    read = [name for name in factors if name not in beside]
    plain = dict(model.named_parameters(remove_duplicate=False))
    for name in factors:
        weight = f"{name}.weight" if name in beside else name
        if weight not in state or plain.get(weight, torch.empty(0)).shape != state[weight].shape:
            raise ValueError(f"the adapters are of another network: {name} differs")
    _inject(model, beside, read, max(map(len, factors.values())), head)
    with torch.no_grad():
        for name, tensor in adapter_state(model).items():
            tensor.copy_(state[name])
    return model


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """For each layer `NAME` with an adapter: the source's weight `NAME.weight`, and the factors
    `NAME.A` `[r, in, ...]` and `NAME.B` `[out, r, ...]`, whose product is the difference from it.
    For a weight `NAME` that is read with its adapter: `NAME`, `NAME.A` `[r, M]` and `NAME.B`
    `[out, r]`, for a weight of `M` numbers for each output. Empty if there are no adapters."""
    return {
        f"{name}.{part}": tensor
        for name, module in adapters(model).items()
        for part, tensor in module.tensors().items()
    }


def merge_adapters(model: nn.Module) -> nn.Module:
    """Add each adapter to the weight of its layer, in place: a plain network for the target alone.

    Parameters that were frozen for the source's sake can learn again.
    """
    return _without_adapters(model, merged=True)


def drop_adapters(model: nn.Module) -> nn.Module:
    """Take the adapters away, in place: the source's weights alone. See `merge_adapters`."""
    return _without_adapters(model, merged=False)


def _without_adapters(model: nn.Module, *, merged: bool) -> nn.Module:
    for module in adapters(model).values():
        frozen = module.frozen
        del module.frozen
        put_at(places_of(model, module), module.plain(merged=merged))
        for parameter in frozen:
            parameter.requires_grad_(True)
    return model


def _adaptable(model: nn.Module, head: nn.Module, sample: Any) -> tuple[list[str], list[str]]:
    """Names of the layers that get an adapter beside them, and of the weights that get one added.

    Attention, and an `nn.TransformerEncoderLayer` in evaluation, read weights of layers that they
    never call, and would miss an adapter beside these. A layer of a derived class may do more with
    its weight than its parent.
    """
    inside = set(head.modules())
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    layers: dict[str, nn.Module] = {}
    weights: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        for kind in () if module in inside else _kinds_of_weights(module):
            weight = getattr(module, kind)
            learns = isinstance(weight, nn.Parameter) and weight.requires_grad
            if learns and owners[id(weight)] == 1:  # else two adapters are merged into one weight
                weights[f"{name}.{kind}"] = weight
                if kind == "weight":
                    layers[name] = module
    ran = _called_layers(model, [*layers.values()], sample)
    beside = [name for name, layer in layers.items() if layer in ran and _suits_peft(layer)]
    for name in beside:
        del weights[f"{name}.weight"]
    return beside, _weights_used(model, weights, sample)


def _kinds_of_weights(module: nn.Module) -> tuple[str, ...]:
    """Names of the weights of a module that can have adapters, if they are its own parameters."""
    if nn.utils.parametrize.is_parametrized(module):  # they are computed from others
        return ()
    if isinstance(module, nn.MultiheadAttention):
        return ATTENTION
    without_groups = isinstance(module, CONVOLUTIONS) and module.groups == 1
    return ("weight",) if without_groups or isinstance(module, _linear_kinds()) else ()


def _weights_used(model: nn.Module, weights: dict[str, nn.Parameter], sample: Any) -> list[str]:
    """Names of the weights on which the answers depend."""
    if not weights:
        return []
    with hooked(model), torch.enable_grad():
        logits = forward_logits(model, pick(sample, slice(2)))
        grads = torch.autograd.grad(logits.float().sum(), [*weights.values()], allow_unused=True)
    return [name for name, grad in zip(weights, grads, strict=True) if grad is not None]


def _computes_as_its_kind(layer: Any, args: tuple[Any, ...], output: Any) -> bool:
    """Whether a layer computes what torch's own class would: a derived convolution may pad by
    itself, or standardise its weight."""
    kinds = (*_linear_kinds(), *CONVOLUTIONS)
    kind: Any = next(c for c in type(layer).__mro__ if c in kinds)
    if kind is type(layer):
        return True
    if len(args) != 1:
        return False
    if kind in CONVOLUTIONS:
        plain = kind._conv_forward(layer, *args, layer.weight, layer.bias)
    else:
        plain = kind.forward(layer, *args)
    return output.shape == plain.shape and torch.allclose(output, plain, rtol=1e-4)


def _linear_kinds() -> tuple[type, ...]:
    transformers = sys.modules.get("transformers.pytorch_utils")
    return (nn.Linear,) if transformers is None else (nn.Linear, transformers.Conv1D)


def _suits_peft(layer: Any) -> bool:
    """Whether PEFT's adapter of a convolution sees what the convolution sees."""
    if not isinstance(layer, CONVOLUTIONS):
        return True
    return set(layer.dilation) == {1} and layer.padding_mode == "zeros"


def _called_layers(model: nn.Module, layers: list[nn.Module], sample: Any) -> set[nn.Module]:
    """The layers whose `forward` is called, and does no more than their kind's.

    Forward hooks cannot tell, because torch takes another path where there are hooks.
    """
    ran: set[nn.Module] = set()

    def run(layer: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if _computes_as_its_kind(layer, args, output):
            ran.add(layer)
        return output

    own = {layer: vars(layer)["forward"] for layer in layers if "forward" in vars(layer)}
    for layer in layers:
        layer.forward = partial(run, layer, layer.forward)  # type: ignore[method-assign]
    try:
        with hooked(model):
            forward_logits(model, pick(sample, slice(2)))
    finally:
        for layer in layers:
            del layer.forward
            if layer in own:  # Accelerate gives modules a `forward` of their own
                layer.forward = own[layer]
    return ran


def _inject(
    model: nn.Module, beside: list[str], read: list[str], rank: int, head: nn.Module | None
) -> None:
    """Give the layers and weights of these names new adapters, and freeze what both tasks use."""
    peft = import_peft()
    kinds = (peft.tuners.tuners_utils.BaseTunerLayer, _Adapter)
    if any(isinstance(m, kinds) for m in model.modules()):
        raise ValueError(
            "method='adapter': the network has adapters of PEFT already; merge them "
            "(merge_and_unload), or train them with method='fast'"
        )
    learns = [p for p in model.parameters() if p.requires_grad]
    own = {id(p) for p in per_task_parameters(model)}
    own |= set() if head is None else {id(p) for p in head.parameters()}
    if beside:
        _put_beside(model, beside, rank)
    for name in read:
        _put_within(model, name, rank)
    for adapter in adapters(model).values():
        adapter.frozen = tuple(p for p in learns if id(p) not in own)
    for parameter in learns:  # PEFT has frozen them all
        parameter.requires_grad_(id(parameter) in own)


def _put_beside(model: nn.Module, names: list[str], rank: int) -> None:
    """Put PEFT's layers around these."""
    peft = import_peft()
    places = {name: places_of(model, model.get_submodule(name)) for name in names}
    config = peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules="|".join(re.escape(name) for name in names)
    )
    with warnings.catch_warnings():
        # PEFT finds out by itself which weights are stored as `[in, out]`, and warns about it.
        warnings.filterwarnings("ignore", ".*fan_in_fan_out")
        peft.inject_adapter_in_model(config, model, NAME)
    del model.peft_config
    for name in names:
        adapter: Any = model.get_submodule(name)
        put_over(adapter, _Beside)
        put_at(places[name], adapter)


def _put_within(model: nn.Module, name: str, rank: int) -> None:
    """Add an adapter to a weight, by whomever it is read."""
    path, _, kind = name.rpartition(".")
    module: Any = model.get_submodule(path)
    weight = module._parameters[kind]
    if not isinstance(module, _Read):
        module.lora_A, module.lora_B = nn.ParameterDict(), nn.ParameterDict()
        put_over(module, _ReadAttention if kind in ATTENTION else _ReadLayer)
    a, b = weight.new_empty(rank, weight[0].numel()), weight.new_zeros(len(weight), rank)
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))  # as PEFT does
    module.lora_A[kind], module.lora_B[kind] = nn.Parameter(a), nn.Parameter(b)


def import_peft() -> Any:
    """The library that the layers come from.

    Raises:
        ImportError: it is not installed, or cannot be imported.
    """
    if importlib.util.find_spec("peft") is None:
        raise ImportError(
            "method 'adapter', the default of tasks='switched', needs PEFT: pip install "
            "'fast-task-adaptation[adapter]'"
        )
    return import_library("peft", "method 'adapter' needs")
