"""`fast.join` makes one softmax over the classes of the source task and of the target task."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast.data.finite import check_finite_inputs
from fast.data.labels import check_labels
from fast.data.source_inputs import SourceInputs
from fast.errors import some
from fast.heads import task_head, unwrap
from fast.merge.join_fit import Scales, Side, fit
from fast.merge.join_parts import TwoHeads, logits_from, two_heads
from fast.merge.joined import Joined
from fast.models.saved.description import announced_classes
from fast.models.saved.description import source_classes as names_of_source
from fast.models.signature import signature_of

log = logging.getLogger("fast")

# How many samples of each task are read, at most and at least, and how many in one batch.
LIMIT = 4096
LEAST = 10
CHUNK = 128


class Adapted(Protocol):
    """What `join` needs of a `fast.Result`, or of what `fast.load` returned: the network, and the
    names of the target's classes."""

    model: nn.Module
    classes: list[str] | None


@torch.no_grad()
def join(
    result: Adapted | nn.Module,
    *,
    source_inputs: Any,
    data: Any,
    source_classes: Sequence[str] | None = None,
    target_classes: Sequence[str] | None = None,
) -> Joined:
    """Make one network for the classes of both tasks, with one softmax.

    The heads have learned apart, so that the size of their logits does not tell which task an input
    belongs to. Here they are brought to one scale on samples of both tasks: the one at which the
    cross-entropy over all classes is least (`fast.merge.join_fit` says how). Nothing is trained,
    and the network of `result` stays as it is.

    Args:
        result: what `fast.finetune`, `Adaptation.finish` or `fast.load` returned; or its network,
            with both heads.
        source_inputs: a few hundred inputs of the source task, with labels or without. Without
            labels the network's own answers are taken for right.
        data: `(inputs, labels)`, a Dataset or a DataLoader of the target task. If you can, give
            samples that the network was not trained on: on training samples the target's head is
            surer than it should be.
        source_classes: names of the classes, in the order of the source head's logits (default:
            the names that the network has). Classes of the same name in both tasks become one.
        target_classes: names of the target's classes (default: those that `result` has, or its
            network).

    Returns:
        a plain module in evaluation mode. Its logits `[B, C]` are those of the source's classes
        and then of the classes that only the target has. It has `classes`, `passes`,
        `calibration` and `save(folder)`. An input takes one forward pass where both tasks have one
        function of the input (`batch_norm="frozen"`, or no batch norm), and two where each task
        has norms or adapters of its own.

    Raises:
        TypeError: `result` is neither a result nor a network.
        ValueError: the network has only one head; names do not fit; labels are out of range or
            missing; there are too few samples; or something follows the head of the network.
    """
    name = None
    if not isinstance(result, nn.Module):
        if not isinstance(getattr(result, "model", None), nn.Module):
            raise TypeError(
                "result must be what fast.finetune, Adaptation.finish or fast.load returned, or "
                f"its network; got {type(result).__name__}"
            )
        target_classes = result.classes if target_classes is None else target_classes
        if source_classes is None:
            source_classes = getattr(result, "source_classes", None)  # of what fast.load returned
        name, result = getattr(result, "network", None), result.model
    network = unwrap(result)
    model = network.network if isinstance(network, Joined) else network
    head = task_head(model)
    if head is None:
        raise ValueError(
            "result: the network has one head, and join needs the source's beside the target's: "
            "adapt it with a new head, head='new', and join before fast.fold_head"
        )
    if source_classes is None:
        source_classes = names_of_source(model, name)
    if target_classes is None:
        target_classes = announced_classes(model)
    joined = join_heads(two_heads(model), source_inputs, data, source_classes, target_classes)
    cost = (
        "pass"
        if joined.passes == 1
        else "passes, because each task has norms or adapters of its own"
    )
    count = len(joined.classes)
    log.info("join: %d classes; an input takes %d forward %s", count, joined.passes, cost)
    return joined


def join_heads(
    heads: TwoHeads,
    source_inputs: Any,
    data: Any,
    source_classes: Sequence[str] | None = None,
    target_classes: Sequence[str] | None = None,
) -> Joined:
    """Join networks that were taken apart; they become the joined network, as in `join`."""
    sizes = len(heads.source[1]), len(heads.target[1])
    names = (
        class_names(source_classes, sizes[0], 0, "source"),
        class_names(target_classes, sizes[1], sizes[0], "target"),
    )
    _note_shared(*names)
    source, target = _read(source_inputs, sizes[0], "source_inputs"), _read(data, sizes[1], "data")
    if target.labels is None:
        raise ValueError("data: has no labels; give (inputs, labels) of the target task")
    networks = [part.network for part in heads.parts]
    joined = Joined(
        networks,
        [*names[0], *names[1]],
        sizes[0],
        heads.parts[0].name,
        inputs=signature_of(target.inputs),
    )
    joined.to(heads.source[0].device)
    places = joined.place.split(list(sizes))
    count = len(joined.classes)
    sides = (
        _side(heads, source, places[0], count, "source_inputs"),
        _side(heads, target, places[1], count, "data"),
    )
    classes = torch.arange(count, device=joined.place.device)
    own = torch.isin(classes, places[0]), torch.isin(classes, places[1])
    has_labels = source.labels is not None
    scales, joined.calibration = fit(sides, joined.place, own, labelled=has_labels)
    _put(heads, scales)
    joined.name_rows()
    return joined


def class_names(names: Sequence[str] | None, count: int, first: int, task: str) -> list[str]:
    """The names of a head's classes: those that were given, or else their places among all rows.

    Args:
        count: how many classes the head has.
        first: the place of the head's first row.
        task: source or target, for the message.

    Raises:
        ValueError: there are more or fewer names than the head has classes.
    """
    if names is None:
        return [f"class {first + i}" for i in range(count)]
    if isinstance(names, str) or len(names) != count:
        came = repr(names) if isinstance(names, str) else f"{len(names)} names"
        raise ValueError(
            f"{task}_classes: got {came}, and the {task}'s head has {count} classes: give one name "
            "for each, in their order"
        )
    return [str(name) for name in names]


def _note_shared(source: list[str], target: list[str]) -> None:
    """Say which classes both tasks have.

    Raises:
        ValueError: the target has a name twice, or the names that both have are numbers.
    """
    twice = sorted({name for name in target if target.count(name) > 1})
    if twice:
        raise ValueError(f"target_classes: {some(twice)} more than once; give each class one name")
    common = [name for name in target if name in set(source)]
    numbers = [name for name in common if name.strip().isdecimal()]
    if numbers:
        raise ValueError(
            f"both tasks have classes named {some(numbers)}: numbers do not say whether they are "
            "the same. Give names in source_classes and target_classes, the same for what is the "
            "same"
        )
    if common:
        log.info("join: classes that both tasks have, by name: %s", some(common))


def _read(samples: Any, num_classes: int, name: str) -> SourceInputs:
    read = SourceInputs.parse(samples, LIMIT, name)
    if read.size < LEAST:
        raise ValueError(f"{name}: {read.size} samples; give at least {LEAST}, better 500")
    if read.labels is not None:
        check_labels(read.labels, num_classes, name)
    check_finite_inputs(read.inputs, name)
    return read


def _side(heads: TwoHeads, samples: SourceInputs, place: Tensor, count: int, name: str) -> Side:
    """The logits of both heads on samples of one task, and the right answers.

    Args:
        place: the places, among all `count` classes, of the classes of the samples' own task.
        name: name of the samples, for messages.
    """
    batches = [inputs for inputs, _ in samples.batches(CHUNK)]
    features = [part.features(batches, name) for part in heads.parts]
    source = logits_from(features[0], heads.source)
    target = logits_from(features[-1], heads.target)
    if samples.labels is None:
        answers = source.softmax(1)
    else:
        answers = F.one_hot(samples.labels.to(place.device), len(place)).to(source)
    empty = source.new_zeros(len(source), count)
    return Side(
        source=source,
        target=target,
        features=torch.cat(features, 1),
        answers=empty.index_add(1, place, answers),
    )


def _put(heads: TwoHeads, scales: Scales) -> None:
    """Multiply the scales into the weights of the heads, and put these into the networks."""
    (w_s, b_s), (w_t, b_t) = heads.source, heads.target
    w_s, b_s = scales.source * w_s, scales.source * b_s
    w_t, b_t = scales.target * w_t, scales.target * b_t + scales.offset
    if len(heads.parts) == 1:
        heads.parts[0].put((torch.cat([w_s, w_t + scales.direction]), torch.cat([b_s, b_t])))
        return
    v_s, v_t = scales.direction.split([w_s.shape[1], w_t.shape[1]])
    heads.parts[0].put((w_s - v_s, b_s))
    heads.parts[1].put((w_t + v_t, b_t))
