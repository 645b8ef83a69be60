"""Low-rank adapters (LoRA: Hu et al. 2022, arXiv 2106.09685) of the target, beside frozen weights.

The layers are PEFT's, one beside each linear layer and convolution of the backbone. Inside
`fast.source_task` they are off: no weight that the source task uses has changed then, and it is
answered as it was, to the bit.
"""

from __future__ import annotations

import importlib.util
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
# The largest weight of a convolution to which `B A` is added. The sum costs the weight's gradient,
# and saves the passes of `A` and `B` over the maps: a step of a convolution of 16, 64, 128, 256 and
# 512 channels then takes 0.5, 0.8, 1.0, 1.3 and 1.8 of the time (one thread of a CPU, rank 8, 3x3;
# 1x1 of 64, 128, 256 and 1024 channels 0.6, 0.7, 0.9 and 1.2).
SUMMED = 2**17


class _Adapter(Overlay, TwoTask):
    """One of PEFT's layers, which gives the source task its plain layer.

    Attributes:
        frozen: parameters of the network that do not learn because adapters do.
    """

    base_layer: Any
    frozen: tuple[nn.Parameter, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        base = self.base_layer
        if self.answers_source:
            return base(*args, **kwargs)
        if not _is_summed(self):
            return cast(Any, super()).forward(*args, **kwargs)
        weight = (base.weight + _difference(self)).to(base.weight.dtype)
        return base._conv_forward(*args, **kwargs, weight=weight, bias=base.bias)


def _is_summed(layer: Any) -> bool:
    """Whether `B A` is added to a weight in each pass, and does not run beside it."""
    base = layer.base_layer
    return isinstance(base, CONVOLUTIONS) and base.weight.numel() <= SUMMED


def _difference(layer: Any) -> Tensor:
    """What an adapter adds to the weight of its convolution, in that weight's shape."""
    parts = _parts(layer)
    # PEFT's factor on it is 1, see `_inject`.
    return (parts["B"].flatten(1) @ parts["A"].flatten(1)).view_as(parts["weight"])


def adapters(model: nn.Module) -> dict[str, Any]:
    """The layers with our adapters, by their names in the plain network."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _Adapter)}


def add_adapters(model: nn.Module, head: nn.Module, rank: int, sample: Any) -> nn.Module:
    """Give the backbone adapters that learn the target, in place, and freeze all that both tasks
    use.

    An adapter adds `B A x` to what its layer makes of `x`. `B` is zero at first, so the network
    answers as before. Linear layers and convolutions get one each, except for the head, and for
    layers that cannot learn (`requires_grad`), share their weight with another layer, have groups,
    dilation or another padding than zeros, or do not run by themselves. What is the target's own
    goes on learning: its head, and batch norms that are kept per task.

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
    names = _adaptable(model, head, sample)
    if not names:
        raise ValueError(
            f"method='adapter': {type(model).__name__} has no layer to adapt: its backbone needs "
            "an nn.Linear or a convolution without groups that can learn (requires_grad), is "
            "called as a layer and does no more than one; use method='fast' with tasks='together'"
        )
    weights: list[Any] = [model.get_submodule(name).weight for name in names]
    most = max(min(weight.flatten(1).shape) for weight in weights)
    if rank > max(most, CHEAP):
        raise ValueError(
            f"adapter_rank={rank} is more than the rank {most} that the widest layer of "
            f"{type(model).__name__} can have: give at most that"
        )
    _inject(model, names, rank, head)
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
    ranks = {name.removesuffix(".A"): len(a) for name, a in state.items() if name.endswith(".A")}
    modules = dict(model.named_modules())
    for name in ranks:
        weight, own = getattr(modules.get(name), "weight", None), state.get(f"{name}.weight")
        if own is None or not isinstance(weight, Tensor) or weight.shape != own.shape:
            raise ValueError(f"the adapters are of another network: {name} differs")
    _inject(model, list(ranks), max(ranks.values()), head)
    with torch.no_grad():
        for name, layer in adapters(model).items():
            for part, tensor in _parts(layer).items():
                tensor.copy_(state[f"{name}.{part}"])
    return model


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """For each layer `NAME` with an adapter: the source's weight `NAME.weight`, and the factors
    `NAME.A` `[r, in, ...]` and `NAME.B` `[out, r, ...]`, whose product is the difference from it.
    Empty if there are no adapters."""
    return {
        f"{name}.{part}": tensor
        for name, layer in adapters(model).items()
        for part, tensor in _parts(layer).items()
    }


def merge_adapters(model: nn.Module) -> nn.Module:
    """Add each adapter to the weight of its layer, in place: a plain network for the target alone.

    Parameters that were frozen for the source's sake can learn again.
    """
    for layer in adapters(model).values():
        take_off(layer)
        layer.merge()
        put_at(places_of(model, layer), layer.base_layer)
        for parameter in layer.frozen:
            parameter.requires_grad_(True)
        del layer.frozen
    return model


def _parts(layer: Any) -> dict[str, Tensor]:
    a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
    return {"weight": layer.base_layer.weight, "A": a, "B": b}


def _adaptable(model: nn.Module, head: nn.Module, sample: Any) -> list[str]:
    """Names of the layers that get an adapter."""
    inside, linear = set(head.modules()), _linear_kinds()
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    names = {}
    for name, layer in model.named_modules():
        simple = isinstance(layer, CONVOLUTIONS) and _is_simple(layer)
        if not (simple or isinstance(layer, linear)) or layer in inside or not _has_weight(layer):
            continue
        if owners[id(layer.weight)] == 1:  # else two adapters would be merged into one weight
            names[name] = layer
    ran = _that_run(model, list(names.values()), sample)
    return [name for name, layer in names.items() if layer in ran]


def _has_weight(layer: nn.Module) -> bool:
    """Whether the weight is a parameter that can learn, not computed from others (weight norm)."""
    weight = layer.weight
    return (
        isinstance(weight, nn.Parameter)
        and weight.requires_grad
        and not nn.utils.parametrize.is_parametrized(layer)
    )


def _as_its_kind(layer: Any, args: tuple[Any, ...], output: Any) -> bool:
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


def _is_simple(layer: Any) -> bool:
    """Whether PEFT's adapter of a convolution sees what the convolution sees."""
    return layer.groups == 1 and set(layer.dilation) == {1} and layer.padding_mode == "zeros"


def _that_run(model: nn.Module, layers: list[nn.Module], sample: Any) -> set[nn.Module]:
    """The layers whose `forward` is called, and does no more than their kind's.

    Attention, and an `nn.TransformerEncoderLayer` in evaluation, read the weights of layers that
    they never call, and would miss an adapter. Forward hooks cannot find these, because torch takes
    another path where there are hooks.
    """
    ran: set[nn.Module] = set()

    def run(layer: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if _as_its_kind(layer, args, output):
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


def _inject(model: nn.Module, names: list[str], rank: int, head: nn.Module | None) -> None:
    peft = import_peft()
    if any(isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer) for m in model.modules()):
        raise ValueError(
            "method='adapter': the network has adapters of PEFT already; merge them "
            "(merge_and_unload), or train them with method='fast'"
        )
    learns = [p for p in model.parameters() if p.requires_grad]
    own = {id(p) for p in per_task_parameters(model)}
    own |= set() if head is None else {id(p) for p in head.parameters()}
    frozen = tuple(p for p in learns if id(p) not in own)
    layers = {name: model.get_submodule(name) for name in names}
    places = {name: places_of(model, layer) for name, layer in layers.items()}
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
        put_over(adapter, _Adapter)
        adapter.frozen = frozen
        put_at(places[name], adapter)
    for parameter in learns:  # PEFT has frozen them all
        parameter.requires_grad_(id(parameter) in own)


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
