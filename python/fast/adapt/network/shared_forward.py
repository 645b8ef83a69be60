"""Run target and source inputs through the network in one pass, up to the head.

The target's rows go on through the head; the source's rows end at its input. So the penalty of
rehearsal needs no forward pass of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fast.data.trees import join, length, pick
from fast.heads import evaluating, forward_logits, in_mode, source_task, traceless
from fast.heads.task import also_again

# Shares of the mean square of features that are more than rounding, in 16 bits too.
OF_MODE, OF_OTHERS = 1e-4, 1e-3


class HeadInput:
    """Records the input of a network's head, and can keep its last rows from the head.

    Args:
        head: the module whose first argument the features are; it is hooked until `close`.
    """

    def __init__(self, head: nn.Module) -> None:
        self._rows: int | None = None
        self._watching = False
        self._features: Tensor | None = None
        self._hook = head.register_forward_pre_hook(self._keep)

    def _keep(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not self._watching:
            return None
        self._features = args[0]
        return None if self._rows is None else (args[0][: self._rows], *args[1:])

    def forward(
        self, model: nn.Module, inputs: Any, source: Any | None, apart: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run target inputs, and source inputs with them where their shapes allow it.

        Args:
            source: source inputs, or None.
            apart: run these in a pass of their own, in evaluation mode and for the source task.

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
        # `DistributedDataParallel` takes one pass per step. It averages the gradients of this one
        # as well, because they arrive in the same parameters.
        alone = model.module if isinstance(model, DistributedDataParallel) else model
        with source_task(alone), also_again(in_mode, alone, False):
            return logits, features, self.features(alone, source)

    def features(self, model: nn.Module, inputs: Any) -> Tensor:
        """What the head sees of these inputs, in the mode and for the task that the model is in."""
        return self._run(model, inputs)[1]

    def _run(self, model: nn.Module, inputs: Any, rows: int | None = None) -> tuple[Tensor, Tensor]:
        self._watching, self._rows = True, rows
        try:
            logits = forward_logits(model, inputs)
        finally:
            self._watching, self._rows = False, None
        features, self._features = self._features, None
        if features is None:
            raise RuntimeError(
                "the head's input was not seen: finish() has removed the hooks, and no forward() "
                "can follow; or the network has run without its head"
            )
        return logits, features

    def close(self) -> None:
        """Stop watching."""
        self._hook.remove()


@torch.no_grad()
def cuts_at_head(model: nn.Module, head: nn.Module, target: Any, source: Any) -> bool:
    """Whether target and source inputs can share a pass that the source's rows leave at the head.

    They cannot if code behind the head takes the number of samples from the inputs, or if the
    features of a sample depend on the others in its batch.

    Args:
        target: a batch of inputs on the model's device, of which the first few are used.
        source: a batch of source inputs.
    """
    few = pick(target, slice(4))
    both = join(few, source)
    if both is None:
        return True
    head_input = HeadInput(head)
    try:
        with evaluating(model):
            alone, features, _ = head_input.forward(model, few, None, False)
            cut, beside, _ = head_input.forward(model, few, source, False)
        return cut.shape == alone.shape and _change(features, beside) < OF_OTHERS
    except (IndexError, RuntimeError, ValueError):
        return False
    finally:
        head_input.close()


@torch.no_grad()
def features_by_mode(model: nn.Module, head: nn.Module, inputs: Any) -> tuple[Tensor, Tensor]:
    """What the head sees of the inputs in evaluation and in training mode, for the source task.

    Training mode draws the same numbers in every call. Random state, modes and buffers stay as they
    are.
    """
    head_input = HeadInput(head)
    features = []
    try:
        with traceless(model), torch.compiler.set_stance("force_eager"):
            torch.manual_seed(0)
            for training in (False, True):
                with in_mode(model, training), source_task(model):
                    features.append(head_input.features(model, inputs))
    finally:
        head_input.close()
    return features[0], features[1]


def depends_on_mode(model: nn.Module, head: nn.Module, inputs: Any) -> bool:
    """Whether training mode changes what the head sees, by dropout, stochastic depth or batch norm.

    Features in training mode would then differ from those in evaluation mode although no weight has
    moved: with dropout of 0.2 before the head, e is a third from the first step on.
    """
    return _change(*features_by_mode(model, head, inputs)) > OF_MODE


def _change(before: Tensor, now: Tensor) -> float:
    """The mean square of what has changed in features, as a share of theirs."""
    change = (now.float() - before.float()).square().mean()
    return float(change / before.float().square().mean())
