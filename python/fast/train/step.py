"""One optimizer step of a run: its batch, checked, and its loss in micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fast.adapt.adaptation import Adaptation
from fast.adapt.loss import TargetLoss
from fast.data.finite import check_finite_inputs
from fast.data.labels import check_labels
from fast.data.transform import CheckedTransform, Mix
from fast.data.trees import length
from fast.heads.forward import check_takes
from fast.train.engine import Engine
from fast.train.run_data import RunData

TrainBatch = tuple[Any, Tensor, Tensor | None]


class TrainStep:
    """Takes steps of an adaptation with cross-entropy.

    Args:
        data: the run's data; its transform is applied to each batch.
        loss: the target's loss.
        engine: runs the network.
        mix: see `fast.data.transform.mixing`; or None.
        began: called before the weights change, in each step.
    """

    def __init__(
        self,
        adaptation: Adaptation,
        data: RunData,
        loss: TargetLoss,
        engine: Engine,
        mix: Mix | None = None,
        *,
        began: Callable[[], None] = lambda: None,
    ) -> None:
        self.adaptation, self.data, self.loss, self.engine = adaptation, data, loss, engine
        self.mix, self._began = mix, began
        check = partial(check_takes, adaptation.model, name="transform")
        self.transform = CheckedTransform(data.transform, check)

    def batches(self) -> Iterator[TrainBatch]:
        """This rank's share of the training batches, from the step that the run has reached."""
        stream = self.adaptation.batches()
        while True:
            with self.engine.ranks.together():
                batch = next(stream, None)
            if batch is None:
                return
            yield batch

    def __call__(self, batch: TrainBatch) -> Tensor:
        """Take one optimizer step; its hooks do what follows a step.

        Returns:
            the batch's mean loss on the target with the penalties, over all ranks and on the
            device; it leaves out the loss of replayed inputs.
        """
        adaptation, engine = self.adaptation, self.engine
        adaptation.schedule()
        ranks = engine.ranks
        with ranks.together():
            inputs, labels, rows = self._ready(batch)
        denominator = self.loss.denominator(labels)
        if ranks.size > 1:  # gradients are averaged over the ranks
            share = torch.as_tensor(denominator, dtype=torch.float32, device=engine.device)
            denominator = ranks.sum_(share.clone()) / ranks.size
        total = torch.zeros((), device=engine.device)
        adaptation.optimizer.zero_grad()
        size = -(-len(labels) // adaptation.plan.grad_accum_steps)
        parts = adaptation.parts(inputs, rows, size)
        for part, y in zip(parts, labels.split(size), strict=True):
            with engine.accumulating(last=part is parts[-1]):
                with engine.autocast():
                    logits, penalty, replay_loss = adaptation.forward_part(part, engine.network)
                    loss = self.loss.part(logits, y, denominator) + penalty
                engine.backward(loss + replay_loss)
            total += loss.detach()
        self._began()
        engine.step(adaptation.optimizer)
        ranks.mean_([total])
        return total

    def _ready(self, batch: TrainBatch) -> TrainBatch:
        """A batch as the network will see it, with labels on the device.

        Mixed labels are the shares of the classes, `[B, C]`.

        Raises:
            ValueError: the batch cannot be trained on.
        """
        inputs, labels, rows = batch
        labels = check_labels(labels, self.data.num_classes, "train").to(self.engine.device)
        if length(inputs) != len(labels):
            raise ValueError(f"train: a batch has {length(inputs)} inputs, {len(labels)} labels")
        with self.engine.autocast():
            inputs = self.transform(inputs, len(labels))
        if self.data.transform is not None or self.data.train.inputs is None:  # else seen before
            check_finite_inputs(inputs, "train", rows)
        if self.mix is not None:
            inputs, labels = self.mix(inputs, labels.to("cpu"))
            labels = labels.to(self.engine.device)
        return inputs, labels, rows
