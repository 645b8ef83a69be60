"""A network whose backbone can be moved, and its losses and curvature where it is."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fast.curvature import GGN, Hessian, NetworkOperator
from fast.curvature.card import SourceCard
from fast.curvature.card.answers import Answers
from fast.data.dataset import Data, as_data
from fast.data.source_inputs import SourceInputs
from fast.heads import evaluating, source_task, task_head
from fast.train.measure import evaluate

MATRICES: dict[str, type[NetworkOperator]] = {"ggn": GGN, "hessian": Hessian}


class MovableNetwork:
    """A private copy of an adapted network, in evaluation mode.

    Args:
        model: it is left as it is.
        parameters: names of the backbone weights, in the order in which they are flattened.
        batch_size: samples of a forward pass.

    Raises:
        ValueError: the head was never replaced, or the network lacks one of the parameters.
    """

    def __init__(self, model: nn.Module, parameters: tuple[str, ...], batch_size: int) -> None:
        if task_head(model) is None:
            raise ValueError(
                "the model of a path must answer both tasks: it comes from fast.finetune, or from "
                "fast.replace_head and a training loop; do not fold it before"
            )
        self.model = copy.deepcopy(model).eval()
        self.model.zero_grad(set_to_none=True)
        by_name = dict(self.model.named_parameters())
        missing = [n for n in parameters if n not in by_name]
        if missing:
            raise ValueError(f"the path moves {missing[0]!r}, which the model does not have")
        self.names = parameters
        self.params = [by_name[n] for n in parameters]
        self.batch_size = batch_size
        self.device = self.params[0].device

    @torch.no_grad()
    def move_to(self, weights: Tensor) -> None:
        """Set the backbone to `weights`, `[P]`."""
        parts = weights.split([p.numel() for p in self.params])
        for p, part in zip(self.params, parts, strict=True):
            p.copy_(part.view_as(p))

    def source_loss(self, data: Data) -> float:
        """Mean cross-entropy of the source head, nats."""
        with source_task(self.model):
            return self.target_loss(data)

    def target_loss(self, data: Data) -> float:
        """Mean cross-entropy of the target head, nats."""
        loss = evaluate(self.model, data, self.batch_size, self.device).loss
        assert loss is not None
        return loss

    @contextlib.contextmanager
    def curvature(self, data: Data, matrix: str) -> Iterator[NetworkOperator]:
        """The Hessian or Gauss-Newton matrix of the source loss where the backbone is now."""
        batches = [(x, y.to(self.device)) for x, y in data.eval_batches(self.batch_size)]
        with evaluating(self.model), source_task(self.model):
            yield MATRICES[matrix](
                Answers(self.model),
                "cross_entropy",
                batches,
                [f"model.{n}" for n in self.names],
            )

    def card(self, data: Data, seed: int) -> SourceCard:
        """A source card of the network where the backbone is now."""
        samples = (data.inputs, data.labels)
        return SourceCard.estimate(self.model, samples, seed=seed)

    def forecast(self, card: SourceCard) -> tuple[float, bool]:
        """The rise of the source loss that `card` forecasts, in nats; whether it was calibrated on
        steps as long."""
        energy = card.energy(self.params)
        return card.calibration.nats(energy), card.calibration.reaches(energy)


def subset(data: Any, name: str, samples: int, seed: int) -> Data:
    """At most this many samples, in memory: drawn at random, or the first ones of a loader.

    Args:
        data: what `fast.finetune` takes as `source` or `val`.
        name: for messages.
    """
    whole = as_data(data, name)
    if whole.loader is not None:
        first = SourceInputs.parse(whole.loader, samples, name)
        if first.labels is None:
            raise TypeError(f"{name}: the DataLoader gives no labels")
        return as_data((first.inputs, first.labels), name)
    count = whole.num_samples
    assert count is not None
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples]
    return as_data(whole.batch_at(order.sort().values), name)
