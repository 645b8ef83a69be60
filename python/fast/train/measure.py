"""Measure accuracy and loss on a data set, and make the records of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast import dtensor
from fast.adapt.adaptation import Adaptation
from fast.adapt.result import Record, unmeasured
from fast.data.dataset import Data
from fast.data.finite import broken_rows
from fast.data.labels import check_labels, check_several
from fast.data.trees import kind, move
from fast.heads import evaluating, source_task
from fast.heads.forward import LEAST_EVAL_BATCH, answers, input_errors
from fast.ranks import ALONE, Ranks
from fast.train.engine import Engine
from fast.train.finite import check_finite


class ByClass(NamedTuple):
    """For each class, how many of its samples are answered right, and how many there are."""

    right: list[int]
    samples: list[int]


class Score(NamedTuple):
    """Accuracy in 0..1, mean cross-entropy in nats, and right answers by class; the last two are
    None where only an accuracy is known."""

    accuracy: float
    loss: float | None
    by_class: ByClass | None = None


Evaluator = Callable[[nn.Module], float]


class Measure:
    """Measures target and source accuracy of a network.

    Args:
        val, source: data, or None; `source` may be a function of the network.
        batch_size: samples of a training step; an evaluation takes at least `LEAST_EVAL_BATCH`.
        tta: measure the target on images and their mirror images.

    Attributes:
        before: score of the source at the pretrained weights; set by `measure_before`, or loaded
            from a checkpoint.
        by_class: step -> the target's answers by class, for the evaluations whose weights the run
            may return (see `keep_by_class`).
    """

    def __init__(
        self,
        val: Data | None,
        source: Data | Evaluator | None,
        engine: Engine,
        batch_size: int,
        *,
        tta: bool = False,
    ) -> None:
        self.val, self.source, self.engine, self.tta = val, source, engine, tta
        self.batch_size = max(LEAST_EVAL_BATCH, batch_size)
        self.before: Score | None = None
        self.by_class: dict[int, ByClass] = {}
        self.start_clock()

    def start_clock(self) -> None:
        """Count `seconds` from now on."""
        self._start_time = time.monotonic()

    def measure_before(self, model: nn.Module) -> None:
        self.before = self._source(model)

    def record(
        self, adaptation: Adaptation, losses: list[Tensor], folder: Path | None = None
    ) -> Record:
        """Everything that is known after a step, as one record of the history.

        Args:
            losses: losses of the steps since the last record.
            folder: where the run's checkpoints are; an error about divergence names it.
        """
        model, step = adaptation.model, adaptation.done
        loss = check_finite(adaptation, losses, folder)
        target = None
        if self.val is not None:
            target = self._score(model, self.val, mirrored=self.tta)
            assert target.by_class is not None
            self.by_class[step] = target.by_class
        source = self._source(model)
        record = unmeasured(
            step=step,
            forecast=adaptation.forecast(),
            drift=adaptation.drift(),
            grad_norm=float(adaptation.stats()["grad_norm"]) if step else None,
            lr=adaptation.last_lr,
        )
        record |= {"loss": loss, "seconds": round(time.monotonic() - self._start_time, 3)}
        if target is not None:
            record |= {"target_accuracy": target.accuracy, "target_loss": target.loss}
        if source is not None:
            record |= {"source_accuracy": source.accuracy, "source_loss": source.loss}
            if self.before is not None:
                record["forgetting"] = self.before.accuracy - source.accuracy
        return record

    def _source(self, model: nn.Module) -> Score | None:
        if self.source is None:
            return None
        with source_task(model):
            return self._score(model, self.source)

    def _score(self, model: nn.Module, data: Data | Evaluator, *, mirrored: bool = False) -> Score:
        engine = self.engine
        with engine.autocast():
            return evaluate(
                model, data, self.batch_size, engine.device, engine.ranks, mirrored=mirrored
            )

    def keep_by_class(self, steps: Container[int | None]) -> None:
        """Forget the answers by class of all evaluations but those after these steps."""
        self.by_class = {n: x for n, x in self.by_class.items() if n in steps}

    def state_dict(self) -> dict[str, Any]:
        return {
            "seconds": time.monotonic() - self._start_time,
            "before": None if self.before is None else [self.before.accuracy, self.before.loss],
            "by_class": [[step, *counts] for step, counts in self.by_class.items()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._start_time = time.monotonic() - float(state["seconds"])
        before = state["before"]
        self.before = None if before is None else Score(*before)
        # Checkpoints of older versions have no such entry.
        counts = state.get("by_class", ())
        self.by_class = {int(step): ByClass(right, samples) for step, right, samples in counts}


def evaluate(
    model: nn.Module,
    data: Data | Evaluator,
    batch_size: int,
    device: torch.device,
    ranks: Ranks = ALONE,
    *,
    mirrored: bool = False,
) -> Score:
    """Accuracy and mean cross-entropy, in evaluation mode; every module keeps its mode.

    Args:
        data: a data set, or a function of the model that returns an accuracy in 0..1.
        ranks: the processes that share the batches; where `data` is a function, all take the
            first one's result.
        mirrored: the answer to an image is the mean of the logits for it and its mirror image.

    Raises:
        TypeError: the function does not return a number.
        ValueError: the function's number is no accuracy; or there are no samples, labels are out of
            range, or the network does not take the inputs. The message names the data.
        FloatingPointError: answers are not finite (ValueError where inputs are not); the message
            says how many.
    """
    if not isinstance(data, Data):
        with ranks.together(), evaluating(model):
            accuracy = _accuracy(data(model))
        return Score(ranks.from_first(accuracy), None)
    right, samples = torch.zeros(2, 0, dtype=torch.int64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    is_sharded = dtensor.any_sharded(list(model.parameters()))
    all_batches, each_batch = (
        (nullcontext, ranks.together) if is_sharded else (ranks.together, nullcontext)
    )
    with all_batches(), evaluating(model):
        for inputs, labels, counts in _shares(data, batch_size, ranks, is_sharded):
            with input_errors(data.name, inputs, model):
                logits = answers(model, move(inputs, device), mirrored)
            with each_batch():
                check_several(logits.shape[1], data.name)
                labels = check_labels(labels, logits.shape[1], data.name).to(device)
            if not counts:
                continue
            right, samples = (_of_classes(x, logits.shape[1]) for x in (right, samples))
            right.index_add_(0, labels, (logits.argmax(1) == labels).long())
            samples.index_add_(0, labels, torch.ones_like(labels))
            loss += F.cross_entropy(logits, labels, reduction="sum").double()
            # argmax would answer with the class at which a NaN stands. Logits of -inf, which rule
            # a class out, are legitimate.
            wrong += (~logits.logsumexp(1).isfinite()).sum()
    classes = ranks.largest(len(right))
    right, samples = (_of_classes(x, classes) for x in (right, samples))
    for figure in (right, samples, loss, wrong):
        ranks.sum_(figure)
    count = int(samples.sum())
    if not count:
        raise ValueError(f"{data.name}: no samples to evaluate on")
    if wrong.item():
        _refuse(data, int(wrong), count, batch_size)
    by_class = ByClass(right.tolist(), samples.tolist())
    return Score(sum(by_class.right) / count, loss.item() / count, by_class)


def _of_classes(counts: Tensor, classes: int) -> Tensor:
    """Counts padded with 0 to this many classes."""
    return F.pad(counts, (0, classes - len(counts)))


def _shares(
    data: Data, batch_size: int, ranks: Ranks, is_sharded: bool
) -> Iterator[tuple[Any, Tensor, bool]]:
    """A rank's batches, and whether they count.

    All ranks have to make the passes of a sharded network together. A rank that has run out of
    batches repeats its last one, or the first of all, and that one does not count.
    """
    own = iter(data.eval_batches(batch_size, ranks.share))
    if not is_sharded:
        yield from ((inputs, labels, True) for inputs, labels in own)
        return
    last = None
    while True:
        with ranks.together():
            batch = next(own, None)
            last = batch or last or next(iter(data.eval_batches(batch_size)), None)
        if not ranks.largest(batch is not None):
            return
        assert last is not None
        yield (*last, batch is not None)


def _refuse(data: Data, wrong: int, count: int, batch_size: int) -> None:
    fault = f"{data.name}: the network's answers to {wrong} of {count} samples are NaN or infinite"
    rows = [broken_rows(inputs) for inputs, _ in data.eval_batches(batch_size)]
    broken = sum(int(r.sum()) for r in rows if r is not None)
    if broken:
        raise ValueError(
            f"{fault}: {broken} samples hold NaN or infinite inputs; drop or mend them"
        )
    raise FloatingPointError(
        f"{fault}, the inputs are finite: of trained weights, lower lr or set max_grad_norm; of "
        "pretrained ones, look at the weights and at the scale of the inputs"
    )


def _accuracy(answer: Any) -> float:
    try:
        accuracy = float(answer)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            "source: the function must return the accuracy, a number in 0..1; it returned "
            f"{kind(answer)}"
        ) from error
    if not 0 <= accuracy <= 1:
        raise ValueError(f"source: the function must return an accuracy in 0..1; got {accuracy:g}")
    return accuracy
