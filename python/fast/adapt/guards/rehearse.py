"""Rehearse the features of source inputs inside the batches of the target.

Each batch gives an eighth of its places to source inputs, and the loss gets

    weight * mean over samples of e^2 / (2 * TOLERANCE),  e = |f(x) - f0(x)|^2 / variance of f0

over them: f is what the head sees, f0 what it saw at the pretrained weights. It is feature
distillation (FitNets, Romero et al. 2015, arXiv 1412.6550) on replayed inputs, with e squared: the
pull is `weight * e / TOLERANCE` times that of e itself, so it is gentle where features hardly move
and hard where they run away, and one weight does for robust and for fragile networks. It grows no
further beyond `STEEPEST`, so that a step too far is not answered by a larger one.

Where e is above `TOLERANCE` all the same, the learning rate of the run is too high for this network
and is divided by as much: one rate does for ResNets, which bear 1.5e-3, and for a MobileNet or a
transformer, which do not. A step costs what it cost before; no label and no source head is needed.
docs/research.md has what was tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast.data.dataset import Data
from fast.data.source_inputs import SourceInputs
from fast.data.stream import TrainBatches, row_batches
from fast.data.trees import join, length, move, pick
from fast.heads import (
    TaskHead,
    by_sample,
    features_of,
    forward_logits,
    in_mode,
    source_task,
    task_head,
)

SHARE = 1 / 8
# The e that is pulled back at the plain weight. Of ResNet-20 on
# signs it came to 0.03-0.05 at the end of a run, of MobileNet without norm layers to 0.4.
TOLERANCE = 0.1
# Of the pull, as a multiple of that of e.
STEEPEST = 3.0
# Features that are lost have to find back: the learning rate falls by no more than this.
LEAST = 0.1
# Of features that are kept: maps of a fully convolutional network are large.
FEATURE_BYTES = 2**28
CHUNK = 128
# Target inputs whose features are kept where there are no source inputs.
OWN_INPUTS = 512
# Steps over which e is averaged while it falls, and while it rises: features that run away have to
# be caught within the ramp. Against 10 for both and a look at every fifth step, on five pairs: the
# source kept 0.5 points more, the target the same.
FALL, RISE = 10, 3


def places_for(batch_size: int) -> int:
    """How many places of a batch source inputs get."""
    return max(1, round(SHARE * batch_size)) if batch_size > 1 else 0


def make_room(data: Data, size: int, seed: int, rehearsed: str) -> tuple[TrainBatches, int]:
    """Target batches, and how many places beside them rehearse.

    These are taken from the target's, so that a step costs what it did; a user's DataLoader keeps
    its own batches, and they come on top.

    Args:
        size: samples of a step.
        rehearsed: whose features: see `fast.adapt.methods.Plan`.

    Raises:
        ValueError: batches of one sample, and source inputs to rehearse beside it.
    """
    batches = TrainBatches(data, size, seed)
    size = batches.given_size or size
    own = rehearsed == "target inputs"
    if not rehearsed or (own and (size < 2 or not _can_be_kept(batches))):
        return batches, 0
    if size < 2:
        raise ValueError(
            "batch_size must be at least 2 to rehearse features beside the target; or set "
            "rehearse=0"
        )
    places = places_for(size)
    return TrainBatches(data, size - places, seed), places


def _can_be_kept(batches: TrainBatches) -> bool:
    """Whether the inputs are tensors and nothing else: names, texts, ... cannot be put together."""
    inputs = next(batches.from_step(0))[0]
    parts = inputs.values() if isinstance(inputs, Mapping) else inputs
    return isinstance(inputs, Tensor) or all(isinstance(part, Tensor) for part in parts)


class Rehearsal:
    """Source inputs and the features they had at the pretrained weights.

    Attributes:
        restraint: factor on the learning rate, at most 1.

    Args:
        model: with its new head, at the pretrained weights.
        head: its head.
        samples: source inputs.
        size: of them per step.
        weight: of the penalty, in units of the target loss.
        seed: of their order.
        apart: run them by themselves, in evaluation mode, as `depends_on_mode` wants it; else in
            one batch with target inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        head: TaskHead,
        samples: SourceInputs,
        size: int,
        weight: float,
        seed: int,
        apart: bool = False,
    ) -> None:
        self.weight, self.apart = weight, apart
        device = next(model.parameters()).device
        parts: list[Tensor] = []
        for inputs, _ in samples.batches(CHUNK):
            rows = features_of(model, head, move(inputs, device)).float()
            parts.append(by_sample(rows, length(inputs)))
            if sum(p.nbytes for p in parts) > FEATURE_BYTES:
                break
        self.features = torch.cat(parts)
        self.moved = 0.0
        self.restraint = 1.0
        # Of this step: the sum of e, on the device, and over how many samples.
        self._seen, self._count = torch.zeros((), device=device), 0
        # Of one feature on average. A constant feature would blow up a variance of its own.
        self.scale = 1 / self.features.var(0).mean().clamp_min(1e-12)
        count = len(self.features)
        self.inputs = pick(samples.inputs, slice(count))
        self.size, self.seed = size, seed

    def from_step(self, step: int) -> Iterator[tuple[Any, Tensor]]:
        """Inputs and their features at w0, from `step` on."""
        for rows in row_batches(len(self.features), self.size, self.seed, step):
            yield pick(self.inputs, rows), self.features[rows.to(self.features.device)]

    def penalty(self, before: Tensor, now: Tensor) -> Tensor:
        """Sum over samples, `[]`."""
        e = self.scale * (now.float() - before).square().flatten(1).mean(1)
        with torch.no_grad():
            self._seen += e.sum()
        self._count += len(e)
        pull = F.huber_loss(e, torch.zeros_like(e), reduction="sum", delta=STEEPEST * TOLERANCE)
        return self.weight / TOLERANCE * pull

    def after_step(self, strength: float = 1.0) -> None:
        """Take in what the step has seen, and decide on the learning rate of the next.

        On a GPU this waits for the step: all that is lost is the time to launch the next one.

        Args:
            strength: factor on the penalty at present; a budget that leaves more room leaves it
                the learning rate too.
        """
        if not self._count:
            return
        e = self._seen.item() / self._count
        self._seen.zero_()
        self._count = 0
        self.moved += (e - self.moved) / (RISE if e > self.moved else FALL)
        self.restraint = max(LEAST, min(1.0, TOLERANCE / strength / max(self.moved, 1e-12)))

    def state(self) -> dict[str, float]:
        return {"moved": self.moved, "restraint": self.restraint}

    def load(self, state: dict[str, float]) -> None:
        self.moved = state["moved"]
        self.restraint = state["restraint"]


@torch.no_grad()
def depends_on_mode(model: nn.Module, inputs: Any) -> bool:
    """Whether training mode changes what the head sees: by dropout, stochastic depth, statistics of
    the batch. Random state, modes and buffers stay as they are.

    Features in training mode would then not be what they were in evaluation mode though no weight
    has moved: with dropout of 0.2 before the head, e is a third from the first step on.
    """
    head = task_head(model)
    assert head is not None
    device = next(model.parameters()).device
    seen = HeadInput(head)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    found = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for training in (False, True):
            with in_mode(model, training), source_task(model):
                found.append(seen.features(model, inputs).float())
    seen.close()
    for name, b in model.named_buffers():
        b.copy_(buffers[name])
    asked, trained = found
    return bool((trained - asked).square().mean() > 1e-4 * asked.square().mean())


class HeadInput:
    """Watches what the head of a model is given, where it is asked to, and holds back the last
    rows."""

    def __init__(self, head: TaskHead) -> None:
        self.rows: int | None = None
        self._watching = False
        self._features: Tensor | None = None
        self._hook = head.register_forward_pre_hook(self._keep)

    def _keep(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not self._watching:
            return None
        self._features = args[0]
        return None if self.rows is None else (args[0][: self.rows], *args[1:])

    def forward(
        self, model: nn.Module, inputs: Any, source: Any | None, apart: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run target inputs, and source inputs with them where their shapes allow it.

        Returns:
            target logits; features of the target inputs; features of the source inputs, or None.
        """
        both = None if source is None or apart else join(inputs, source)
        if both is not None:
            rows = length(inputs)
            logits, features = self._run(model, both, rows)
            return logits, features[:rows], features[rows:]
        logits, features = self._run(model, inputs)
        if source is None:
            return logits, features, None
        with source_task(model), in_mode(model, False):
            return logits, features, self.features(model, source)

    def features(self, model: nn.Module, inputs: Any) -> Tensor:
        """What the head sees of these inputs, in the mode and for the task that the model is in."""
        return self._run(model, inputs)[1]

    def cut(self, model: nn.Module, inputs: Any, rows: int) -> Tensor:
        """Logits of the first `rows` of these inputs; all of them go as far as the head."""
        return self._run(model, inputs, rows)[0]

    def _run(self, model: nn.Module, inputs: Any, rows: int | None = None) -> tuple[Tensor, Tensor]:
        self._watching, self.rows = True, rows
        try:
            logits = forward_logits(model, inputs)
        finally:
            self._watching, self.rows = False, None
        features, self._features = self._features, None
        assert features is not None
        return logits, features

    def close(self) -> None:
        """Stop watching."""
        self._hook.remove()
