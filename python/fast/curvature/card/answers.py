"""Source inputs of any kind, and what a network's source head answers to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fast.heads import evaluating, find_head, forward_logits, source_task, task_head
from fast.heads.class_axis import classes_second
from fast.heads.forward import logits_of

# At this temperature ResNet-20's answers to its training images have the entropy (0.096 nats) that
# its answers to test images have at temperature 1 (0.086). The loss of test images rose by 0.8 to
# 1.4 times what `expected_rise` measures on training images, from 0.03 to 26 nats; at temperature 1
# by 1.1 to 3.1 times. For MobileNet on images of other classes it was 0.6 to 1.2 times (at
# temperature 1: 0.5 to 1.0).
DOUBT = 2.0
LABEL_KEYS = ("labels", "label", "y", "targets", "target")


class SourceInputs:
    """The first few samples of source data, in memory, labelled or not.

    Args:
        data: another of these; inputs alone (a tensor, or a tuple or mapping of tensors),
            `(inputs, labels)`, a map-style Dataset, or a DataLoader or other iterable of batches of
            either kind. Labels are one-dimensional: that tells a pair of input and labels from a
            tuple of two inputs.
        limit: samples taken, at most.

    Raises:
        TypeError, ValueError: something else, nothing in it, or labels that are no whole numbers.
    """

    def __init__(self, data: Any, limit: int) -> None:
        if limit < 2:
            raise ValueError(f"num_samples must be at least 2; got {limit}")
        if isinstance(data, SourceInputs):
            data = data.inputs if data.labels is None else (data.inputs, data.labels)
        if _is_batch(data):
            batches: Iterable[Any] = [data]
        elif isinstance(data, Dataset) and isinstance(data, Sized):
            batches = DataLoader(data, batch_size=min(64, limit))  # type: ignore[arg-type]
        elif isinstance(data, Iterable):
            batches = data
        else:
            raise TypeError(
                "source data must be inputs, (inputs, labels), a Dataset or a DataLoader; got "
                f"{type(data).__name__}"
            )
        parts: list[Any] = []
        labels: list[Tensor | None] = []
        count = 0
        for batch in batches:
            x, y = _split(batch)
            x = _rows(x, slice(limit - count))
            size = _length(x)
            parts.append(x)
            labels.append(None if y is None else _whole(torch.as_tensor(y)[:size]))
            count += size
            if count >= limit:
                break
        if count < 2:
            raise ValueError(f"source data: {count} samples; a card needs at least 2")
        self.inputs: Any = _concatenate(parts)
        kept = [y for y in labels if y is not None]
        self.labels: Tensor | None = torch.cat(kept) if len(kept) == len(parts) else None
        self.size = count

    @classmethod
    def of(cls, parts: list[Any]) -> SourceInputs:
        """Batches of inputs alone, `[N, ...]` each, as one of these without labels."""
        new = object.__new__(cls)
        new.inputs, new.labels = _concatenate(parts), None
        new.size = _length(new.inputs)
        return new

    def part(self, start: int, stop: int) -> SourceInputs:
        """Samples `start` to `stop`, as another of these."""
        other = object.__new__(SourceInputs)
        rows = slice(start, stop)
        other.inputs = _rows(self.inputs, rows)
        other.labels = None if self.labels is None else self.labels[rows]
        other.size = _length(other.inputs)
        return other

    def to(self, device: torch.device) -> SourceInputs:
        other = object.__new__(SourceInputs)
        other.inputs = _map(self.inputs, lambda t: t.to(device))
        other.labels = None if self.labels is None else self.labels.to(device)
        other.size = self.size
        return other

    def batches(self, size: int) -> Iterator[tuple[Any, Tensor | None]]:
        for start in range(0, self.size, size):
            rows = slice(start, start + size)
            yield _rows(self.inputs, rows), None if self.labels is None else self.labels[rows]


class Answers(nn.Module):
    """A network that gives one tensor of logits, divided by a temperature."""

    def __init__(self, model: nn.Module, temperature: float = 1.0) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        logits = logits_of(self.model(*args, **kwargs))
        return logits if self.temperature == 1 else logits / self.temperature


@torch.no_grad()
def source_answers(model: nn.Module, data: SourceInputs, batch_size: int = 128) -> Tensor:
    """Source logits `[N, C, ...]` of a model in evaluation mode, in float32."""
    with evaluating(model), source_task(model):
        logits = [forward_logits(model, x).float() for x, _ in data.batches(batch_size)]
        return classes_second(model, torch.cat(logits), data.part(0, 2).inputs)


@torch.no_grad()
def source_features(model: nn.Module, data: SourceInputs, batch_size: int = 128) -> Tensor:
    """Inputs of the head `[N, D]`, averaged over positions, in evaluation mode, in float32."""
    head = task_head(model)
    watched = head if head is not None else find_head(model, data.part(0, 2).inputs).module
    inputs: list[Tensor] = []
    hook = watched.register_forward_pre_hook(lambda _, args: inputs.append(args[0].float()))
    try:
        with evaluating(model), source_task(model):
            for x, _ in data.batches(batch_size):
                forward_logits(model, x)
    finally:
        hook.remove()
    # A convolution's channels come first, a linear layer's features last.
    layer = head.source if head is not None else watched
    rows = [x.movedim(-1 if isinstance(layer, nn.Linear) else 1, -1) for x in inputs]
    return torch.cat([x.flatten(1, -2).mean(1) if x.dim() > 2 else x for x in rows])


def divergence(before: Tensor, now: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean KL(p || q) in nats, float64 `[]`, with p and q the softmax of logits `[N, C, ...]` over
    a temperature."""
    p, q = ((x.double() / temperature).log_softmax(1) for x in (before, now))
    kl = F.kl_div(q, p, log_target=True, reduction="none").sum(1)
    return kl.mean()


def expected_rise(before: Tensor, now: Tensor) -> Tensor:
    """Estimate of the rise of the source loss on unseen inputs, from logits of any inputs, `[]`.

    It is `T KL(p || q)`, with p and q the softmax of the source logits `[N, C, ...]` over T, before
    and now. At T = 1 that is the rise under labels drawn from the pretrained network itself, which
    is right where the network is calibrated; on its training inputs it is overconfident. Large
    losses are linear in the logits, so that T cancels.
    """
    return DOUBT * divergence(before, now, DOUBT)


def backbone_parameters(model: nn.Module, sample: Any) -> dict[str, nn.Parameter]:
    """Trainable parameters except those of the target head and the source head, by name.

    Raises:
        ValueError: there are none.
    """
    head = task_head(model)
    layer = head if head is not None else find_head(model, sample).module
    skip = {id(p) for p in layer.parameters()}
    backbone = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in skip}
    if not backbone:
        raise ValueError("model has no trainable backbone parameter: there is nothing to protect")
    return backbone


def _is_batch(data: Any) -> bool:
    if isinstance(data, (Tensor, Mapping)):
        return True
    if not isinstance(data, (tuple, list)) or not data:
        return False
    first, last = data[0], data[-1]
    if len(data) > 1 and isinstance(last, Tensor) and last.dim() == 1:
        return True
    # A tuple of tensors is several inputs, a list of them several batches.
    return isinstance(data, tuple) and isinstance(first, Tensor)


def _is_labels(value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and value.dim() == 1 and len(value) == size


def _split(batch: Any) -> tuple[Any, Tensor | None]:
    """(inputs, labels or None) of a batch."""
    if isinstance(batch, Mapping):
        for key in LABEL_KEYS:
            if key in batch:
                return {k: v for k, v in batch.items() if k != key}, batch[key]
        return dict(batch), None
    if isinstance(batch, (tuple, list)):
        if len(batch) == 1:
            return batch[0], None
        if _is_labels(batch[-1], _length(batch[0])):
            return batch[0] if len(batch) == 2 else tuple(batch[:-1]), batch[-1]
        return tuple(batch), None
    if isinstance(batch, Tensor):
        return batch, None
    raise TypeError(f"source data: a batch is a {type(batch).__name__}, not tensors of inputs")


def _whole(labels: Tensor) -> Tensor:
    """Labels as int64; those that are fractional or NaN would be cut to another class."""
    if labels.is_floating_point():
        wrong = labels != labels.round()
        if wrong.any():
            raise ValueError(
                "source data: labels must be whole numbers (class indices), not "
                f"{float(labels[wrong][0]):g}"
            )
    return labels.long()


def _map(inputs: Any, function: Any) -> Any:
    if isinstance(inputs, Mapping):
        return {k: _map(v, function) for k, v in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(_map(v, function) for v in inputs)
    return function(inputs)


def _rows(inputs: Any, rows: slice) -> Any:
    return _map(inputs, lambda t: t[rows])


def _length(inputs: Any) -> int:
    while not isinstance(inputs, Tensor):
        inputs = next(iter(inputs.values() if isinstance(inputs, Mapping) else inputs))
    return len(inputs)


def _concatenate(parts: list[Any]) -> Any:
    first = parts[0]
    if isinstance(first, Mapping):
        return {k: _concatenate([p[k] for p in parts]) for k in first}
    if isinstance(first, (tuple, list)):
        return tuple(_concatenate([p[i] for p in parts]) for i in range(len(first)))
    return torch.cat(parts)
