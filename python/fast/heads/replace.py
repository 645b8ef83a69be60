"""Replace a classifier's head by a maximum-entropy one, keeping the source head; and fold it back.

Zero weights on normalised features: softmax is uniform, its entropy is log C, and the error sent to
the backbone is W^T (p - y) = 0, so the first error stays in the head (arXiv 2007.01388, section 3).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fast.data.labels import check_num_classes
from fast.data.trees import pick
from fast.errors import first_line
from fast.heads.alone import check_alone
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
)
from fast.heads.forward import evaluating, forward_logits, unwrap
from fast.heads.task import TwoTask


class TaskHead(nn.Module, TwoTask):
    """The target head in the source head's place: `linear(norm(x))`, or `source(x)` when asked to.

    Attributes:
        norm: `FeatureNorm`, or None for a plain head.
        linear: the target layer, of the source layer's kind.
        source: the source head, frozen.
        auxiliary: names of further heads of the network, which only run in training mode.
    """

    def __init__(self, norm: FeatureNorm | None, linear: HeadLayer, source: HeadLayer) -> None:
        super().__init__()
        self.norm = norm
        self.linear = linear
        self.source = source
        # transformers forgets the names of the labels when their number changes.
        self.source_labels: dict[str, Any] = {}
        self.auxiliary: tuple[str, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        if self.answers_source:
            return self.source(x)
        return self.linear(x if self.norm is None else self.norm(x))

    @property
    def weight(self) -> Tensor:
        """Of the layer that answers; networks look here for the dtype of their head."""
        return (self.source if self.answers_source else self.linear).weight

    @property
    def num_classes(self) -> int:
        return classes_of(self.linear)

    def announce(self, model: nn.Module) -> None:
        """Tell the model how many classes it answers, where timm and transformers look for it."""
        source = self.answers_source
        announce_classes(model, classes_of(self.source if source else self.linear))
        if source:
            for name, value in self.source_labels.items():
                setattr(model.config, name, value)

    def train(self, mode: bool = True) -> TaskHead:
        super().train(mode)
        self.source.eval()
        return self


def announce_classes(model: nn.Module, num_classes: int) -> None:
    for owner in (model, getattr(model, "config", None)):
        for name in ("num_classes", "num_labels"):
            if isinstance(getattr(owner, name, None), int):
                setattr(owner, name, num_classes)


def task_head(model: nn.Module) -> TaskHead | None:
    """The head that `replace_head` made, or None."""
    return next((m for m in model.modules() if isinstance(m, TaskHead)), None)


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
        model: any network that ends in an `nn.Linear` or a 1x1 `nn.Conv2d`: timm, torchvision,
            transformers, or your own.
        num_classes: C, of the target task.
        sample: a batch of target inputs, as `model` takes them. Finds the head by running the model
            once, checks that it alone makes the logits, and sets the statistics of the feature
            normaliser. Without it the head is found by its customary name, and the first training
            batch sets the statistics.
        max_entropy: zero weights behind a feature normaliser; False gives the layer's own random
            initialisation on raw features (the usual baseline).
        head: name of the layer that makes the logits, where it cannot be found.

    Returns:
        `model`.

    Raises:
        ValueError: no head was found, several layers make the logits together, the head was
            replaced before, or `num_classes` is not in 2..1,000,000. The model is as it was.
    """
    return put_head(
        model, check_num_classes(num_classes), sample=sample, max_entropy=max_entropy, head=head
    )


def put_head(
    model: nn.Module, num_outputs: int, *, sample: Any, max_entropy: bool, head: str | None
) -> nn.Module:
    """`replace_head` for any number of outputs, of which a regression has one."""
    inner = unwrap(model)
    if task_head(inner) is not None:
        raise ValueError("the head was replaced already; call fast.fold_head(model) first")
    if torch.is_inference_mode_enabled():
        raise ValueError("a head made under torch.inference_mode cannot learn: replace it outside")
    found = find_head(inner, sample, head)
    if sample is not None:
        check_alone(inner, found, sample, named=head is not None, learns=max_entropy)
    trainable = [p.requires_grad for p in found.module.parameters()]
    made = _new_head(inner, found, num_outputs, max_entropy)
    found.put(made)
    announce_classes(inner, num_outputs)
    made.train(inner.training)
    try:
        if sample is not None:
            _check_width(inner, made, sample, found.name)
            calibrate(inner, [sample])
    except BaseException:
        _restore(inner, found.module, trainable)
        raise
    return model


def _restore(model: nn.Module, source: HeadLayer, trainable: list[bool]) -> None:
    """Put the source's own layer back, its parameters trainable as they were."""
    head = task_head(model)
    assert head is not None
    head.answers_source = True
    head.announce(model)
    for parent, attribute, _ in places_of(model, head):
        setattr(parent, attribute, source)
    for parameter, before in zip(source.parameters(), trainable, strict=True):
        parameter.requires_grad_(before)


def _new_head(model: nn.Module, found: Head, num_classes: int, max_entropy: bool) -> TaskHead:
    source = found.module
    # `fold_head` puts the mean of the features into the bias.
    linear = layer_like(source, num_classes, bias=max_entropy or source.bias is not None)
    norm = None
    if max_entropy:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)  # type: ignore[arg-type]
        dim = 1 if isinstance(source, nn.Conv2d) else -1
        norm = FeatureNorm(source.weight.shape[1], dim).to(source.weight.device)
    if len(own_parameters(model, source)) < len(list(source.parameters())):
        # Frozen weights in the head must not freeze the embedding that they are tied to.
        source = copy.deepcopy(source)
    head = TaskHead(norm, linear, source.requires_grad_(False))
    head.auxiliary = found.auxiliary
    config = getattr(model, "config", None)
    names = ("id2label", "label2id")
    head.source_labels = {n: getattr(config, n) for n in names if hasattr(config, n)}
    return head


def _check_width(model: nn.Module, head: TaskHead, sample: Any, name: str) -> None:
    """A network may cut the outputs of a padded head, or count its classes on its own."""
    told = f"with a head of {head.num_classes} classes at {name}"
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
        raise ValueError(f"{told} the network fails ({first_line(error)}): {way}") from error
    if head.num_classes not in shape[1:]:
        raise ValueError(f"{told} the logits have shape {shape}: {way}")


def calibrate(model: nn.Module, batches: Any) -> nn.Module:
    """Set the feature normaliser to the statistics of these inputs; one forward pass each.

    Args:
        model: a network whose head was replaced.
        batches: an iterable of batches of target inputs.

    Raises:
        ValueError: the head was not replaced; the inputs give fewer than two feature vectors, or
            features that are all the same or not finite.
    """
    head = task_head(model)
    if head is None:
        raise ValueError("the model has no head to calibrate; call fast.replace_head first")
    if head.norm is not None:
        calibrate_from(head.norm, [features_of(model, head, inputs) for inputs in batches])
    return model


def features_of(model: nn.Module, head: nn.Module, inputs: Any) -> Tensor:
    """What the head sees of a batch of inputs: `[B, D]`, or what the network has there."""
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        with evaluating(model):
            forward_logits(unwrap(model), inputs)
    finally:
        hook.remove()
    return seen[-1]


def calibrate_from(norm: FeatureNorm, batches: list[Tensor]) -> None:
    """Set the statistics of `norm` to those of these features.

    Raises:
        ValueError: fewer than two, all the same, or not finite.
    """
    rows = [x.movedim(norm.dim, -1).reshape(-1, norm.num_features).double() for x in batches]
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
    # More than rounding.
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
    norms get their own class back: nothing of this library is left in the network.

    Returns:
        `model`. A network whose head was never replaced is returned as it is.
    """
    head = task_head(model)
    if head is not None:
        layer = head.linear
        if head.norm is not None:
            scale, mean = head.norm.scale().double(), head.norm.mean.double()
            weight = layer.weight.double().flatten(1) * scale
            layer.bias.copy_(layer.bias.double() - weight @ mean)  # type: ignore[union-attr]
            layer.weight.copy_(weight.view_as(layer.weight))
        for parent, attribute, _ in places_of(model, head):
            setattr(parent, attribute, layer)
    return plain_batch_norm(model)
