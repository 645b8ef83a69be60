"""Replace a classifier's head by a maximum-entropy one, keeping the source head; and fold it back.

With zero weights on normalised features, softmax is uniform, its entropy is log C, and the error
that reaches the backbone is W^T (p - y) = 0: the first error stays in the head (Varno et al. 2020,
arXiv 2007.01388, section 3).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from fast import dtensor
from fast.data.labels import check_num_classes
from fast.data.trees import pick
from fast.errors import first_line
from fast.heads.adapters import merge_adapters
from fast.heads.alone import check_alone, check_declared
from fast.heads.batch_norm import plain_batch_norm
from fast.heads.feature_norm import FeatureNorm
from fast.heads.find import (
    Head,
    HeadLayer,
    classes_of,
    find_head,
    layer_like,
    own_parameters,
    places_of,
    put_at,
)
from fast.heads.forward import check_takes, evaluating, forward_logits, hooked, unwrap
from fast.heads.task import TwoTask
from fastkernels.codes import compute_dtype


class TaskHead(nn.Module, TwoTask):
    """The target head `linear(norm(x))`; inside `fast.source_task` the source head answers instead.

    Attributes:
        norm: `FeatureNorm`, or None for a plain head.
        linear: the target layer, of the same class as the source layer.
        source: the source head, frozen.
        source_labels: the names of the source's classes in `model.config`, which transformers
            forgets when their number changes, and keeps when it does not.
        target_labels: those of the target's classes, as they are while the source answers.
        auxiliary: names of further heads of the network, which run in training mode only.
    """

    def __init__(self, norm: FeatureNorm | None, linear: HeadLayer, source: HeadLayer) -> None:
        super().__init__()
        self.norm = norm
        self.linear = linear
        self.source = source
        self.source_labels: dict[str, Any] = {}
        self.target_labels: dict[str, Any] = {}
        self.auxiliary: tuple[str, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        if self.answers_source:
            return self.source(x)
        return self.linear(x if self.norm is None else self.norm(x))

    @property
    def weight(self) -> Tensor:
        """The weight of the layer that answers; some networks read their head's dtype from it."""
        return (self.source if self.answers_source else self.linear).weight

    @property
    def num_classes(self) -> int:
        return classes_of(self.linear)

    def announce(self, model: nn.Module) -> None:
        """Set number and names of the classes where timm and transformers look for them."""
        source = self.answers_source
        config = _config(model, self)
        labels = {name: getattr(config, name) for name in self.source_labels}
        if source and labels != self.source_labels:
            self.target_labels = labels
        _set_num_classes(model, self, classes_of(self.source if source else self.linear))
        for name, value in (self.source_labels if source else self.target_labels).items():
            setattr(config, name, value)

    def train(self, mode: bool = True) -> TaskHead:
        super().train(mode)
        self.source.eval()
        return self


def announce_classes(model: nn.Module, head: nn.Module, num_classes: int) -> None:
    """Set the number of classes where timm and transformers look for it: in the modules that hold
    the head, and in their configurations, of which the network gets copies of its own."""
    for owner in _owners(model, head):
        if not isinstance(owner, nn.Module):
            own_config(model, owner)
    _set_num_classes(model, head, num_classes)


def own_config(model: nn.Module, config: Any) -> None:
    """Put a copy of a configuration wherever the network holds it: another network may have been
    made of the same one."""
    own = copy.copy(config)
    for module in model.modules():
        if vars(module).get("config") is config:
            module.config = own


def _owners(model: nn.Module, head: nn.Module) -> list[Any]:
    """The modules that hold the head, the network first, and then their configurations."""
    paths = [n.split(".") for n, m in model.named_modules(remove_duplicate=False) if m is head]
    names = dict.fromkeys(".".join(path[:i]) for path in paths for i in range(len(path)))
    holders = [model.get_submodule(name) for name in names]
    configs = {id(c): c for m in holders if (c := getattr(m, "config", None)) is not None}
    return [*holders, *configs.values()]


def _config(model: nn.Module, head: nn.Module) -> Any:
    """The configuration that names the classes; None where there is none."""
    configs = (owner for owner in _owners(model, head) if not isinstance(owner, nn.Module))
    return next((config for config in configs if hasattr(config, "id2label")), None)


def _set_num_classes(model: nn.Module, head: nn.Module, num_classes: int) -> None:
    for owner in _owners(model, head):
        for name in ("num_classes", "num_labels"):
            if isinstance(getattr(owner, name, None), int):
                with suppress(AttributeError):  # a property without setter, a frozen dataclass
                    setattr(owner, name, num_classes)


def class_labels(names: Sequence[str]) -> dict[str, Any]:
    """The names of classes, as a configuration of transformers has them."""
    labels = dict(enumerate(names))
    return {"id2label": labels, "label2id": {name: i for i, name in labels.items()}}


def name_classes(config: Any, classes: list[str] | None) -> None:
    """Set the class names in a transformers configuration; any other is left as it is."""
    if classes and hasattr(config, "id2label"):
        for name, value in class_labels(classes).items():
            setattr(config, name, value)


def made_up_names(num_classes: int) -> list[str]:
    """The names that transformers gives to classes that have none."""
    return [f"LABEL_{i}" for i in range(num_classes)]


def task_head(model: nn.Module) -> TaskHead | None:
    """The head that `replace_head` made, or None.

    Raises:
        ValueError: there are several, because a wrapper has copied the head.
    """
    heads = {name: m for name, m in model.named_modules() if isinstance(m, TaskHead)}
    if len(heads) > 1:
        raise ValueError(
            f"the network has several new heads, {' and '.join(heads)}: a wrapper has copied what "
            "fast.replace_head made, as PEFT does for modules_to_save and task_type='SEQ_CLS'. "
            "Wrap the pretrained network first (get_peft_model), and replace the head of the "
            "wrapped one"
        )
    return next(iter(heads.values()), None)


def replace_head(
    model: nn.Module,
    num_classes: int,
    *,
    sample: Any = None,
    max_entropy: bool = True,
    head: str | None = None,
) -> nn.Module:
    """Give a pretrained classifier a new head, in place; the source head is kept inside it.

    Args:
        model: any network that ends in an `nn.Linear` or a 1x1 `nn.Conv2d`: one of timm,
            torchvision or transformers, or your own.
        num_classes: the number of classes of the target task, C.
        sample: a batch of target inputs, as `model` takes them. With it the model runs to find the
            head, to check that it alone makes the logits, and to set the statistics of the feature
            normaliser. Without it the head is found by its customary name, and the first training
            batch sets the statistics.
        max_entropy: start at zero weights behind a feature normaliser; False starts at the layer's
            own random initialisation on raw features (the usual baseline).
        head: name of the layer that makes the logits, where it cannot be found.

    Returns:
        `model`.

    Raises:
        ValueError: there is no head, several layers make the logits together, the head was
            replaced before, or `num_classes` is not in 2..1,000,000. The model is as it was.
    """
    if sample is not None:
        check_takes(unwrap(model), sample, "sample")
    return put_head(
        model, check_num_classes(num_classes), sample=sample, max_entropy=max_entropy, head=head
    )


def put_head(
    model: nn.Module, num_outputs: int, *, sample: Any, max_entropy: bool, head: str | None
) -> nn.Module:
    """`replace_head` for any number of outputs: a regression has one."""
    inner = unwrap(model)
    if task_head(inner) is not None:
        raise ValueError(
            "the head was replaced already: this model was adapted before, and its weights may "
            "have moved. Build it again to start from the pretrained weights; or go on from these "
            "as they are, after fast.fold_head(model)"
        )
    if torch.is_inference_mode_enabled():
        raise ValueError("a head made under torch.inference_mode cannot learn: replace it outside")
    old = find_head(inner, sample, head)
    if sample is None:
        check_declared(inner, old)
    else:
        check_alone(inner, old, sample, named=head is not None, learns=max_entropy)
    trainable = [p.requires_grad for p in old.module.parameters()]
    new = _new_head(inner, old, num_outputs, max_entropy)
    old.put(new)
    announce_classes(inner, new, num_outputs)
    if new.source_labels:  # transformers keeps the names of as many classes
        name_classes(_config(inner, new), made_up_names(num_outputs))
    new.train(inner.training)
    try:
        if sample is not None:
            _check_width(inner, new, sample, old.name)
            calibrate(inner, [sample])
    except BaseException:
        _restore(inner, old.module, trainable)
        raise
    return model


def _restore(model: nn.Module, source: HeadLayer, trainable: list[bool]) -> None:
    """Put the source's layer back, with its parameters as trainable as they were."""
    head = task_head(model)
    assert head is not None
    head.answers_source = True
    head.announce(model)
    put_at(places_of(model, head), source)
    for parameter, before in zip(source.parameters(), trainable, strict=True):
        parameter.requires_grad_(before)


def _new_head(model: nn.Module, old: Head, num_classes: int, max_entropy: bool) -> TaskHead:
    source = old.module
    # `fold_head` puts the mean of the features into the bias.
    linear = layer_like(source, num_classes, bias=max_entropy or source.bias is not None)
    norm = None
    if max_entropy:
        for parameter in linear.parameters():
            nn.init.zeros_(parameter)
        dim = 1 if isinstance(source, nn.Conv2d) else -1
        norm = FeatureNorm(source.weight.shape[1], dim)
        norm.to(source.weight.device, compute_dtype(source.weight))
    if len(own_parameters(model, source)) < len(list(source.parameters())):
        # Frozen weights in the head must not freeze the embedding that they are tied to.
        source = copy.deepcopy(source)
    head = TaskHead(norm, linear, source.requires_grad_(False))
    head.auxiliary = old.auxiliary
    config = _config(model, old.module)
    names = ("id2label", "label2id")
    head.source_labels = {n: getattr(config, n) for n in names if hasattr(config, n)}
    return head


def _check_width(model: nn.Module, head: TaskHead, sample: Any, name: str) -> None:
    """Check that the logits are as wide as the new head.

    Raises:
        ValueError: the network cuts the outputs of a padded head, or counts the classes itself.
    """
    prefix = f"with a head of {head.num_classes} classes at {name}"
    way = (
        "its forward counts the classes on its own (let it take them from the head), or it ends in "
        "features (give it a head: nn.Sequential(model, nn.Linear(D, num_classes)))"
    )
    try:
        with evaluating(model):
            shape = list(forward_logits(model, pick(sample, slice(2))).shape)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{prefix} the network fails ({first_line(error)}): {way}") from error
    if head.num_classes not in shape[1:]:
        raise ValueError(f"{prefix} the logits have shape {shape}: {way}")


def calibrate(model: nn.Module, batches: Any) -> nn.Module:
    """Set the feature normaliser to the statistics of these inputs, with one forward pass each.

    Args:
        model: a network after `replace_head`.
        batches: an iterable of batches of target inputs.

    Raises:
        ValueError: the head was not replaced, or `calibrate_from` refuses the features.
    """
    head = task_head(model)
    if head is None:
        raise ValueError("the model has no head to calibrate; call fast.replace_head first")
    if head.norm is not None:
        calibrate_from(head.norm, [features_of(model, head, inputs) for inputs in batches])
    return model


def features_of(model: nn.Module, head: nn.Module, inputs: Any) -> Tensor:
    """The input of the head for a batch of inputs: `[B, D]`, or of the network's own shape."""
    head_inputs: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, args: head_inputs.append(args[0]))
    with hooked(model, hook):
        forward_logits(unwrap(model), inputs)
    return head_inputs[-1]


def calibrate_from(norm: FeatureNorm, batches: list[Tensor]) -> None:
    """Set the statistics of `norm` to those of these features.

    Raises:
        ValueError: there are fewer than two rows of features, all are the same, or some are not
            finite.
    """
    rows = [norm.rows(x).double() for x in batches]
    features = torch.cat(rows) if rows else torch.empty(0)
    if features.shape[0] < 2:
        raise ValueError(
            f"the feature normaliser needs at least two samples; got {features.shape[0]}"
        )
    mean, var = features.mean(0), features.var(0)
    if not bool(torch.stack([mean, var]).float().isfinite().all()):
        raise ValueError(
            "the backbone gives non-finite features on the training inputs (NaN, infinite, or up "
            f"to {float(features.abs().max()):.0e}): look at the scale of the inputs, and at the "
            "weights and batch norm statistics of the network"
        )
    # Any smaller variance is rounding.
    if not bool((var > 1e-12 * features.square().mean(0)).any()):
        raise ValueError(
            f"the backbone gives all {len(features)} training inputs the same features, of which "
            "no head can learn: the inputs are all alike, or a last ReLU lets nothing through"
        )
    norm.set_statistics(mean, var)


@torch.no_grad()
def fold_head(model: nn.Module) -> nn.Module:
    """Make the target head a plain layer again, in place, and drop the source head.

    The normaliser is folded into weight and bias (`W / std`, `b - W mean / std`, in float64), batch
    norms get their own class back, and adapters are added to the weights of their layers. Nothing
    of this library remains in the network, and nothing of the source task. If the network is
    sharded (FSDP2), all ranks have to call this.

    Returns:
        `model`. Without a replaced head it stays as it is.
    """
    head = task_head(model)
    if head is not None:
        layer = head.linear
        if head.norm is not None:
            assert layer.bias is not None, "a head behind a normaliser has one"
            scale, mean = head.norm.scale().double(), head.norm.mean.double()
            weight = dtensor.whole(layer.weight).double().flatten(1) * scale
            bias = dtensor.whole(layer.bias).double() - weight @ mean
            layer.bias.copy_(dtensor.as_in(bias, layer.bias))
            layer.weight.copy_(dtensor.as_in(weight.view(layer.weight.shape), layer.weight))
        put_at(places_of(model, head), layer)
    return plain_batch_norm(merge_adapters(model))
