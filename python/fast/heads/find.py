"""Find the layer that makes a classifier's logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from fast.data.trees import pick
from fast.heads.forward import forward_logits, hooked, unwrap

# The names of the classifier in timm, torchvision, transformers and most hand-written networks.
CONVENTIONS = ("fc", "classifier", "head", "heads", "score", "linear", "logits", "output", "out")

HeadLayer = nn.Linear | nn.Conv2d


# Where a module is registered: (parent module, attribute name, qualified name), several times when
# it is shared.
Places = tuple[tuple[nn.Module, str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Head:
    """The layer that makes the logits, and every place where it is registered.

    Attributes:
        module: `nn.Linear`, or a 1x1 `nn.Conv2d`.
        places: where it is registered.
        auxiliary: names of layers that have as many outputs but did not run: heads that are used
            in training only.
    """

    module: HeadLayer
    places: Places
    auxiliary: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.places[0][2]

    def put(self, module: nn.Module) -> None:
        """Put another module in the head's place, everywhere."""
        put_at(self.places, module)


def is_head_layer(module: nn.Module) -> TypeGuard[HeadLayer]:
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


@torch.no_grad()
def is_plain(layer: HeadLayer) -> bool:
    """Whether a layer is what its weight and bias say: weight norm makes the weight of other
    parameters, and a class of its own may compute something else."""
    if not layer.state_dict().keys() <= {"weight", "bias"}:
        return False
    x = layer.weight[:1]
    plain = F.conv2d if isinstance(layer, nn.Conv2d) else F.linear
    return torch.allclose(layer(x), plain(x, layer.weight, layer.bias), rtol=1e-3, atol=1e-6)


def own_parameters(model: nn.Module, layer: nn.Module) -> list[nn.Parameter]:
    """Parameters of a layer that no other layer shares, as a tied embedding would."""
    inside = {id(m) for m in layer.modules()}
    others = (m for m in model.modules() if id(m) not in inside)
    elsewhere = {id(p) for m in others for p in m.parameters(recurse=False)}
    return [p for p in layer.parameters() if id(p) not in elsewhere]


def classes_of(layer: HeadLayer) -> int:
    """Number of logits that a head layer makes."""
    return layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features


def layer_like(layer: HeadLayer, num_classes: int, bias: bool) -> HeadLayer:
    """A new layer for the same features, with its own random initialisation."""
    options: Any = {"bias": bias, "device": layer.weight.device, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Conv2d):
        return nn.Conv2d(layer.in_channels, num_classes, 1, layer.stride, **options)  # type: ignore[arg-type]
    return nn.Linear(layer.in_features, num_classes, **options)


def find_head(model: nn.Module, sample: Any = None, name: str | None = None) -> Head:
    """Find the last linear layer (or 1x1 convolution) of a classifier.

    With a sample, the network runs once on two of its rows, in evaluation mode, and the head is the
    layer whose output becomes the logits. Without a sample, it is what timm's `get_classifier`
    returns, or else the last linear layer, if that has a customary name (`fc`, `classifier`,
    `head`, `score`, ...) or is the only one.

    Args:
        model: a classifier; a compiled or data-parallel one is unwrapped.
        sample: a batch of inputs, as `model` takes them (a tuple or mapping is unpacked).
        name: the name of the layer; None to find it.

    Raises:
        ValueError: there is no such layer, several layers could be the head, or it is part of
            compiled code.
    """
    model = unwrap(model)
    auxiliary: tuple[str, ...] = ()
    if name is not None:
        layer = _by_name(model, name)
    elif sample is None:
        layer = _by_convention(model)
    else:
        layer, auxiliary = _by_trace(model, sample)
    head = Head(module=layer, places=places_of(model, layer), auxiliary=auxiliary)
    if "_orig_mod" in head.name.split("."):
        part, _, _ = head.name.partition("._orig_mod")
        raise ValueError(
            f"the head {head.name} is in a compiled part of the network, where it cannot be "
            f"replaced: put the module inside in its place (model.{part} = model.{part}._orig_mod)"
        )
    return head


def places_of(model: nn.Module, layer: nn.Module) -> Places:
    """All the places where the model registers a layer.

    Raises:
        ValueError: the layer is the model.
    """
    places = tuple(
        (parent, attribute, f"{path}.{attribute}" if path else attribute)
        for path, parent in model.named_modules()
        for attribute, child in parent.named_children()
        if child is layer
    )
    if not places:
        raise ValueError(
            f"the whole model is one {type(layer).__name__}: there is no backbone to adapt. "
            "Wrap it: nn.Sequential(backbone, head)"
        )
    return places


def put_at(places: Places, module: nn.Module) -> None:
    """Register `module` at all of these places."""
    for parent, attribute, _ in places:
        setattr(parent, attribute, module)


def _candidates(model: nn.Module) -> list[tuple[str, HeadLayer]]:
    layers = [(name, m) for name, m in model.named_modules() if is_head_layer(m)]
    if not layers:
        kinds = sorted({type(m).__name__ for m in model.modules() if not list(m.children())})
        raise ValueError(
            f"model {type(model).__name__} has no linear head: no nn.Linear and no 1x1 nn.Conv2d "
            f"among its layers ({', '.join(kinds) or 'none'}). Add one: nn.Sequential(model, "
            "nn.LazyLinear(num_classes)), run once"
        )
    lazy = [n for n, m in layers if isinstance(m, LazyModuleMixin) and m.has_uninitialized_params()]
    if lazy:
        raise ValueError(f"{lazy[0]} is lazy: run the model once, so that it gets its weights")
    return layers


def _by_name(model: nn.Module, name: str) -> HeadLayer:
    candidates = _candidates(model)
    layer = dict(model.named_modules()).get(name)
    if layer is None or not is_head_layer(layer):
        there = "no layer of that name" if layer is None else f"a {type(layer).__name__} there"
        raise ValueError(
            f"head={name!r}: {type(model).__name__} has {there}; a head is an nn.Linear or a 1x1 "
            f"nn.Conv2d, such as {', '.join(n for n, _ in candidates[-5:])}"
        )
    return layer


def _by_convention(model: nn.Module) -> HeadLayer:
    candidates = _candidates(model)
    last = candidates[-1][1]
    get_classifier: Callable[[], Any] | None = getattr(model, "get_classifier", None)
    if get_classifier is not None and is_head_layer(classifier := get_classifier()):
        return classifier
    modules = [getattr(model, name, None) for name in CONVENTIONS]
    if isinstance(model, nn.Sequential):
        modules.append(model)
    by_name = [m for m in modules if isinstance(m, nn.Module) and last in m.modules()]
    # A hidden layer may be called `fc`, too, so a name alone is not enough.
    if by_name or len({id(layer) for _, layer in candidates}) == 1:
        return last
    names = ", ".join(name for name, _ in candidates[-5:])
    raise ValueError(
        f"cannot tell which layer of {type(model).__name__} makes the logits (linear layers: ... "
        f"{names}). Pass sample=, a batch of inputs, and it is found by running the model; or its "
        "name, head="
    )


@torch.no_grad()
def _by_trace(model: nn.Module, sample: Any) -> tuple[HeadLayer, tuple[str, ...]]:
    """The layer that makes the logits, and the names of auxiliary heads."""
    candidates = _candidates(model)
    calls: list[tuple[HeadLayer, Tensor]] = []

    def record(module: HeadLayer, _: Any, output: Tensor) -> None:
        calls.append((module, output.clone()))

    hooks = [m.register_forward_hook(record) for m in dict.fromkeys(m for _, m in candidates)]
    with hooked(model, *hooks):
        logits = forward_logits(model, pick(sample, slice(2)))
    layer = _exactly(calls, logits)
    if layer is None and getattr(model, "num_classes", None) == 0:
        raise ValueError(
            f"{type(model).__name__} has no head (num_classes=0) and ends in features: add one, "
            f"nn.Sequential(model, nn.Linear({logits.shape[-1]}, num_classes))"
        )
    layer = layer or _most_likely(calls, logits)
    if layer is None:
        raise ValueError(
            f"no linear layer of {type(model).__name__} makes its logits of shape "
            f"{list(logits.shape)} (ran: {len(calls)} linear calls). The head must be an nn.Linear "
            "or a 1x1 nn.Conv2d, called as a module; of several outputs the logits are the first"
        )
    ran = {id(m) for m, _ in calls}
    width = classes_of(layer)
    return layer, tuple(n for n, m in candidates if id(m) not in ran and classes_of(m) == width)


def _exactly(calls: list[tuple[HeadLayer, Tensor]], logits: Tensor) -> HeadLayer | None:
    """The layer whose output is the logits."""
    for module, output in reversed(calls):
        if output.numel() == logits.numel() and torch.equal(output.flatten(), logits.flatten()):
            return module
    return None


def _most_likely(calls: list[tuple[HeadLayer, Tensor]], logits: Tensor) -> HeadLayer | None:
    """The layer whose output may become the logits; `check_alone` tells whether it does."""
    # Something may follow the layer, such as a log-softmax or a mean over positions.
    for module, _ in reversed(calls):
        width = classes_of(module)
        if logits.dim() > 1 and width in (logits.shape[1], logits.shape[-1]):
            return module
    # The head may be padded to a round number of classes, with the logits its first outputs.
    for module, output in reversed(calls):
        if logits.dim() == 2 == output.dim() and torch.equal(output[:, : logits.shape[1]], logits):
            return module
    return None
